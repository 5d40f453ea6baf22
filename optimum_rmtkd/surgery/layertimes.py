"""How long single layers take by their widths: timed at a grid, interpolated between. Knows kinds of layers and a
device; no model and no plan."""

from __future__ import annotations

import bisect
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional


__all__ = ["Kind", "LayerTimes", "Surface", "grid", "timed"]

logger = logging.getLogger(__name__)

PASSES = 5  # over all layers; of each the quickest counts: what disturbs a layer only makes it slower
LONG_ENOUGH = 1e-3  # seconds of one measurement: a clock's tick and a call's overhead are nothing beside it
MOST_CALLS = 200
FINEST = 16  # part of the full width below which only the floor itself is timed
ALIGNED = 16  # numbers, from which on a weight begins: kernels take other ways with others
POOL = 2**24  # random numbers that weights are cut from, one after the other: a layer of a model is not in the cache

Point = tuple["Kind", tuple[int, ...]]


@dataclass(frozen=True)
class Kind:
    """A kind of layer at the shapes that no cut changes.

    Attributes:
        name: linear, conv, layer_norm, batch_norm, activation, embedding, attention or eager_attention.
        fixed: its numbers, see the functions of `_WORK`.
    """

    name: str
    fixed: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """As text, for a file."""
        return " ".join([self.name, "x".join(map(str, self.fixed))])


class _Pool:
    """Random numbers of ordinary size: denormal ones, as fresh memory may hold, are slow."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype):
        self.numbers, self.at = torch.empty(0, device=device, dtype=dtype), 0

    def take(self, *shape: int) -> torch.Tensor:
        """The next ones, a view."""
        size = torch.Size(shape).numel()
        if size > len(self.numbers):
            self.numbers = self.numbers.new_empty(max(POOL, size)).normal_(0, 0.05)
        if self.at + size > len(self.numbers):
            self.at = 0
        taken = self.numbers[self.at : self.at + size].view(shape)
        self.at += -(-size // ALIGNED) * ALIGNED
        return taken


def _linear(pool: _Pool, fixed: Sequence[int], widths: Sequence[int]) -> Callable[[], Any]:
    """fixed: positions, whether there is a bias; widths: features in and out."""
    (rows, bias), (inputs, outputs) = fixed, widths
    x, b = pool.take(rows, inputs), pool.take(outputs) if bias else None
    return lambda: functional.linear(x, pool.take(outputs, inputs), b)


def _conv(pool: _Pool, fixed: Sequence[int], widths: Sequence[int]) -> Callable[[], Any]:
    """fixed: samples, height, width, kernel (2), stride (2), padding (2), dilation (2), bias; widths: channels."""
    (batch, high, wide, kh, kw, *rest), (inputs, outputs) = fixed, widths
    stride, padding, dilation, bias = rest[0:2], rest[2:4], rest[4:6], rest[6]
    x, b = pool.take(batch, inputs, high, wide), pool.take(outputs) if bias else None
    return lambda: functional.conv2d(x, pool.take(outputs, inputs, kh, kw), b, stride, padding, dilation)


def _layer_norm(pool: _Pool, fixed: Sequence[int], widths: Sequence[int]) -> Callable[[], Any]:
    """fixed: positions; widths: features."""
    x, weight, bias = pool.take(*fixed, *widths), pool.take(*widths), pool.take(*widths)
    return lambda: functional.layer_norm(x, tuple(widths), weight, bias)


def _batch_norm(pool: _Pool, fixed: Sequence[int], widths: Sequence[int]) -> Callable[[], Any]:
    """fixed: samples, height, width; widths: channels."""
    batch, high, wide = fixed
    x, mean = pool.take(batch, *widths, high, wide), pool.take(*widths)
    variance = mean.square() + 1.0
    return lambda: functional.batch_norm(x, mean, variance, mean, mean)


def _activation(pool: _Pool, fixed: Sequence[int], widths: Sequence[int]) -> Callable[[], Any]:
    """fixed: positions; widths: features. The models' functions differ by less than their layers do: GELU stands for
    them."""
    x = pool.take(*fixed, *widths)
    return lambda: functional.gelu(x)


def _embedding(pool: _Pool, fixed: Sequence[int], widths: Sequence[int]) -> Callable[[], Any]:
    """fixed: positions, rows of the table; widths: features."""
    (rows, entries), (features,) = fixed, widths
    ids = torch.arange(rows, device=pool.numbers.device) * 7919 % entries
    entries = min(entries, POOL // features)
    ids, table = ids % entries, pool.take(entries, features)
    return lambda: functional.embedding(ids, table)


def _attention(pool: _Pool, fixed: Sequence[int], widths: Sequence[int]) -> Callable[[], Any]:
    """fixed: samples, heads, positions; widths: of a head's queries and keys, of its values."""
    (batch, heads, length), (keys, values) = fixed, widths
    q, k = pool.take(batch, heads, length, keys), pool.take(batch, heads, length, keys)
    v = pool.take(batch, heads, length, values)
    return lambda: functional.scaled_dot_product_attention(q, k, v)


def _eager_attention(pool: _Pool, fixed: Sequence[int], widths: Sequence[int]) -> Callable[[], Any]:
    """As `_attention`, product by product."""
    (batch, heads, length), (keys, values) = fixed, widths
    q, k = pool.take(batch, heads, length, keys), pool.take(batch, heads, length, keys)
    v = pool.take(batch, heads, length, values)
    return lambda: (q @ k.mT * keys**-0.5).softmax(-1) @ v


_WORK = {
    "linear": _linear,
    "conv": _conv,
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "activation": _activation,
    "embedding": _embedding,
    "attention": _attention,
    "eager_attention": _eager_attention,
}


def timed(points: Sequence[Point], device: str, dtype: torch.dtype) -> tuple[list[float], float]:
    """(seconds of each layer, the spread): the quickest of a few passes over all layers in turn, so that a slow moment
    of the machine does not fall on one of them alone. The spread is the median over layers of the share by which their
    middle measurement is slower than the quickest."""
    pool = _Pool(device, dtype)
    with torch.inference_mode():
        runs = [_WORK[kind.name](pool, kind.fixed, widths) for kind, widths in points]
        calls = [_calls(run, device) for run in runs]
        found = [[_seconds(run, n, device) for run, n in zip(runs, calls, strict=True)] for _ in range(PASSES)]
    layers = list(zip(*found, strict=True))
    best = [min(times) for times in layers]
    spreads = [statistics.median(times) / least - 1 for times, least in zip(layers, best, strict=True)]
    return best, statistics.median(spreads) if spreads else 0.0


def _calls(run: Callable[[], Any], device: str) -> int:
    """How often a layer has to run to be measured; the first call is not looked at."""
    run()
    return min(MOST_CALLS, max(1, round(LONG_ENOUGH / max(_seconds(run, 1, device), 1e-9))))


def _seconds(run: Callable[[], Any], calls: int, device: str) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def grid(low: int, high: int) -> tuple[int, ...]:
    """Widths to time from the narrowest to the full one: powers of two and their halves between (16, 24, 32, 48, ...),
    in multiples of 8."""
    between = [2**power * part // 2 for power in range(4, 31) for part in (2, 3)]
    return tuple(sorted({low, high, *(w for w in between if max(low, high // FINEST) < w < high)}))


class Surface:
    """Seconds by widths, linear between the points of a grid in each of them, and beyond its ends.

    Noise only ever adds, and no layer is quicker for being wider: a point takes the least of all that are no narrower.

    Args:
        axes: the grid's widths, ascending, one tuple for each width.
        values: seconds at its points, in the order of `itertools.product`.
    """

    def __init__(self, axes: Sequence[tuple[int, ...]], values: Iterable[float]):
        self.axes = tuple(axes)
        table = torch.tensor(list(values), dtype=torch.float64).reshape([len(axis) for axis in self.axes])
        for dim in range(table.dim()):
            table = table.flip(dim).cummin(dim).values.flip(dim)
        self.table = table

    def __call__(self, *widths: int) -> float:
        table = self.table
        for axis, width in zip(self.axes, widths, strict=True):
            if len(axis) == 1:
                table = table[0]
                continue
            at = min(max(bisect.bisect_right(axis, width) - 1, 0), len(axis) - 2)
            share = (width - axis[at]) / (axis[at + 1] - axis[at])
            table = table[at] * (1 - share) + table[at + 1] * share
        return max(float(table), 0.0)


class LayerTimes:
    """Times of layers on one device; those that are missing are measured when they are asked for.

    Args:
        device, dtype: where and in what number format.
        known: {kind's key: {widths as "384x1536": seconds}}, of earlier.

    Attributes:
        spread: of the last measurement (`timed`); None where all was known.
    """

    def __init__(self, device: str, dtype: torch.dtype, known: Mapping[str, Mapping[str, float]] | None = None):
        self.device, self.dtype = device, dtype
        self.times = {key: dict(values) for key, values in (known or {}).items()}
        self.spread: float | None = None

    def measure(self, wanted: Iterable[Point]) -> int:
        """Time what is not known yet; the number of those layers."""
        missing = [(k, w) for k, w in dict.fromkeys(wanted) if _name(w) not in self.times.get(k.key, {})]
        if missing:
            seconds, self.spread = timed(missing, self.device, self.dtype)
            for (kind, widths), value in zip(missing, seconds, strict=True):
                self.times.setdefault(kind.key, {})[_name(widths)] = value
        return len(missing)

    def surface(self, kind: Kind, axes: Sequence[tuple[int, ...]]) -> Surface:
        """Of a kind whose points on this grid were measured."""
        known = self.times[kind.key]
        return Surface(axes, [known[_name(widths)] for widths in itertools.product(*axes)])


def _name(widths: Sequence[int]) -> str:
    return "x".join(map(str, widths))
