"""Hooks of the optimizer and its schedule, which runs once a phase of the run."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..schedule import factor_at
from ..swap import raw_optimizer, separate_cores


__all__ = ["ScheduleHooks"]


class ScheduleHooks:
    """In front of a trainer: groups for the tensors of a reparameterization, and the learning rate of the phases.

    Attributes:
        schedule_is_known: it is transformers' own, a function of the step, made by `create_scheduler`.
    """

    schedule_is_known = False

    def create_optimizer(self, model=None):
        """As the trainer's own; tensors of a reparameterization form the last group, without weight decay."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if self.reparameterization is not None and not given:
            separate_cores(optimizer, self.model, self.reparameterization.lr_scale)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """As the trainer's own; a schedule that is a function of the step runs once a phase of the run."""
        given = self.lr_scheduler is not None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self.schedule_is_known = not given and type(scheduler) is LambdaLR
        if self.schedule_is_known:
            shapes = {num_training_steps: scheduler.lr_lambdas[0]}

            def shape(steps: int):
                if steps not in shapes:
                    shapes[steps] = self._schedule_over(steps)
                return shapes[steps]

            def factor(step: int) -> float:
                phases = self.run.pace.phases
                return factor_at(step, phases, shape) if phases else shape(num_training_steps)(step)

            scheduler.lr_lambdas = [factor] * len(scheduler.lr_lambdas)
        return scheduler

    def _schedule_over(self, steps: int):
        """The trainer's own schedule over so many steps, step -> multiple of the peak rate."""
        kept, created = self.lr_scheduler, self._created_lr_scheduler
        rate = raw_optimizer(self.optimizer).defaults.get("lr", self.args.learning_rate)
        bare = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=float(rate))
        self.lr_scheduler = None
        try:
            return super().create_scheduler(steps, bare).lr_lambdas[0]
        finally:
            self.lr_scheduler, self._created_lr_scheduler = kept, created
