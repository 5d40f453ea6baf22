"""Trainer room: stages, checkpoints, and the swap of the architecture inside training."""

from __future__ import annotations

from ..checkpoints import newest_checkpoint
from .arguments import RMTKDTrainingArguments
from .loop import RMTKDLoop
from .mixin import RMTKDMixin
from .stages import Stage, stage_table
from .trainer import RMTKDSeq2SeqTrainer, RMTKDTrainer


__all__ = [
    "RMTKDLoop",
    "RMTKDMixin",
    "RMTKDSeq2SeqTrainer",
    "RMTKDTrainer",
    "RMTKDTrainingArguments",
    "Stage",
    "newest_checkpoint",
    "stage_table",
]
