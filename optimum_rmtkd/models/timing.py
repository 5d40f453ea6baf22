"""Latency of two models against each other, fair to both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = ["Latency", "compare_latency"]


Inputs = dict[str, Any] | Callable[[Any], dict[str, Any]]  # keyword arguments, or what makes them for a model

BLOCK = 4  # passes of one model in a row: a served model meets its own weights in the cache, not those of another one


@dataclass(frozen=True)
class Latency:
    """Median seconds of one forward pass of each model, and the ratios before / after of neighbouring blocks: their
    median and their quartiles."""

    before: float
    after: float
    ratio: float
    low: float
    high: float


def compare_latency(
    before: PreTrainedModel,
    after: PreTrainedModel,
    inputs: Inputs,
    repeats: int = 12,
) -> Latency:
    """Time both models in turn, in short blocks of passes, so that a slow moment of the machine falls on both.

    Args:
        inputs: keyword arguments of both models, or what makes them anew for each pass, outside the time; the models
            must be on the same device as they are.
        repeats: pairs of blocks. Of each block the first pass, which warms the caches, is not measured.
    """
    import torch

    before.eval(), after.eval()
    with torch.inference_mode():
        _block(before, inputs), _block(after, inputs)
        pairs = [(_block(before, inputs), _block(after, inputs)) for _ in range(repeats)]
    ratios = [b / a for b, a in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
    return Latency(
        before=statistics.median(b for b, _ in pairs),
        after=statistics.median(a for _, a in pairs),
        ratio=middle,
        low=low,
        high=high,
    )


def _block(model: PreTrainedModel, inputs: Inputs) -> float:
    """Median seconds of BLOCK passes, after one that is not measured."""
    _seconds(model, inputs)
    return statistics.median(_seconds(model, inputs) for _ in range(BLOCK))


def _seconds(model: PreTrainedModel, inputs: Inputs) -> float:
    import torch

    given = inputs(model) if callable(inputs) else inputs
    start = time.perf_counter()
    model(**given)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
