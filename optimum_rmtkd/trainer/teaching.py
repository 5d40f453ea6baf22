"""Whether a teacher that was passed in can teach this student. Knows models and objectives, no trainer and no run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..distillation import (
    CachedTeacher,
    EMATeacher,
    FrozenTeacher,
    SnapshotTeacher,
    Teacher,
    as_teacher,
    check_compatible,
    fingerprint,
)
from ..distillation.cached import CLASSES
from ..errors import RMTKDError
from .swap import made_whole
from .tutor import Tutor


__all__ = ["accept_teacher", "check_cached"]

logger = logging.getLogger(__name__)


def accept_teacher(tutor: Tutor, teacher: Any, model: nn.Module, device: torch.device | str) -> bool:
    """Give a tutor what was passed as `teacher_model`, or refuse it; False where it is the very model that is cut.

    Raises:
        RMTKDError: no teacher at all, of other labels or another vocabulary, one that would move with the student, or
            no objective that could use it.
    """
    given = as_teacher(_all_whole(teacher))
    if any(isinstance(member, EMATeacher) for member in getattr(given, "members", [given])):
        raise RMTKDError(
            "teacher_model is an EMATeacher: an average has to be made anew at every cut and lies in the checkpoints. "
            "Leave teacher_model out and set RMTKDConfig(teacher='ema', ema_decay=...)."
        )
    for member in given.models:
        check_compatible(model, member)
    itself = given.origins == (fingerprint(model),)
    if itself and type(given) in (FrozenTeacher, SnapshotTeacher):  # a subclass may answer otherwise
        logger.info("teacher_model is the model that is cut: taken as teacher='initial'.")
        return False
    if any(member is model for member in given.models):
        raise RMTKDError(
            "The model that is trained is one of its own teachers: they would change with it. Pass a copy, "
            "SnapshotTeacher(model)."
        )
    for member in given.models:
        member.to(device)
    tutor.given, tutor.taught_by_itself = given, itself
    tutor.described = json.dumps(given.describe(), default=str)
    if not itself:
        _drop_projected(tutor, type(teacher).__name__)
    return True


def _all_whole(teacher: Any) -> Any:
    """The same, its models whole on every process."""
    for part in teacher if isinstance(teacher, (list, tuple)) else [teacher]:
        if isinstance(part, nn.Module):
            made_whole(part)
        elif isinstance(part, (list, tuple)):
            _all_whole(part)
    return teacher


def _drop_projected(tutor: Tutor, teacher: str) -> None:
    """Leave out the objectives that need a projection between the two streams."""
    kept = [objective for objective in tutor.objectives if not objective.needs_projection]
    dropped = ", ".join(type(o).__name__ for o in tutor.objectives if o.needs_projection)
    if dropped:
        logger.warning(
            "%s is dropped: the student's residual stream is a projection of its own uncut model's, and no projection "
            "to the stream of the given teacher_model (%s) is known. The other objectives stay; ProjectedFeatureLoss "
            "compares hidden states of any two models.",
            dropped,
            teacher,
        )
        tutor.objectives = kept
    if not kept:
        raise RMTKDError(f"No objective is left after {dropped}; add TaskLoss or KLDivergence.")


def check_cached(teacher: Teacher, model: nn.Module, first_row: Callable[[], Mapping[str, Any]]) -> None:
    """Cached answers carry no config; how many classes they are over is all that can be compared.

    Args:
        first_row: of the training data.

    Raises:
        RMTKDError: another number than the student's labels, or its vocabulary.
    """
    if not isinstance(teacher, CachedTeacher):
        return
    text, classes = model.config.get_text_config(), int(first_row()[CLASSES])
    known = {n: v for n in ("num_labels", "vocab_size") if (v := getattr(text, n, None)) is not None}
    if known and classes not in known.values():
        raise RMTKDError(
            f"The cached answers are over {classes} classes, the student has {known}; expected its number of labels "
            "or its vocabulary. Run cache_answers with a teacher of the student's labels and tokenizer."
        )
