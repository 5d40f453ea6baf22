"""Correlation of predictions: what matters is how classes (or samples) are ordered, not by how much."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import RMTKDError
from ...validation import Interval, Positive
from ..step import DistillationStep
from .answers import Answers, has_head
from .base import DistillationObjective, register_objective
from .schedules import Weight


__all__ = ["CorrelationDistance", "pearson", "soft_ranks"]

logger = logging.getLogger(__name__)

SPANS = "CorrelationDistance does not know spans (question answering); use KLDivergence there."


def pearson(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Correlation along the last dimension: (..., n) each -> (...). A constant side gives 0, without a gradient."""
    return (direction(x) * direction(y)).sum(-1)


def direction(x: torch.Tensor) -> torch.Tensor:
    """Zero mean and length 1 along the last dimension; 0, without a gradient, where x is constant up to rounding.

    A constant has no direction, and near one the gradient grows beyond all bounds (a head that starts at 0).
    """
    info = torch.finfo(x.dtype)
    x = x / x.detach().abs().amax(-1, keepdim=True).clamp_min(info.tiny)  # squares of tiny numbers would underflow
    x = x - x.mean(-1, keepdim=True)
    square = x.square().sum(-1, keepdim=True)
    flat = square <= x.shape[-1] * (4 * info.eps) ** 2
    return x.masked_fill(flat, 0.0) * square.masked_fill(flat, 1.0).rsqrt()


def soft_ranks(x: torch.Tensor, width: float) -> torch.Tensor:
    """r_i = sum over j of sigmoid((x_i - x_j) / width): (..., n) -> (..., n), in O(n^2). The ranks, as width -> 0."""
    return torch.sigmoid((x[..., :, None] - x[..., None, :]) / width).sum(-1)


@register_objective
class CorrelationDistance(DistillationObjective):
    """1 - correlation of the softened predictions of student and teacher.

    Constant predictions (a head of zeros) have distance 1 and no gradient: keep another term beside it.

    - `dim="class"`: over the classes of each sample (token), averaged. Unmoved by any affine change of a sample's
      predictions. Vacuous below three classes: two numbers correlate with 1 or -1 whatever they are, so that is
      refused.
    - `dim="batch"`: over the samples of the micro-batch, for each class, averaged; the form for two classes and for
      regression. A correlation is no mean over samples: unlike every other objective it depends on the micro-batch,
      and one of fewer than three samples contributes nothing.

    Args:
        kind: "pearson" (values) or "spearman" (soft ranks of the standardised predictions).
        temperature: of the softmax.
        rank_width: softness of the ranks, in standard deviations.
        top_k: with more classes than this (vocabularies), only k are correlated: the teacher's largest of each sample;
            over the batch, where a class has to be the same in all samples, those of the largest mean probability.

    References: R2KD, arXiv 2311.13934 (over classes, Pearson and Spearman); Huang et al., "DIST", arXiv 2205.10536
    (over the batch).
    """

    name = "correlation"

    reads_answers = True

    def __init__(
        self,
        kind: Literal["pearson", "spearman"] = "pearson",
        dim: Literal["class", "batch"] = "class",
        weight: Weight = 0.5,
        temperature: Positive = 1.0,
        rank_width: Positive = 0.1,
        top_k: Annotated[int, Interval(3)] = 100,
    ):
        super().__init__(weight)
        self.kind, self.dim, self.top_k = kind, dim, top_k
        self.temperature, self.rank_width = temperature, rank_width
        self._answers, self._warned = Answers(), False

    def check(self, student: nn.Module, teacher: nn.Module | None) -> None:
        if has_head(student, "QUESTION_ANSWERING"):
            raise RMTKDError(SPANS)
        classes = getattr(student, "num_labels", None)  # of a head over labels; a vocabulary's has none
        choices = has_head(student, "MULTIPLE_CHOICE")  # as many as a row has
        if self.dim == "class" and isinstance(classes, int) and not choices:
            _refuse_vacuous(classes)

    def setup(self, student: nn.Module, teacher: nn.Module | None, projections: Mapping[str, torch.Tensor]) -> None:
        self._answers = Answers.of(student)

    def forward(self, step: DistillationStep) -> torch.Tensor:
        if "logits" not in step.student_outputs and "start_logits" in step.student_outputs:
            raise RMTKDError(SPANS)
        answers = self._answers.resolved(step)
        ours, theirs = answers.logits(step, "CorrelationDistance")
        unit = "samples"
        if ours.dim() == 3:
            ours, theirs, unit = answers.counted(ours, theirs, step)
        classes = ours.shape[-1]
        if self.dim == "class":
            _refuse_vacuous(classes)
        ours, theirs = self._predictions(answers, ours.float(), theirs.float())
        if self.dim == "batch":
            ours, theirs = ours.T, theirs.T  # (classes, samples)
            if ours.shape[1] < 3:
                self._warn_small(ours.shape[1])
                return ours.sum() * 0.0
        if not ours.numel():
            return ours.sum() * 0.0
        if self.kind == "spearman":
            # Standardised: unit deviation, so that one rank width fits all.
            spread = ours.shape[-1] ** 0.5
            ours, theirs = (soft_ranks(spread * direction(x), self.rank_width) for x in (ours, theirs))
        return (1 - pearson(ours, theirs)).mean() * step.share(unit)

    def _predictions(
        self, answers: Answers, ours: torch.Tensor, theirs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (n, classes) each -> what is correlated, (n, classes or top_k)."""
        if answers.is_regression(ours):
            return ours, theirs
        if ours.shape[-1] > self.top_k:
            largest = theirs if self.dim == "class" else F.softmax(theirs, -1).mean(0).expand_as(theirs)
            places = largest.topk(self.top_k, dim=-1).indices
            ours, theirs = ours.gather(-1, places), theirs.gather(-1, places)
        if answers.problem == "multi_label_classification":
            return torch.sigmoid(ours / self.temperature), torch.sigmoid(theirs / self.temperature)
        return F.softmax(ours / self.temperature, -1), F.softmax(theirs / self.temperature, -1)

    def _warn_small(self, samples: int) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "CorrelationDistance(dim='batch'): %d sample(s) in a micro-batch, at least 3 are needed; it "
                "contributes nothing. Raise per_device_train_batch_size.",
                samples,
            )


def _refuse_vacuous(classes: int) -> None:
    if classes < 3:
        raise RMTKDError(
            f"CorrelationDistance(dim='class') over {classes} class(es): two numbers always correlate perfectly, so "
            "its gradient is zero. Use dim='batch' (each class over the samples), or KLDivergence."
        )
