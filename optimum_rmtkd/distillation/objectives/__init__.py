"""Additive terms of the distillation loss."""

from __future__ import annotations

from .alignment import TensorAlignment, fix_gauge
from .base import (
    DistillationObjective,
    FeatureRequest,
    build_objectives,
    objective_class,
    objective_names,
    register_objective,
)
from .correlation import CorrelationDistance
from .divergences import JensenShannonDivergence, KLDivergence, SkewKLDivergence
from .hidden import HiddenStateLoss
from .projected import ProjectedFeatureLoss
from .relations import AttentionRelationLoss
from .task import TaskLoss


__all__ = [
    "AttentionRelationLoss",
    "CorrelationDistance",
    "ProjectedFeatureLoss",
    "TensorAlignment",
    "fix_gauge",
    "DistillationObjective",
    "FeatureRequest",
    "HiddenStateLoss",
    "JensenShannonDivergence",
    "KLDivergence",
    "SkewKLDivergence",
    "TaskLoss",
    "build_objectives",
    "default_objectives",
    "objective_class",
    "objective_names",
    "register_objective",
]


def default_objectives(config) -> list[DistillationObjective]:
    """The recipe's three terms (`RMTKDConfig.task_weight`, `kl_weight`, `hidden_weight`); a weight of 0 leaves one
    out."""
    candidates = (
        TaskLoss(weight=config.task_weight),
        KLDivergence(weight=config.kl_weight, temperature=config.temperature),
        HiddenStateLoss(weight=config.hidden_weight),
    )
    return [objective for objective in candidates if objective.weight > 0]
