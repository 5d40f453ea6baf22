"""Hooks of the optimizer and its schedule, which runs once a phase of the run."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from ...errors import RMTKDError
from ..schedule import factor_at, planned_steps, stretched
from ..swap import alike_rates, peak_rates, separate_cores


__all__ = ["ScheduleHooks", "count_anew", "follow_groups"]


class ScheduleHooks:
    """In front of a trainer: groups for the tensors of a reparameterization, and the learning rate of the phases.

    Attributes:
        schedule_is_known: it is a function of the step (a `LambdaLR`, as all of transformers' that look at no metric).
    """

    schedule_is_known = False

    def create_optimizer(self, model=None):
        """As the trainer's own; tensors of a reparameterization form the last group, without weight decay."""
        given = self.optimizer is not None
        made = super().create_optimizer() if model is None else super().create_optimizer(model)
        optimizer = self.optimizer if made is None else made  # an override may forget to return it
        if self._parts.reparameterization is not None and not given:
            separate_cores(optimizer, self.model, self._parts.reparameterization.lr_scale)
        return optimizer

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._follow_phases(max_steps)
        return prepared

    def _follow_phases(self, max_steps: int) -> None:
        """A schedule that is a function of the step runs once a phase of the run, whoever made it: transformers, a
        subclass, or the user (`optimizers=`)."""
        scheduler = self.lr_scheduler
        self.schedule_is_known = type(scheduler) is LambdaLR
        if self.schedule_is_known:  # one that was given is here again in a second training
            shapes = [getattr(shape, "whole_run", shape) for shape in scheduler.lr_lambdas]  # one a group
            scheduler.lr_lambdas = [self._in_phases(shape, planned_steps(shape, max_steps)) for shape in shapes]

    def _in_phases(self, shape, whole: int):
        # A plain function: of anything else the scheduler's state would hold the attributes.
        def factor(step: int) -> float:
            phases = self._host.run.pace.phases
            return factor_at(step, phases, stretched(shape, whole)) if phases else shape(step)

        factor.whole_run = shape
        return factor


def follow_groups(scheduler: Any) -> None:
    """A schedule follows the groups of its optimizer, which a cut may have exchanged for others.

    Raises:
        RMTKDError: another number of them, and a schedule of which it is not known what it would be for each.
    """
    if getattr(scheduler, "optimizer", None) is None:
        return
    rates = peak_rates(scheduler.optimizer)
    known = len(getattr(scheduler, "base_lrs", getattr(scheduler, "min_lrs", rates)))
    if len(rates) != known:
        shapes = getattr(scheduler, "lr_lambdas", ())
        if len({id(getattr(shape, "whole_run", shape)) for shape in shapes}) != 1:
            raise RMTKDError(
                f"The optimizer had {known} parameter groups, that of the reduced model has {len(rates)}, and "
                f"{type(scheduler).__name__} has a rate or a shape for each: the groups depend on the architecture. "
                "Take one schedule for all (lr_scheduler_type, a LambdaLR), or groups that do not."
            )
        scheduler.lr_lambdas = [shapes[0]] * len(rates)
    if not alike_rates(rates, getattr(scheduler, "base_lrs", rates)):
        scheduler.base_lrs = rates


def count_anew(scheduler: Any) -> None:
    """A schedule that follows a metric (reduce_lr_on_plateau, greedy) does not hold the best of a larger network,
    which a narrower one may never reach, against the steps after a cut. Its rate stays."""
    if hasattr(scheduler, "num_bad_epochs") and hasattr(scheduler, "best"):
        scheduler.best = float("inf") if scheduler.mode == "min" else float("-inf")
        scheduler.num_bad_epochs = 0
