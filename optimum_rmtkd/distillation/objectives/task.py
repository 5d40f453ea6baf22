"""The loss of the task itself."""

from __future__ import annotations

import torch

from ...errors import RMTKDError
from ..step import DistillationStep
from .base import DistillationObjective, register_objective


__all__ = ["TaskLoss"]


@register_objective
class TaskLoss(DistillationObjective):
    """What the student would be trained with alone: the model's loss on the labels."""

    name = "task"
    needs_teacher = False

    def __init__(self, weight: float = 0.5):
        super().__init__(weight)

    def forward(self, step: DistillationStep) -> torch.Tensor:
        if step.task_loss is not None:
            return step.task_loss.float()
        loss = step.student_outputs.get("loss")
        if loss is None:
            raise RMTKDError(
                f"The student returned {', '.join(step.student_outputs)} for inputs {', '.join(step.inputs)}: no loss. "
                "Give labels, or leave TaskLoss out of the objectives to distil on unlabelled data."
            )
        return loss.float()
