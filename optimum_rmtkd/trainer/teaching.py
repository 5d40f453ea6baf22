"""Whether a teacher that was passed in can teach this student."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from ..distillation import (
    CachedTeacher,
    EMATeacher,
    FrozenTeacher,
    SnapshotTeacher,
    as_teacher,
    check_compatible,
    fingerprint,
)
from ..distillation.cached import CLASSES, AnswerCollator
from ..errors import RMTKDError
from .data import is_hf_dataset
from .staging import Staging


if TYPE_CHECKING:
    from .trainer import RMTKDTrainer


__all__ = ["accept_teacher"]

logger = logging.getLogger(__name__)


def accept_teacher(trainer: RMTKDTrainer, teacher: Any) -> None:
    """Take what was passed as `teacher_model`, or refuse it.

    Raises:
        RMTKDError: no teacher at all, of other labels or another vocabulary, one that would move with the student, or
            no objective that could use it.
    """
    given = as_teacher(teacher)
    if any(isinstance(member, EMATeacher) for member in getattr(given, "members", [given])):
        raise RMTKDError(
            "teacher_model is an EMATeacher: an average has to be made anew at every cut and lies in the checkpoints. "
            "Leave teacher_model out and set RMTKDConfig(teacher='ema', ema_decay=...)."
        )
    for model in given.models:
        check_compatible(trainer.model, model)
    itself = given.origins == (fingerprint(trainer.model),)
    if itself and type(given) in (FrozenTeacher, SnapshotTeacher):  # a subclass may answer otherwise
        logger.info("teacher_model is the model that is cut: taken as teacher='initial'.")
        trainer.rmtkd_config = trainer.rmtkd_config.replace(teacher="initial")
        trainer.staging = Staging(trainer)
        return
    if any(model is trainer.model for model in given.models):
        raise RMTKDError(
            "The model that is trained is one of its own teachers: they would change with it. Pass a copy, "
            "SnapshotTeacher(model)."
        )
    for model in given.models:
        trainer._move_model_to_device(model, trainer.args.device)
    trainer.staging.given_teacher, trainer.staging.taught_by_itself = given, itself
    trainer.staging.given_description = json.dumps(given.describe(), default=str)
    if isinstance(given, CachedTeacher):
        _check_cached(trainer)
        trainer.data_collator = AnswerCollator(trainer.data_collator)
    if not itself:
        _drop_projected(trainer, type(teacher).__name__)


def _drop_projected(trainer: RMTKDTrainer, teacher: str) -> None:
    """Leave out the objectives that need a projection between the two streams."""
    kept = [objective for objective in trainer.objectives if not objective.needs_projection]
    dropped = ", ".join(type(o).__name__ for o in trainer.objectives if o.needs_projection)
    if dropped:
        logger.warning(
            "%s is dropped: the student's residual stream is a projection of its own uncut model's, and no projection "
            "to the stream of the given teacher_model (%s) is known. The other objectives stay; ProjectedFeatureLoss "
            "compares hidden states of any two models.",
            dropped,
            teacher,
        )
        trainer.objectives = kept
    if not kept:
        raise RMTKDError(f"No objective is left after {dropped}; add TaskLoss or KLDivergence.")


def _check_cached(trainer: RMTKDTrainer) -> None:
    """Cached answers carry no config; how many classes they are over is all that can be compared."""
    if not is_hf_dataset(trainer.train_dataset) or CLASSES not in (
        getattr(trainer.train_dataset, "column_names", None) or ()
    ):
        return
    row = trainer.train_dataset[0] if trainer.stream is None else trainer.stream.samples(1)[0]
    text, classes = trainer.model.config.get_text_config(), int(row[CLASSES])
    known = {n: v for n in ("num_labels", "vocab_size") if (v := getattr(text, n, None)) is not None}
    if known and classes not in known.values():
        raise RMTKDError(
            f"The cached answers are over {classes} classes, the student has {known}; expected its number of labels "
            "or its vocabulary. Run cache_answers with a teacher of the student's labels and tokenizer."
        )
