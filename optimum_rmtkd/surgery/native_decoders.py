"""Reduced decoders as plain checkpoints of their base: one width of the stream, one of all feed-forward parts, and as
many key-value groups in every layer, of which each may have kept others.

Hardly anything has to be computed: the tensors are those of the stock class already, and a config says their sizes.
The last norm of a tied model has a scale a coordinate, so that the table stays tied. A table whose rows are multiplied
by the root of its width (Gemma) takes what that number loses, and such a norm gives it back to the head.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import RMTKDError, SpecMismatchError, UnsupportedArchitectureError
from ..loading_rmtkd import named_errors
from ..modeling_rmtkd import is_norm, resolve_path
from ..models import as_tied, match_precision
from .decoders import DecoderLayout
from .norms import norm_of
from .sites import Anatomy, get_module, has_module


__all__ = ["coupled", "plain_copy", "settle", "widths_config"]

NAMES = ("model_type", "rmtkd", "auto_map", "architectures", "transformers_version")  # that config classes set
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")


def coupled(model: PreTrainedModel, layout: DecoderLayout) -> Anatomy:
    """The anatomy of a decoder with the sites coupled so that its config can state their widths.

    Raises:
        UnsupportedArchitectureError: a family without a native shape.
    """
    if layout.inner_field is None:
        raise UnsupportedArchitectureError(
            f"shape='native': no config of {type(model).__name__} states the widths of a narrow one, or its code "
            "computes something else at another width. Use shape='free'."
        )
    anatomy = layout.anatomy(model)
    if _divides(model, layout):
        return _with_whole_heads(anatomy, model.config.num_attention_heads)
    names = {"attention_groups": "attention", "intermediate": "intermediate"}
    lead = {name: names.get(site.kind, site.couple) for name, site in anatomy.sites.items() if site.chosen}
    sites = {
        name: dataclasses.replace(site, couple=lead[name] if site.chosen else lead[site.follows])
        for name, site in anatomy.sites.items()
    }
    return dataclasses.replace(anatomy, sites=sites)


def _divides(model: PreTrainedModel, layout: DecoderLayout) -> bool:
    """Whether the config wants a stream that is a multiple of the number of heads, whatever width these have."""
    values = {name: value for name, value in model.config.to_dict().items() if name not in NAMES}
    values[layout.width_field] += 1
    try:
        with named_errors("config"):
            type(model.config)(**values)
    except SpecMismatchError:
        return True
    return False


def _with_whole_heads(anatomy: Anatomy, heads: int) -> Anatomy:
    """All heads stay, and the stream goes in multiples of their number."""
    sites = {
        name: dataclasses.replace(site, couple=site.couple if site.kind == "hidden" else "intermediate")
        for name, site in anatomy.sites.items()
        if "attention_groups" not in (site.kind, getattr(anatomy.sites.get(site.follows), "kind", ""))
    }
    sites["hidden"] = dataclasses.replace(sites["hidden"], groups=math.lcm(heads, sites["hidden"].groups))
    return dataclasses.replace(anatomy, sites=sites)


def widths_config(model: PreTrainedModel, anatomy: Anatomy, layout: DecoderLayout, config: Any) -> PreTrainedConfig:
    """`config`, in place, with the widths of `model`: those of its first layer, and the stream's."""
    block = anatomy.blocks[0]
    attention = next(site for site in anatomy.sites.values() if site.kind == "attention_groups")
    inner = next((site for site in anatomy.sites.values() if site.kind == "intermediate"), None)
    each = getattr(get_module(model, f"{block}.{layout.attention}"), layout.head_size)
    values = {
        layout.width_field: anatomy.sites["hidden"].width,
        "num_attention_heads": attention.width // each,
        "num_key_value_heads": attention.group_width,
        "head_dim": each,
    }
    if inner is not None:  # that of experts stays
        values[layout.inner_field] = inner.width
    for name, value in values.items():
        setattr(config, name, value)
    field = next((name for name in EPSILONS if hasattr(config, name)), None)
    if field is not None and not get_module(model, anatomy.last_norm).weight.is_meta:
        stream = _on_stream(model, anatomy)
        inside = [module for path, module in model.named_modules() if is_norm(module) and path not in stream]
        setattr(config, field, norm_of(inside[0] if inside else get_module(model, anatomy.last_norm)).eps)
    return config


def _on_stream(model: nn.Module, anatomy: Anatomy) -> set[str]:
    """Module paths of what has the features of the stream, norms among them."""
    paths = {anatomy.last_norm, *(unit.path for unit in anatomy.units if unit.writes == "hidden")}
    paths |= {path for unit in anatomy.units for path in (unit.through, unit.behind)}
    return {resolve_path(model, path) for path in paths if path}


def plain_copy(model: PreTrainedModel, stock: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """An instance of the stock class with the tensors of `model`.

    Raises:
        RMTKDError: layers of unequal widths; names the first.
    """
    native = match_precision(as_tied(stock(config).to(device=model.device), model), model).eval()
    own, given = native.state_dict(), model.state_dict()
    for name in [*own, *given]:
        if name not in own or name not in given or own[name].shape != given[name].shape:
            expected, found = (tuple(d[name].shape) if name in d else "nothing" for d in (own, given))
            raise RMTKDError(
                f"{name} is {found} in the reduced model and {expected} in a {stock.__name__} of one width for all "
                "layers. Reduce with shape='native', or keep the reduced format."
            )
    native.load_state_dict(copy.deepcopy(given))
    native.tie_weights(recompute_mapping=False)
    if getattr(model, "generation_config", None) is not None:
        native.generation_config = copy.deepcopy(model.generation_config)
    return native


def settle(native: PreTrainedModel, model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Put into the tensors of a plain copy, in place, what its class computes from its config otherwise than `model`,
    whose anatomy is given.

    The norms that read a narrow stream have another epsilon than those inside attention (Qwen 3), and a config has one
    for all. rms(c u) with an epsilon of c^2 e is c rms(u) with e: so the stream is scaled until its epsilon is that of
    the config.
    """
    share = _scale_of(model.get_input_embeddings()) / _scale_of(native.get_input_embeddings())
    if share != 1:
        _scale_table(native, share, anatomy.last_norm)
    narrow, plain = (norm_of(get_module(m, anatomy.last_norm)).eps for m in (model, native))
    if narrow != plain and narrow > 0:
        _scale_stream(native, anatomy, (plain / narrow) ** 0.5)


def _scale_of(table: nn.Module) -> float:
    """What a word table multiplies its rows with."""
    return float(getattr(table, "embed_scale", 1.0))


@torch.no_grad()
def _scale_table(model: PreTrainedModel, share: float, last_norm: str) -> None:
    """Multiply the word table, and nothing that a head gives."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    table.weight.copy_(table.weight.double() * share)
    if head is not None and head.weight is table.weight:
        norm = norm_of(get_module(model, last_norm))
        norm.set_scale(norm.scale / share)


@torch.no_grad()
def _scale_stream(model: PreTrainedModel, anatomy: Anatomy, share: float) -> None:
    """Multiply all that is added to the stream, and nothing that a head gives. Where a norm stands between a layer and
    the sum, both are multiplied: the one for that norm's epsilon, the other for the stream's."""
    _scale_table(model, share, anatomy.last_norm)
    table = model.get_input_embeddings()
    for unit in (unit for unit in anatomy.units if unit.writes == "hidden"):
        layer = get_module(model, unit.path)
        if is_norm(layer) or layer is table:
            continue
        for tensor in (layer,) if isinstance(layer, nn.Parameter) else layer.parameters(recurse=False):
            tensor.copy_(tensor.double() * share)
        if unit.behind:
            norm = norm_of(get_module(model, unit.behind))
            norm.set_scale(norm.scale * share)
            if norm.shift is not None:
                norm.module.bias.copy_(norm.shift * share)
    for unit in anatomy.units:
        if unit.reads == "hidden" and unit.through is None and has_module(model, unit.path):  # no norm undoes it
            layer = get_module(model, unit.path)
            weight = layer if isinstance(layer, nn.Parameter) else layer.weight
            weight.copy_(weight.double() / share)
