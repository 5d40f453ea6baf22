"""Distillation room: objectives, teachers, feature capture. It never cuts a model and knows nothing of the Trainer."""

from __future__ import annotations

from .features import capture
from .objectives import (
    DistillationObjective,
    FeatureRequest,
    HiddenStateLoss,
    KLDivergence,
    TaskLoss,
    build_objectives,
    default_objectives,
    register_objective,
)
from .projections import compose
from .step import DistillationStep
from .teachers import EMATeacher, FrozenTeacher, SnapshotTeacher, Teacher, check_compatible, fingerprint


__all__ = [
    "DistillationObjective",
    "DistillationStep",
    "EMATeacher",
    "FeatureRequest",
    "FrozenTeacher",
    "HiddenStateLoss",
    "KLDivergence",
    "SnapshotTeacher",
    "TaskLoss",
    "Teacher",
    "build_objectives",
    "capture",
    "check_compatible",
    "compose",
    "default_objectives",
    "fingerprint",
    "register_objective",
]
