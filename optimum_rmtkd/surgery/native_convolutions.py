"""Reduced convolutional networks as plain checkpoints of their base: the config states the channels of the stem and of
each stage, and those inside a block follow from them.

Each place may have kept other channels; only their number is common. As for decoders, nothing has to be computed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..errors import UnsupportedArchitectureError
from .convolutions import ResidualConvLayout
from .sites import Anatomy, get_module, linear_shape


__all__ = ["coupled_channels", "sizes_config"]


def coupled_channels(model: nn.Module, layout: ResidualConvLayout) -> Anatomy:
    """The anatomy with the sites coupled so that the config can state their widths: one width a stage.

    Raises:
        UnsupportedArchitectureError: a family without a native shape.
    """
    if layout.sizes_field is None:
        raise UnsupportedArchitectureError(
            f"shape='native': the config of {type(model).__name__} has no field for the widths inside a block. "
            "Use shape='free'."
        )
    share = _inner_share(model, layout)
    wide, thin = max(1, round(1 / share)), max(1, round(share))  # features of a stage, of a block, that go together
    anatomy = layout.anatomy(model)
    stages = {block: f"stage.{_stage_of(block, layout)}" for block in anatomy.blocks}
    ends = {f"{block}.{layout.inner_steps(model, block)[-1].path}": stages[block] for block in anatomy.blocks}
    streams = {unit.writes: ends[unit.path] for unit in anatomy.units if unit.path in ends}
    sites = {}
    for name, site in anatomy.sites.items():
        if name in streams:
            site = dataclasses.replace(site, couple=streams[name], groups=wide)
        elif site.depth >= 0:
            site = dataclasses.replace(site, couple=stages[anatomy.blocks[site.depth]], groups=thin)
        sites[name] = site
    return dataclasses.replace(anatomy, sites=sites)


def _inner_share(model: nn.Module, layout: ResidualConvLayout) -> float:
    return layout.inner_share.get(getattr(model.config, "layer_type", ""), 1.0)


def _stage_of(block: str, layout: ResidualConvLayout) -> int:
    return int(block.removeprefix(f"{layout.stages}.").partition(".")[0])


def sizes_config(model: nn.Module, layout: ResidualConvLayout, config: Any) -> PreTrainedConfig:
    """`config`, in place, with the widths of `model`: those that the stem and the first block of each stage give."""

    def given(path: str) -> int:
        return linear_shape(get_module(model, path))[1]

    blocks = [f"{layout.stages}.{s}.{layout.blocks}.0" for s in range(len(get_module(model, layout.stages)))]
    setattr(config, layout.stem_field, given(layout.stem[-1].path))
    setattr(
        config,
        layout.sizes_field,
        [given(f"{block}.{layout.inner_steps(model, block)[-1].path}") for block in blocks],
    )
    return config
