"""Divergences between the answers of student and teacher."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import RMTKDError
from ..step import DistillationStep
from .base import DistillationObjective, register_objective


__all__ = ["KLDivergence"]

IGNORED = -100


@register_objective
class KLDivergence(DistillationObjective):
    """T^2 KL(p_teacher || p_student) of the softened answers, in fp32.

    - classification, logits (batch, classes): mean over the batch;
    - several labels at once (`problem_type="multi_label_classification"`): sum over the labels of the Bernoulli KLs;
    - one label (`num_labels=1`: regression): mean squared error to the teacher's output, temperature unused;
    - token tasks and language models, logits (batch, tokens, classes): mean over the positions whose label is not -100
      (labels shifted by one for causal models), or over the unmasked tokens where there are no labels. Other positions are
      dropped before anything is computed: their value, NaN included, cannot enter;
    - question answering, start_logits and end_logits (batch, tokens): mean of both over unmasked positions.

    Reference: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531, section 2.
    """

    name = "kl"

    def __init__(self, weight: float = 0.5, temperature: float = 1.0):
        super().__init__(weight)
        if not temperature > 0:
            raise RMTKDError(f"KLDivergence(temperature={temperature}): expected a number above 0.")
        self.temperature = float(temperature)
        self._problem, self._num_labels, self._shifted = None, None, False

    def setup(self, student: nn.Module, teacher: nn.Module | None, projections: Mapping[str, torch.Tensor]) -> None:
        config = student.config
        self._problem = getattr(config, "problem_type", None)
        self._num_labels = getattr(config, "num_labels", None)
        encoder_decoder = getattr(config, "is_encoder_decoder", False)
        self._shifted = getattr(student, "loss_type", None) == "ForCausalLM" and not encoder_decoder

    def forward(self, step: DistillationStep) -> torch.Tensor:
        student, teacher = step.student_outputs, step.teacher_outputs
        if "start_logits" in student:
            return 0.5 * sum(self._span(student[n], teacher[n], step.mask) for n in ("start_logits", "end_logits"))
        if "logits" not in student or "logits" not in teacher:
            raise RMTKDError(
                f"KLDivergence needs logits; the student returned {', '.join(student)}, the teacher {', '.join(teacher)}. "
                "Use a model with a head on both sides, or leave KLDivergence out of the objectives."
            )
        ours, theirs = student["logits"], teacher["logits"]
        if ours.shape != theirs.shape:
            raise RMTKDError(
                f"Logits of the student are {tuple(ours.shape)}, of the teacher {tuple(theirs.shape)}; expected the same. "
                "Both models need one vocabulary and one label set."
            )
        if ours.dim() == 3:
            return self._tokens(ours, theirs, step)
        if ours.dim() != 2:
            raise RMTKDError(
                f"Logits of shape {tuple(ours.shape)}: expected (batch, classes) or (batch, tokens, classes)."
            )
        return self._sequences(ours.float(), theirs.float())

    def _sequences(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        """(batch, classes) each -> scalar."""
        if ours.shape[-1] == 1 or self._problem == "regression":
            return F.mse_loss(ours, theirs)
        if self._problem == "multi_label_classification":
            # A Bernoulli with logit z is a softmax over (z, 0).
            ours, theirs = (torch.stack((z, torch.zeros_like(z)), dim=-1) for z in (ours, theirs))
            return self._kl(ours, theirs).sum(-1).mean()
        return self._kl(ours, theirs).mean()

    def _tokens(self, ours: torch.Tensor, theirs: torch.Tensor, step: DistillationStep) -> torch.Tensor:
        """(batch, tokens, classes) each -> scalar."""
        labels = step.inputs.get("labels")
        if torch.is_tensor(labels) and labels.shape == ours.shape[:2]:
            counted = labels != IGNORED
        else:
            counted = step.mask if step.mask is not None and step.mask.shape == ours.shape[:2] else None
        if self._shifted:
            ours, theirs = ours[:, :-1], theirs[:, :-1]
            counted = None if counted is None else counted[:, 1:]
        if counted is None:
            counted = torch.ones(ours.shape[:2], dtype=torch.bool, device=ours.device)
        divergence = self._kl(ours[counted].float(), theirs[counted].float())
        # No position at all in this micro-batch: zero, still attached to the graph.
        return divergence.sum() / max(divergence.numel(), 1)

    def _span(self, ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(batch, tokens) logits over positions -> scalar."""
        ours, theirs = ours.float(), theirs.float()
        if mask is not None:
            # Finite, because 0 * -inf is NaN; the same on both sides, so padding contributes exactly 0.
            low = torch.finfo(torch.float32).min / 4
            ours, theirs = ours.masked_fill(~mask, low), theirs.masked_fill(~mask, low)
        return self._kl(ours, theirs).mean()

    def _kl(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        """(..., classes) fp32 each -> (...), T^2 applied once."""
        log_q = F.log_softmax(ours / self.temperature, dim=-1)
        log_p = F.log_softmax(theirs / self.temperature, dim=-1)
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * self.temperature**2
