"""Which columns of a batch reach whom: the teacher may read what the student does not take. Knows no trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..distillation import Teacher
from ..distillation.signatures import TOKEN_TYPES, named_inputs, taken
from ..errors import RMTKDError


__all__ = ["Columns"]


@dataclass(frozen=True)
class Columns:
    """Sorts the columns of batches.

    Attributes:
        model: the student.
        teacher: a teacher that was passed in; None where the student teaches itself, and reads what it takes.
        label_names: entries that are labels.
        named_only: columns that the student's forward does not name would have been dropped without the teacher
            (`remove_unused_columns`).
        own_loss: the task's loss is computed by code of the user's or a library's, which may read columns that no
            model takes.
    """

    model: nn.Module
    teacher: Teacher | None = None
    label_names: Iterable[str] = ("labels",)
    named_only: bool = False
    own_loss: bool = False

    def for_student(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch without what is there for the teacher alone."""
        if self.teacher is None:
            return inputs
        inputs = self.teacher.strip(inputs)
        own = set(named_inputs(self.model)) if self.named_only else taken(self.model)
        if own is None:
            return inputs
        # Cached answers were given to them, too, and name no column.
        return _without(inputs, {*self.teacher.columns, TOKEN_TYPES} - own - set(self.label_names))

    def for_calibration(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """As `for_student`, also without columns that are there for a loss of the user's own alone.

        Raises:
            RMTKDError: nothing is left.
        """
        inputs, own = self.for_student(inputs), taken(self.model) or set(named_inputs(self.model))
        if not own or not self.own_loss:
            return inputs
        kept = _without(inputs, set(inputs) - own - set(self.label_names))
        if inputs and not set(kept) - set(self.label_names):
            raise RMTKDError(
                f"A batch holds {', '.join(inputs)}: nothing that {type(self.model).__name__} takes, so that no cut "
                "can be calibrated on it. Where the trainer makes the model's inputs by itself, narrow the model with "
                "optimum_rmtkd.narrow first, and train the result."
            )
        return kept


def _without(inputs: Mapping[str, Any], names: set[str]) -> Mapping[str, Any]:
    if not names & set(inputs):
        return inputs
    return {name: value for name, value in inputs.items() if name not in names}
