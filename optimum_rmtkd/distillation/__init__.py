"""Distillation room: objectives, teachers, feature capture. It never cuts a model and knows nothing of the Trainer."""

from __future__ import annotations

from .cached import CachedTeacher, cache_answers
from .ensemble import WeightedTeachers, as_teacher
from .features import capture
from .objectives import (
    AttentionRelationLoss,
    CorrelationDistance,
    DistillationObjective,
    FeatureRequest,
    HiddenStateLoss,
    JensenShannonDivergence,
    KLDivergence,
    ProjectedFeatureLoss,
    SkewKLDivergence,
    TaskLoss,
    TensorAlignment,
    build_objectives,
    default_objectives,
    register_objective,
)
from .online import OnlineTeacher
from .policies import AdaptiveOffPolicy, OnPolicy
from .projections import compose
from .step import DistillationStep
from .subspaces import (
    AutoencoderProjection,
    MarchenkoPasturProjection,
    PCAProjection,
    RandomProjection,
    SubspaceProjection,
    register_projection,
)
from .teachers import EMATeacher, FrozenTeacher, SnapshotTeacher, Teacher, check_compatible, fingerprint
from .transforms import BatchTransform, EmbeddingMixup, build_transforms, register_transform


__all__ = [
    "AdaptiveOffPolicy",
    "AttentionRelationLoss",
    "AutoencoderProjection",
    "BatchTransform",
    "CachedTeacher",
    "CorrelationDistance",
    "DistillationObjective",
    "DistillationStep",
    "EMATeacher",
    "EmbeddingMixup",
    "FeatureRequest",
    "FrozenTeacher",
    "HiddenStateLoss",
    "JensenShannonDivergence",
    "KLDivergence",
    "MarchenkoPasturProjection",
    "OnPolicy",
    "OnlineTeacher",
    "PCAProjection",
    "ProjectedFeatureLoss",
    "RandomProjection",
    "SkewKLDivergence",
    "SnapshotTeacher",
    "SubspaceProjection",
    "TaskLoss",
    "Teacher",
    "TensorAlignment",
    "WeightedTeachers",
    "as_teacher",
    "build_objectives",
    "build_transforms",
    "cache_answers",
    "capture",
    "check_compatible",
    "compose",
    "default_objectives",
    "fingerprint",
    "register_objective",
    "register_projection",
    "register_transform",
]
