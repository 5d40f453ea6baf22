"""Latency of two models against each other, fair to both."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


__all__ = ["Latency", "compare_latency"]


@dataclass(frozen=True)
class Latency:
    """Median seconds of one forward pass of each model, and the median ratio before / after of neighbouring passes."""

    before: float
    after: float
    ratio: float


def compare_latency(
    before: PreTrainedModel, after: PreTrainedModel, inputs: dict[str, Tensor], repeats: int = 30, warmup: int = 5
) -> Latency:
    """Time both models in turn, so that a slow moment of the machine falls on both.

    Args:
        inputs: keyword arguments of both models; the models must be on the same device as they are.
        repeats: measured pairs.
        warmup: pairs run before, not measured.
    """
    import torch

    def seconds(model: PreTrainedModel) -> float:
        start = time.perf_counter()
        model(**inputs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    before.eval(), after.eval()
    with torch.inference_mode():
        for _ in range(warmup):
            seconds(before), seconds(after)
        pairs = [(seconds(before), seconds(after)) for _ in range(repeats)]
    return Latency(
        before=statistics.median(b for b, _ in pairs),
        after=statistics.median(a for _, a in pairs),
        ratio=statistics.median(b / a for b, a in pairs),
    )
