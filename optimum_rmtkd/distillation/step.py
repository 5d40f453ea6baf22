"""What one training step offers to the objectives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


__all__ = ["DistillationStep"]


@dataclass(frozen=True)
class DistillationStep:
    """One (micro-)batch seen by student and teacher.

    Attributes:
        inputs: the collated batch, labels included.
        student_outputs, teacher_outputs: what the models returned (mappings with `logits`, ...); None where not run.
        student_features, teacher_features: outputs of the requested modules by module path.
        mask: bool, (batch, tokens), True at real tokens; None where the inputs carry no token mask.
        num_items_in_batch: labels in the whole accumulated batch, where the Trainer counted them. The objectives of this
            package are means over the micro-batch and leave it alone.
        task_loss: the Trainer's own task loss (label smoothing and `compute_loss_func` honoured), scalar; None: read
            `student_outputs["loss"]`.
    """

    inputs: Mapping[str, Any]
    student_outputs: Mapping[str, Any] | None = None
    teacher_outputs: Mapping[str, Any] | None = None
    student_features: Mapping[str, torch.Tensor] = field(default_factory=dict)
    teacher_features: Mapping[str, torch.Tensor] = field(default_factory=dict)
    mask: torch.Tensor | None = None
    num_items_in_batch: torch.Tensor | int | None = None
    task_loss: torch.Tensor | None = None


def token_mask(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """`attention_mask` as bool (batch, tokens), or None where there is none of that shape (images, packed masks)."""
    mask = inputs.get("attention_mask")
    return mask.bool() if torch.is_tensor(mask) and mask.dim() == 2 else None
