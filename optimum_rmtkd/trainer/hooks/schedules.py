"""Hooks of the optimizer and its schedule, which runs once a phase of the run."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from ..schedule import factor_at, stretched
from ..swap import separate_cores


__all__ = ["ScheduleHooks", "count_anew"]


class ScheduleHooks:
    """In front of a trainer: groups for the tensors of a reparameterization, and the learning rate of the phases.

    Attributes:
        schedule_is_known: it is transformers' own, a function of the step, made by `create_scheduler`.
    """

    schedule_is_known = False

    def create_optimizer(self, model=None):
        """As the trainer's own; tensors of a reparameterization form the last group, without weight decay."""
        given = self.optimizer is not None
        made = super().create_optimizer() if model is None else super().create_optimizer(model)
        optimizer = self.optimizer if made is None else made  # an override may forget to return it
        if self.reparameterization is not None and not given:
            separate_cores(optimizer, self.model, self.reparameterization.lr_scale)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """As the trainer's own; a schedule that is a function of the step runs once a phase of the run."""
        given = self.lr_scheduler is not None
        options = {} if optimizer is None else {"optimizer": optimizer}
        made = super().create_scheduler(num_training_steps, **options)
        scheduler = self.lr_scheduler if made is None else made
        self.schedule_is_known = not given and type(scheduler) is LambdaLR
        if self.schedule_is_known:
            shapes = scheduler.lr_lambdas  # one a group
            scheduler.lr_lambdas = [self._in_phases(shape, num_training_steps) for shape in shapes]
        return scheduler

    def _in_phases(self, shape, whole: int):
        # A plain function: of anything else the scheduler's state would hold the attributes.
        def factor(step: int) -> float:
            phases = self.run.pace.phases
            return factor_at(step, phases, stretched(shape, whole)) if phases else shape(step)

        return factor


def count_anew(scheduler: Any) -> None:
    """A schedule that follows a metric (reduce_lr_on_plateau, greedy) does not hold the best of a larger network,
    which a narrower one may never reach, against the steps after a cut. Its rate stays."""
    if hasattr(scheduler, "num_bad_epochs") and hasattr(scheduler, "best"):
        scheduler.best = float("inf") if scheduler.mode == "min" else float("-inf")
        scheduler.num_bad_epochs = 0
