"""What student and teacher answer, compared position by position in fp32: the part that all divergences share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import RMTKDError
from ...models import has_head, shifts_labels
from ..counts import answered, answers_that_count
from ..signatures import named_inputs
from ..step import DistillationStep


__all__ = ["Answers", "Divergence", "has_head", "log_softened", "shifts_labels", "softened"]

# (log p teacher, log q student), each (..., classes) fp32 -> (...)
Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

SPANS = ("start_logits", "end_logits")
LOWEST = -1e30  # stands for log 0: finite, because 0 * -inf is NaN, in the loss or in its gradient


def log_softened(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Finite log-probabilities in fp32, (..., classes)."""
    return F.log_softmax(logits.float() / temperature, -1).clamp_min(LOWEST)


def softened(ours: torch.Tensor, theirs: torch.Tensor, divergence: Divergence, temperature: float) -> torch.Tensor:
    """T^2 times the divergence of softened answers, (..., classes) logits each -> (...) fp32."""
    return divergence(log_softened(theirs, temperature), log_softened(ours, temperature)) * temperature**2


def labels_a_decoder(model: nn.Module) -> bool:
    """Whether labels belong to the decoder of an encoder-decoder: not where its encoder alone classifies tokens."""
    return bool(getattr(model.config, "is_encoder_decoder", False)) and "decoder_input_ids" in named_inputs(model)


@dataclass(frozen=True)
class Answers:
    """Reads the logits of a pair of models as the student's config says they are meant.

    - classification and multiple choice, logits (batch, classes): mean over the batch;
    - several labels at once (`problem_type="multi_label_classification"`, or no problem type and one fractional label
      a class, from which transformers infers it too): sum over the labels, each a distribution over yes and no;
    - one output (`num_labels=1`: regression, unless the problem type says several labels), of samples or tokens: mean
      squared error to the teacher's output, temperature unused;
    - token tasks and language models, logits (batch, tokens, classes): mean over the positions whose label is not -100
      (labels shifted by one for causal models) and that the attention mask does not call padding, or over the unmasked
      tokens where there are no labels (of causal models: those that another follows). Other positions are dropped
      before anything is computed: their value, NaN included, cannot enter;
    - question answering, start_logits and end_logits (batch, tokens): mean of both over unmasked positions.

    A class with a logit of -inf has probability 0 and contributes nothing.
    """

    problem: str | None = None
    shifted: bool = False
    decoding: bool = False

    @classmethod
    def of(cls, student: nn.Module) -> Answers:
        return cls(getattr(student.config, "problem_type", None), shifts_labels(student), labels_a_decoder(student))

    def resolved(self, step: DistillationStep) -> Answers:
        """Itself, with the problem that fractional labels (batch, classes) imply where the config names none."""
        labels = step.inputs.get("labels")
        several = torch.is_tensor(labels) and labels.is_floating_point() and labels.dim() == 2 and labels.shape[1] > 1
        if self.problem is None and several:
            return dataclasses.replace(self, problem="multi_label_classification")
        return self

    def compare(self, step: DistillationStep, divergence: Divergence, temperature: float, who: str) -> torch.Tensor:
        """T^2 times the mean divergence of the softened answers, as this micro-batch's part of the accumulated batch.

        Args:
            who: name of the objective, for error messages.

        Raises:
            RMTKDError: no logits, or logits of different shapes.
        """

        def soft(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            return softened(ours, theirs, divergence, temperature)

        student, teacher = step.student_outputs, step.teacher_outputs
        if not isinstance(teacher, Mapping):
            raise RMTKDError(
                f"The teacher returned a {type(teacher).__name__}; {who} reads its answers by name. Expected a "
                "mapping, {'logits': ...}, as models of transformers return it."
            )
        if SPANS[0] in student:
            parts = [soft(*self._masked_span(student[n], teacher[n], step.mask)).mean() for n in SPANS]
            return 0.5 * sum(parts) * step.share("samples")
        ours, theirs = self.logits(step, who)
        if ours.dim() == 3:
            ours, theirs, unit = self.counted(ours, theirs, step)
            if self.is_regression(ours):
                values = (ours.float() - theirs.float()).square().mean(-1)
            else:
                values = soft(ours, theirs)
            # No position at all in this micro-batch: zero, still attached to the graph.
            return values.sum() / max(values.numel(), 1) * step.share(unit)
        problem = self.resolved(step).problem
        if self.is_regression(ours):
            return F.mse_loss(ours.float(), theirs.float()) * step.share("samples")
        if problem == "multi_label_classification":
            # A Bernoulli with logit z is a softmax over (z, 0).
            ours, theirs = (torch.stack((z.float(), torch.zeros_like(z.float())), dim=-1) for z in (ours, theirs))
            return soft(ours, theirs).sum(-1).mean() * step.share("samples")
        return soft(ours, theirs).mean() * step.share("samples")

    def is_regression(self, logits: torch.Tensor) -> bool:
        if self.problem == "multi_label_classification":  # of one label
            return False
        return logits.shape[-1] == 1 or self.problem == "regression"

    def logits(self, step: DistillationStep, who: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(student, teacher), (batch, classes) or (batch, tokens, classes)."""
        student, teacher = step.student_outputs, step.teacher_outputs
        if "logits" not in student or "logits" not in teacher:
            raise RMTKDError(
                f"{who} needs logits; the student returned {', '.join(student)}, the teacher {', '.join(teacher)}. "
                f"Use a model with a head on both sides, or leave {who} out of the objectives."
            )
        ours, theirs = student["logits"], teacher["logits"]
        if ours.shape != theirs.shape:
            raise RMTKDError(
                f"Logits of the student are {tuple(ours.shape)}, of the teacher {tuple(theirs.shape)}; expected the "
                "same. Both models need one vocabulary and one label set."
            )
        if ours.dim() not in (2, 3):
            raise RMTKDError(
                f"Logits of shape {tuple(ours.shape)}: expected (batch, classes) or (batch, tokens, classes)."
            )
        return ours, theirs

    def counted(
        self, ours: torch.Tensor, theirs: torch.Tensor, step: DistillationStep
    ) -> tuple[torch.Tensor, torch.Tensor, str]:
        """(batch, tokens, classes) each -> those of the positions that count, (n, classes), and the unit they are
        counted in."""
        if self.shifted:
            ours, theirs = ours[:, :-1], theirs[:, :-1]
        chosen = self.compared(step.inputs, step.mask, ours.shape[:2])
        if chosen is not None:
            return ours[chosen], theirs[chosen], "answers"
        return ours.flatten(0, 1), theirs.flatten(0, 1), "answers" if "input_ids" in step.inputs else "samples"

    def compared(self, inputs: Mapping[str, Any], mask: torch.Tensor | None, shape: torch.Size) -> torch.Tensor | None:
        """Bool (batch, tokens), one position shorter for causal models: which answers are compared; None: all of them.

        Args:
            mask: `padding_mask` of the inputs.
            shape: (batch, tokens) of the answers.
        """
        mask = None if mask is None or self.decoding else answered(mask, self.shifted)
        for chosen in (answers_that_count(inputs, self.shifted, self.decoding), mask):
            if chosen is not None and chosen.shape == shape:
                return chosen
        return None

    def _masked_span(
        self, ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, tokens) logits over positions, padding pushed out of the softmax."""
        ours, theirs = ours.float(), theirs.float()
        if mask is None:
            return ours, theirs
        # The same on both sides, so padding contributes exactly 0.
        return ours.masked_fill(~mask, LOWEST), theirs.masked_fill(~mask, LOWEST)
