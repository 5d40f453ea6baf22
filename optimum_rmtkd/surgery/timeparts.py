"""What the layers of a model are to a clock: kinds of work and their widths, by the widths of sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..modeling_rmtkd import LowRankConv2d, LowRankEmbedding, LowRankLinear
from .layertimes import Kind
from .sites import Anatomy, Site, Unit, get_module, is_layer, linear_shape, unit_delta


__all__ = ["parts_of"]

Parts = Callable[[Mapping[str, int]], list[tuple[Kind, tuple[int, ...]]]]
Shapes = Mapping[str, Sequence[tuple[int, ...]]]


def parts_of(model: nn.Module, anatomy: Anatomy, shapes: Shapes) -> list[tuple[Unit, Parts]]:
    """Every layer that touches a site, with a function from {site: features} to the work that it is then, in (kind,
    widths); heads and activations as units of their own.

    Args:
        shapes: {spec path: what the layer reads, call by call}; a layer that is not there is not called, and takes no
            time.
    """
    found = []
    for unit in anatomy.units:
        if unit.path in shapes and is_layer(model, unit.path):
            parts = [_layer(unit, get_module(model, unit.path), shape) for shape in shapes[unit.path]]
            found += [(unit, _all(each))] if (each := [part for part in parts if part is not None]) else []
    found += [pair for site in anatomy.sites.values() for pair in _beside(site, model, anatomy, shapes)]
    return found


def _all(parts: Sequence[Parts]) -> Parts:
    return lambda widths: [work for part in parts for work in part(widths)]


def _layer(unit: Unit, module: nn.Module, shape: tuple[int, ...]) -> Parts | None:
    """None for a layer whose work is not timed: what it takes is then the same at all widths."""
    rows = _product(shape[:-1])
    if isinstance(module, (nn.Embedding, LowRankEmbedding)):
        return lambda widths: _embedding(module, _product(shape), unit_delta(unit, module, widths))
    if isinstance(module, (nn.Linear, Conv1D, LowRankLinear)):
        return lambda widths: _linear(module, rows, unit_delta(unit, module, widths))
    if isinstance(module, (nn.Conv2d, LowRankConv2d)):
        if getattr(module, "groups", 1) != 1 or isinstance(getattr(module, "padding", 0), str):
            return None
        return lambda widths: _conv(module, shape, unit_delta(unit, module, widths))
    if isinstance(module, nn.LayerNorm):
        rows = _product(shape) // module.weight.numel()  # features may stand before the positions
        return lambda widths: [
            (Kind("layer_norm", (rows,)), (unit_delta(unit, module, widths).get("dim", module.weight.numel()),))
        ]
    if isinstance(module, nn.BatchNorm2d):
        kind = Kind("batch_norm", (shape[0], *shape[2:]))
        return lambda widths: [(kind, (unit_delta(unit, module, widths).get("dim", module.num_features),))]
    return None


def _linear(module: nn.Module, rows: int, delta: Mapping[str, int]) -> list[tuple[Kind, tuple[int, ...]]]:
    inputs, outputs, _ = linear_shape(module)
    inputs, outputs = delta.get("in", inputs), delta.get("out", outputs)
    kind, rank = Kind("linear", (rows, int(module.bias is not None))), delta.get("rank", getattr(module, "rank", None))
    if rank is None:
        return [(kind, (inputs, outputs))]
    return [(Kind("linear", (rows, 0)), (inputs, rank)), (kind, (rank, outputs))]


def _conv(module: nn.Module, shape: tuple[int, ...], delta: Mapping[str, int]) -> list[tuple[Kind, tuple[int, ...]]]:
    batch, _, high, wide = shape
    inputs, outputs, _ = linear_shape(module)
    inputs, outputs = delta.get("in", inputs), delta.get("out", outputs)
    rank, bias = delta.get("rank", getattr(module, "rank", None)), int(module.bias is not None)
    stride = _pair(module.stride)
    if rank is None:
        numbers = (*_pair(module.kernel_size), *stride, *_pair(module.padding), *_pair(module.dilation), bias)
        return [(Kind("conv", (batch, high, wide, *numbers)), (inputs, outputs))]
    # both factors are 1 x 1 (`LowRankConv2d`), the stride is in the first
    after = (-(-high // stride[0]), -(-wide // stride[1]))
    plain = (0, 0, 1, 1)
    return [
        (Kind("conv", (batch, high, wide, 1, 1, *stride, *plain, 0)), (inputs, rank)),
        (Kind("conv", (batch, *after, 1, 1, 1, 1, *plain, bias)), (rank, outputs)),
    ]


def _embedding(module: nn.Module, rows: int, delta: Mapping[str, int]) -> list[tuple[Kind, tuple[int, ...]]]:
    dim = delta.get("dim", getattr(module, "output_dim", module.embedding_dim))
    rank = delta.get("rank", getattr(module, "rank", None))
    kind = Kind("embedding", (rows, module.num_embeddings))
    return [(kind, (dim,))] if rank is None else [(kind, (rank,)), (Kind("linear", (rows, 0)), (rank, dim))]


def _beside(site: Site, model: nn.Module, anatomy: Anatomy, shapes: Shapes) -> list[tuple[Unit, Parts]]:
    """What works on a site between its layers: attention on queries and keys, a function on feed-forward features."""
    writer = next((u for u in anatomy.units if u.writes == site.name and u.path in shapes), None)
    if writer is None:
        return []
    calls = shapes[writer.path]
    if site.kind == "intermediate":
        kinds = [Kind("activation", (_product(shape[:-1]),)) for shape in calls]
        unit = Unit(writer.path, writes=site.name, block=writer.block)
        return [(unit, lambda widths: [(kind, (widths.get(site.name, site.width),)) for kind in kinds])]
    other = anatomy.sites.get(site.name.replace("attention_qk", "attention_vo"))
    if site.kind != "attention_qk" or other is None or any(len(shape) != 3 for shape in calls):
        return []
    # layers that relative positions share with the text are called for the text first
    runs = max((len(shapes[u.path]) for u in anatomy.units if u.writes == other.name and u.path in shapes), default=1)
    texts = calls[:: max(1, len(calls) // runs)]
    eager = getattr(model.config, "_attn_implementation", None) == "eager"
    name = "eager_attention" if eager else "attention"
    kinds = [Kind(name, (batch, site.groups, length)) for batch, length, _ in texts]

    def parts(widths: Mapping[str, int]) -> list[tuple[Kind, tuple[int, ...]]]:
        return [(kind, tuple(widths.get(s.name, s.width) // site.groups for s in (site, other))) for kind in kinds]

    return [(Unit(writer.path, reads=site.name, writes=other.name, block=writer.block), parts)]


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _product(numbers: tuple[int, ...]) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total
