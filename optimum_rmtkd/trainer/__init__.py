"""Trainer room: stages, checkpoints, and the swap of the architecture inside training."""

from __future__ import annotations

from .arguments import RMTKDTrainingArguments
from .stages import Stage, stage_table
from .trainer import RMTKDTrainer


__all__ = ["RMTKDTrainer", "RMTKDTrainingArguments", "Stage", "stage_table"]
