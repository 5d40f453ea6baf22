"""What one training step offers to the objectives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..errors import RMTKDError
from .counts import UNITS, answers_that_count, count_units, token_labels
from .stream import AnswerStream


__all__ = ["DistillationStep"]


@dataclass(frozen=True)
class DistillationStep:
    """One (micro-)batch seen by student and teacher.

    Attributes:
        inputs: the collated batch, labels included.
        student_outputs, teacher_outputs: what the models returned (mappings with `logits`, ...); None where not run.
        student_features, teacher_features: outputs of the requested modules by module path.
        mask: bool, (batch, tokens), True at real tokens; None where the inputs carry no token mask. For multiple
            choice the choices are rows: (batch * choices, tokens).
        totals: (4,) samples, tokens, labels and answers (`counts.count_units`) of the whole accumulated batch over all
            processes; None: this batch stands for itself.
        parts: number of micro-batches (accumulation steps times processes) over which the trainer averages the losses.
        shifted: labels belong to the position before them (causal models).
        decoding: labels belong to the decoder of an encoder-decoder, whose tokens `mask` is not about.
        task_loss: the Trainer's own task loss (label smoothing and `compute_loss_func` honoured), scalar; None: read
            `student_outputs["loss"]`.
        progress: share of the training steps that are done, in [0, 1].
        stream: a language model's answers, a few positions at a time; the outputs of both models then hold the logits
            of the last position alone. None: the outputs hold what there is.
    """

    inputs: Mapping[str, Any]
    student_outputs: Mapping[str, Any] | None = None
    teacher_outputs: Mapping[str, Any] | None = None
    student_features: Mapping[str, torch.Tensor] = field(default_factory=dict)
    teacher_features: Mapping[str, torch.Tensor] = field(default_factory=dict)
    mask: torch.Tensor | None = None
    totals: torch.Tensor | None = None
    parts: int = 1
    shifted: bool = False
    decoding: bool = False
    task_loss: torch.Tensor | None = None
    progress: float = 0.0
    stream: AnswerStream | None = None

    def counted(self, decoder: bool) -> tuple[torch.Tensor | None, str]:
        """(bool (batch, tokens), unit): which positions of a feature count, and in what `share` counts them.

        Real tokens; in the decoder of an encoder-decoder those that answer for a label, where each token has one. None
        where neither is known.
        """
        if not decoder or token_labels(self.inputs, shifted=False) is None:
            return self.mask, "tokens"
        return answers_that_count(self.inputs, shifted=False, decoding=True), "answers"

    def share(self, unit: str) -> float:
        """Factor that turns a mean over this micro-batch into its part of the mean over the accumulated batch.

        The trainer averages the micro-batches' losses, so a mean over `unit` (one of `counts.UNITS`) of micro-batch m
        has to weigh n_m / N * parts: the sum of all parts divided by their number is then the mean over all N units,
        however the batch was split. 1 where no totals are known.
        """
        if unit not in UNITS:
            raise RMTKDError(f"share({unit!r}): expected one of {', '.join(UNITS)}.")
        if self.totals is None:
            return 1.0
        index = UNITS.index(unit)
        total = int(self.totals[index])
        mine = int(self._units[index])
        return mine * self.parts / total if total else 1.0

    @cached_property
    def _units(self) -> torch.Tensor:
        """(4,): counted once a step, each count waits for the device."""
        return count_units(self.inputs, self.shifted, self.decoding)
