"""The loss of the task itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...errors import RMTKDError
from ..counts import token_labels
from ..sparse import SparseLogits
from ..step import DistillationStep
from .base import DistillationObjective, register_objective
from .schedules import Weight


__all__ = ["TaskLoss"]


@register_objective
class TaskLoss(DistillationObjective):
    """What the student would be trained with alone: the model's loss on the labels.

    The model's loss is a mean over the micro-batch, of samples or, where there is a label a token, of labels; it is
    weighed so that the accumulated batch gives the mean over all of them.
    """

    name = "task"
    needs_teacher = False
    logits = "by_position"
    needs_labels = True

    def __init__(self, weight: Weight = 0.5):
        super().__init__(weight)

    def forward(self, step: DistillationStep) -> torch.Tensor:
        loss = step.task_loss
        if loss is None and step.stream is not None and step.stream.labels is not None:
            return step.stream.mean(self) * step.share("labels")
        if loss is None:
            loss = step.student_outputs.get("loss")
        if loss is None:
            raise RMTKDError(
                f"The student returned {', '.join(step.student_outputs)} for inputs {', '.join(step.inputs)}: no "
                "loss. Give labels, or leave TaskLoss out of the objectives to distil on unlabelled data."
            )
        logits = (step.student_outputs or {}).get("logits")
        counted = token_labels(step.inputs, step.shifted)
        if counted is None or logits is None or logits.dim() != 3:
            return loss.float() * step.share("samples")
        if not bool(counted.any()):
            return logits[:0].float().sum()  # a mean over no label is NaN; no value, -inf and NaN, enters
        return loss.float() * step.share("labels")

    def by_position(
        self, ours: torch.Tensor, theirs: torch.Tensor | SparseLogits | None, labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Cross-entropy, which language models are trained with."""
        return F.cross_entropy(ours.float(), labels, reduction="none")
