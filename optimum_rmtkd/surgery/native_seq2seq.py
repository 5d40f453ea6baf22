"""Reduced encoder-decoders as plain checkpoints of their base: one width of both streams, one of all heads, one of all
feed-forward parts, where the config has a field for each."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedArchitectureError
from .norms import norm_of
from .seq2seq import Seq2SeqLayout
from .sites import Anatomy, get_module


__all__ = ["coupled_stacks", "settle_head", "stacks_config"]


def coupled_stacks(model: nn.Module, layout: Seq2SeqLayout) -> Anatomy:
    """The anatomy with the sites coupled so that the config can state their widths.

    Raises:
        UnsupportedArchitectureError: a family without a native shape.
    """
    if layout.inner_field is None:
        raise UnsupportedArchitectureError(
            f"shape='native': no config of {type(model).__name__} states the widths of a narrow one, or its code "
            "computes something else at another width. Use shape='free'."
        )
    anatomy = layout.anatomy(model)
    couples = {"hidden": "hidden", "intermediate": "intermediate"}
    sites = {
        name: dataclasses.replace(site, couple=couples.get(site.kind, "heads")) for name, site in anatomy.sites.items()
    }
    return dataclasses.replace(anatomy, sites=sites)


def stacks_config(model: nn.Module, anatomy: Anatomy, layout: Seq2SeqLayout, config: Any) -> PreTrainedConfig:
    """`config`, in place, with the widths of `model`: those of its first layer, and the stream's."""
    first = {site.kind: site for site in reversed(anatomy.sites.values())}
    setattr(config, layout.width_field, first["hidden"].width)
    setattr(config, layout.inner_field, first["intermediate"].width)
    setattr(config, layout.head_field, first["attention_vo"].group_width)
    norm = get_module(model, anatomy.last_norm)
    if not norm.weight.is_meta:
        setattr(config, layout.epsilon_field, norm_of(norm).eps)
    return config


@torch.no_grad()
def settle_head(native: PreTrainedModel, model: PreTrainedModel, anatomy: Anatomy, layout: Seq2SeqLayout) -> None:
    """Put into the last norm of a plain copy, in place, what its head is divided by otherwise than that of `model`;
    heads that generate alone are divided."""
    field, name = layout.scales_head or ("", "")
    if anatomy.answers and getattr(model.config, field, False) and hasattr(model, name):
        norm = norm_of(get_module(native, anatomy.last_norm))
        norm.set_scale(norm.scale * (getattr(native, name) / getattr(model, name)) ** 0.5)
