"""The tensors of a reduced encoder in a plain model that may be wider: zeros fill the gap (see `native`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import RMTKDError
from .families import family_of
from .sites import Anatomy, get_module, is_layer


__all__ = ["fill_up"]


def fill_up(
    model: PreTrainedModel, native: PreTrainedModel, anatomy: Anatomy, widths: dict[str, int], heads: int
) -> None:
    """Fill a plain model, in place, with the tensors of a reduced one, zeros around them where it is wider.

    Args:
        widths: {site: width in the plain model}. heads: how many it has.

    Raises:
        RMTKDError: a tensor that no config can state; names it.
    """
    state, given = native.state_dict(), model.state_dict()
    same = {name: value for name, value in given.items() if name in state and state[name].shape == value.shape}
    native.load_state_dict(same, strict=False)
    filled = {id(tensor) for name, tensor in native.state_dict(keep_vars=True).items() if name in same}
    softmax = family_of(native).layout.anatomy(native).softmax_scales
    with torch.no_grad():
        for unit in anatomy.units:
            if not is_layer(model, unit.path):
                continue
            old, new = get_module(model, unit.path), get_module(native, unit.path)
            if isinstance(old, torch.nn.Parameter) or unit.factor == "hidden":
                continue
            reads, writes = (_places(anatomy, widths, heads, site) for site in (unit.reads, unit.writes))
            if unit.factor == "embedding" and hasattr(old, "up"):
                new.weight.copy_((old.weight.double() @ old.up.weight.double().T).to(new.weight.dtype))
            elif isinstance(old, torch.nn.Linear) and (reads is not None or writes is not None):
                scale = _scale(anatomy, softmax, unit.writes)
                _spread(new, old, reads, writes, scale)
            else:
                continue
            filled.update(id(parameter) for parameter in new.parameters())
    native.tie_weights()
    for name, parameter in native.named_parameters():
        if id(parameter) not in filled:
            found = tuple(given[name].shape) if name in given else "missing"
            raise RMTKDError(
                f"{name} is {found} in the reduced model, {type(native).__name__} builds it as "
                f"{tuple(parameter.shape)} and its config has no field for that. Use the reduced format or --format "
                "onnx, or reduce without the stream (--sites intermediate attention_qk attention_vo)."
            )


def _places(anatomy: Anatomy, widths: dict[str, int], heads: int, site: str | None) -> torch.Tensor | None:
    """Where the features of a site go in the plain model; None where it is not an inner width."""
    if site is None or anatomy.sites.get(site) is None:
        return None
    found = anatomy.sites[site]
    if found.kind == "intermediate":
        return torch.arange(found.width)
    if found.kind in ("attention_qk", "attention_vo"):
        starts = torch.arange(found.groups) * (widths[site] // heads)
        return (starts[:, None] + torch.arange(found.group_width)).flatten()
    return None


def _scale(anatomy: Anatomy, softmax: Mapping[str, float], site: str | None) -> float:
    """What queries and keys are each multiplied by, so that the base's softmax scales, {path of an attention: factor},
    give the reduced model's logits."""
    if site is None or anatomy.sites.get(site) is None or anatomy.sites[site].kind != "attention_qk":
        return 1.0
    block = anatomy.blocks[anatomy.sites[site].depth]
    path = next(path for path in softmax if path.startswith(block + "."))
    return (anatomy.softmax_scales[path] / softmax[path]) ** 0.5


def _spread(new: nn.Linear, old: nn.Linear, reads, writes, scale: float) -> None:
    """Copy a linear layer into a wider one of zeros, its features at their new places."""
    rows = torch.arange(old.out_features) if writes is None else writes
    columns = torch.arange(old.in_features) if reads is None else reads
    new.weight.zero_()
    new.weight[rows[:, None], columns] = (old.weight.double() * scale).to(new.weight.dtype)
    if new.bias is not None:
        new.bias.zero_()
        new.bias[rows] = (old.bias.double() * scale).to(new.bias.dtype)
