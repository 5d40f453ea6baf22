"""Divergences between the answers of student and teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from ...validation import Interval, Positive
from ..sparse import SparseLogits, sparse_kl
from ..step import DistillationStep
from .answers import Answers, log_softened, softened
from .base import DistillationObjective, register_objective
from .schedules import Weight


__all__ = [
    "JensenShannonDivergence",
    "KLDivergence",
    "SkewKLDivergence",
    "jensen_shannon",
    "kl_divergence",
    "log_mixture",
    "skew_kl",
]


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of finite log-probabilities (..., classes) -> (...). Where exp(log_p) is 0 the class contributes
    0."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def log_mixture(log_p: torch.Tensor, log_q: torch.Tensor, share: float) -> torch.Tensor:
    """log(share p + (1 - share) q), share in [0, 1], without leaving log-space."""
    if share in (0.0, 1.0):
        return log_p if share else log_q
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def jensen_shannon(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; KL(p || q) for beta=0, KL(q || p) for
    beta=1."""
    if beta in (0.0, 1.0):
        return kl_divergence(log_q, log_p) if beta else kl_divergence(log_p, log_q)
    mixture = log_mixture(log_p, log_q, beta)
    return beta * kl_divergence(log_p, mixture) + (1 - beta) * kl_divergence(log_q, mixture)


def skew_kl(log_p: torch.Tensor, log_q: torch.Tensor, alpha: float) -> torch.Tensor:
    """KL(p || alpha p + (1 - alpha) q), at most -log(alpha)."""
    return kl_divergence(log_p, log_mixture(log_p, log_q, alpha))


class _AnswerDivergence(DistillationObjective):
    """An objective that is a divergence of the softened answers; `Answers` says over what it is a mean."""

    reads_answers = True
    logits = "by_position"

    def __init__(self, weight: Weight, temperature: Positive):
        super().__init__(weight)
        self.temperature = temperature
        self._answers = Answers()

    def setup(self, student: nn.Module, teacher: nn.Module | None, projections: Mapping[str, torch.Tensor]) -> None:
        self._answers = Answers.of(student)

    def forward(self, step: DistillationStep) -> torch.Tensor:
        if step.stream is not None:
            return step.stream.mean(self) * step.share("answers")
        return self._answers.compare(step, self.divergence, self.temperature, type(self).__name__)

    def by_position(
        self, ours: torch.Tensor, theirs: torch.Tensor | SparseLogits | None, labels: torch.Tensor | None
    ) -> torch.Tensor:
        theirs = theirs.dense() if isinstance(theirs, SparseLogits) else theirs
        return softened(ours, theirs, self.divergence, self.temperature)

    def divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@register_objective
class KLDivergence(_AnswerDivergence):
    """T^2 KL(p_teacher || p_student) of the softened answers, in fp32; T^2 KL(p_student || p_teacher) with `reverse`.

    Forward covers all that the teacher considers; reverse leaves out what the student cannot afford and sharpens the
    rest. Over what it is a mean, and what happens for regression: `Answers`.

    References: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531, section 2;
    reverse: Gu et al., "MiniLLM", arXiv 2306.08543.
    """

    name = "kl"

    def __init__(self, weight: Weight = 0.5, temperature: Positive = 1.0, reverse: bool = False):
        super().__init__(weight, temperature)
        self.reverse = reverse

    def divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return kl_divergence(log_q, log_p) if self.reverse else kl_divergence(log_p, log_q)

    def by_position(
        self, ours: torch.Tensor, theirs: torch.Tensor | SparseLogits | None, labels: torch.Tensor | None
    ) -> torch.Tensor:
        if self.reverse or not isinstance(theirs, SparseLogits):
            return super().by_position(ours, theirs, labels)
        return sparse_kl(theirs, log_softened(ours, self.temperature), self.temperature) * self.temperature**2


@register_objective
class JensenShannonDivergence(_AnswerDivergence):
    """T^2 (beta KL(p || m) + (1 - beta) KL(q || m)), m = beta p + (1 - beta) q, p teacher, q student.

    Bounded by the entropy of (beta, 1 - beta): log 2 at beta = 0.5. Near the ends it fades like beta (1 - beta) while
    the ends themselves are KL(p || q) at 0 and KL(q || p) at 1; `rescale` divides by beta (1 - beta) in between and
    joins them.

    Reference: Agarwal et al., "On-policy distillation of language models" (GKD), arXiv 2306.13649, section 2.
    """

    name = "jensen_shannon"

    def __init__(
        self,
        weight: Weight = 0.5,
        beta: Annotated[float, Interval(0, 1)] = 0.5,
        temperature: Positive = 1.0,
        rescale: bool = False,
    ):
        super().__init__(weight, temperature)
        self.beta, self.rescale = beta, rescale

    def divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        value = jensen_shannon(log_p, log_q, self.beta)
        return value / (self.beta * (1 - self.beta)) if self.rescale and 0 < self.beta < 1 else value


@register_objective
class SkewKLDivergence(_AnswerDivergence):
    """T^2 KL(p || alpha p + (1 - alpha) q), p teacher, q student; with `reverse` both change places.

    Bounded by -log(alpha), 2.30 at the default: stable. The price: where the student misses much of the teacher's mass
    the gradient vanishes, so a class that collapsed may stay collapsed. Keep the task loss beside it.

    Reference: Ko et al., "DistiLLM", arXiv 2402.03898, section 3.1.
    """

    name = "skew_kl"

    def __init__(
        self,
        weight: Weight = 0.5,
        alpha: Annotated[float, Interval(0, 1, "neither", "a share (0 is KLDivergence, 1 always 0)")] = 0.1,
        temperature: Positive = 1.0,
        reverse: bool = False,
    ):
        super().__init__(weight, temperature)
        self.alpha, self.reverse = alpha, reverse

    def divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return skew_kl(log_q, log_p, self.alpha) if self.reverse else skew_kl(log_p, log_q, self.alpha)
