"""The learning rate schedule of a script, run once a phase of the run. Knows schedulers and phases, no run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from ...errors import RMTKDError
from ..schedule import Phase, factor_at, planned_steps, stretched


__all__ = ["LoopSchedule"]


class LoopSchedule:
    """A `LambdaLR` (what transformers' `get_scheduler` makes), prepared or not, under which the phases of a run run.

    Each phase runs through the whole of the user's schedule, in its own number of steps: a linear decay with a tenth
    of warm-up is one in the fit and one in the distillation. Any other scheduler stays as it is, and so does the
    learning rate.

    Attributes:
        known: the schedule is a function of the step, and follows the phases.
        ticks: by which a prepared scheduler advances in an optimizer step: one a process, as Accelerate has it.
    """

    def __init__(self, scheduler: Any, max_steps: int, phases: Callable[[], Sequence[Phase]]):
        self.inner = getattr(scheduler, "scheduler", scheduler)
        self.known = type(self.inner) is LambdaLR
        self.ticks = _ticks(scheduler)
        self._phases, self._since = phases, None
        if self.known:
            shapes = list(self.inner.lr_lambdas)
            whole = [planned_steps(shape, max_steps * self.ticks) for shape in shapes]
            self.inner.lr_lambdas = [self._factor(*pair) for pair in zip(shapes, whole, strict=True)]

    def _factor(self, shape: Callable[[int], float], whole: int) -> Callable[[int], float]:
        # A plain function: of anything else the scheduler's state would hold the attributes.
        def factor(tick: int) -> float:
            phases = self._phases()
            if not phases:
                return shape(tick)
            return factor_at(tick // self.ticks, phases, stretched(shape, whole))

        return factor

    def follow(self) -> None:
        """The phases have changed: the rate of the step to come is theirs."""
        if not self.known:
            return
        inner = self.inner
        rates = [
            base * factor(inner.last_epoch) for base, factor in zip(inner.base_lrs, inner.lr_lambdas, strict=True)
        ]
        for group, rate in zip(inner.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        inner._last_lr = rates

    def begin(self, step: int) -> None:
        """Steps are counted from here on."""
        self._since = (step, self.inner.last_epoch) if self.known else None

    def check(self, step: int) -> None:
        """After the first optimizer step: has the schedule kept up with it?

        Raises:
            RMTKDError: it is stepped at other moments.
        """
        if self._since is None or step <= self._since[0]:
            return
        (begun, tick), self._since = self._since, None
        if self.inner.last_epoch - tick != (step - begun) * self.ticks:
            raise RMTKDError(
                f"lr_scheduler advanced by {self.inner.last_epoch - tick} in {step - begun} optimizer step(s); "
                f"expected {self.ticks} a step: the phases of the run are counted by it. Call lr_scheduler.step() "
                "once after each optimizer.step(), or leave lr_scheduler out of RMTKDLoop: the rate then stays yours."
            )


def _ticks(scheduler: Any) -> int:
    """Accelerate steps a prepared scheduler once a process, unless batches are split among them."""
    from accelerate.scheduler import AcceleratedScheduler
    from accelerate.state import AcceleratorState

    if not isinstance(scheduler, AcceleratedScheduler) or not scheduler.step_with_optimizer or scheduler.split_batches:
        return 1
    return AcceleratorState().num_processes
