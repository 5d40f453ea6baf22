"""Objectives, transforms and what is trained beside the student, made ready for a pair of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ..errors import RMTKDError
from . import checkpoint
from .data import isolated_rng


if TYPE_CHECKING:
    from .trainer import RMTKDTrainer


__all__ = ["fitted_state", "make_ready", "transforms_state"]


def make_ready(
    trainer: RMTKDTrainer, projections: Mapping[str, torch.Tensor], restored: Mapping[str, torch.Tensor] | None
) -> None:
    """Set the objectives up for the trainer's model and its teacher; fit those that look at data first.

    Args:
        projections: see `DistillationObjective.setup`.
        restored: `fitted_state` and `transforms_state` of an earlier run, which take the place of fitting.

    Raises:
        RMTKDError: models that an objective cannot work with, or nothing left to compare.
    """
    model, teacher = trainer.model, trainer.staging.teacher
    for objective in trainer.objectives:
        objective.to(trainer.args.device)
        objective.setup(model, teacher.model, projections)
    objectives = trainer.distiller.objectives
    if not objectives:
        raise RMTKDError("No objective has anything to compare for these models; add TaskLoss or KLDivergence.")
    if restored is None:
        _fit(trainer)
        trainer.extras.collect()
        return
    for objective in objectives:
        objective.load_tensors(_own(trainer, f"objective/{objective.label}", restored))
    for number, transform in enumerate(trainer.transforms):
        if state := checkpoint.subset(f"transform/{number}", restored):
            transform.load_state_dict(state)
    trainer.extras.collect()
    trainer.extras.load_state_dict(checkpoint.subset("extra", restored))


def fitted_state(trainer: RMTKDTrainer) -> dict[str, torch.Tensor]:
    """What objectives and the parts trained beside the student need in a resumed run: the same on all processes."""
    tensors = checkpoint.flatten("extra", trainer.extras.state_dict())
    for objective in trainer.objectives:
        tensors |= checkpoint.flatten(f"objective/{objective.label}", objective.state_dict())
    return tensors


def transforms_state(trainer: RMTKDTrainer) -> dict[str, torch.Tensor]:
    """What this process's transforms need: each process transforms its own batches."""
    tensors: dict[str, torch.Tensor] = {}
    for number, transform in enumerate(trainer.transforms):
        tensors |= checkpoint.flatten(f"transform/{number}", transform.state_dict())
    return tensors


def _own(trainer: RMTKDTrainer, prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(trainer.args.device) for name, tensor in checkpoint.subset(prefix, tensors).items()}


@torch.no_grad()
def _fit(trainer: RMTKDTrainer) -> None:
    """Let those objectives that ask for it see the teacher on the calibration data, then one batch of both models."""
    distiller, seed = trainer.distiller, trainer.rmtkd_config.seed
    watching = [objective for objective in distiller.objectives if objective.observes]
    if not watching:
        return
    with isolated_rng(seed):
        for batch in trainer.calibration_batches(strip=False):
            step = distiller.teacher_step(batch, watching)
            for objective in watching:
                objective.observe(step)
    for objective in watching:
        objective.finish(lambda tensor: trainer.accelerator.reduce(tensor, reduction="sum"))
    with isolated_rng(seed):
        step = distiller.pair_step(next(iter(trainer.calibration_batches(strip=False))), watching)
    for objective in watching:
        objective.prepare(step)
