"""Which columns of a batch reach whom: the teacher may read what the student does not take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..distillation.signatures import TOKEN_TYPES, named_inputs, taken


if TYPE_CHECKING:
    from .trainer import RMTKDTrainer


__all__ = ["for_calibration", "for_student", "kept_for_teacher"]

TAUGHT = ("training", "calibration")  # what transformers and we call the data that a teacher sees as well


@contextmanager
def kept_for_teacher(trainer: RMTKDTrainer, description: str | None) -> Iterator[None]:
    """While open, the columns that a given teacher reads are not "unused" in data that it sees."""
    given = trainer.staging.given_teacher
    if given is None or (description or TAUGHT[0]).lower() not in TAUGHT:
        yield
        return
    trainer._set_signature_columns_if_needed()
    own = trainer._signature_columns
    trainer._signature_columns = own + [name for name in given.columns if name not in own]
    try:
        yield
    finally:
        trainer._signature_columns = own


def for_student(trainer: RMTKDTrainer, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch without what is there for the teacher alone."""
    given = trainer.staging.given_teacher
    if given is None:
        return inputs
    inputs = given.strip(inputs)
    # Without the teacher `remove_unused_columns` would have dropped what the student does not name. Where the user
    # has set it off, everything goes to the student that its forward can take.
    own = set(named_inputs(trainer.model)) if trainer.args.remove_unused_columns else taken(trainer.model)
    if own is None:
        return inputs
    # Cached answers were given to them, too, and name no column.
    foreign = {*given.columns, TOKEN_TYPES} - own - set(trainer.label_names)
    return _without(inputs, foreign)


def for_calibration(trainer: RMTKDTrainer, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """As `for_student`, also without columns that are there for a `compute_loss` of the user's own alone."""
    inputs, own = for_student(trainer, inputs), taken(trainer.model) or set(named_inputs(trainer.model))
    if not own or not trainer.overrides_loss:
        return inputs
    return _without(inputs, set(inputs) - own - set(trainer.label_names))


def _without(inputs: Mapping[str, Any], names: set[str]) -> Mapping[str, Any]:
    if not names & set(inputs):
        return inputs
    return {name: value for name, value in inputs.items() if name not in names}
