"""A run is taken up where its plan no longer fits: it has other steps than were planned, or begins with its first step
again, with a model that is partly done.

Plain functions over a `Run`. What is done keeps its steps; only what is still to come is moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .distilling import begin_stage, suit, suit_what_stays


__all__ = ["begin_again", "moving", "stretch"]


def moving(done: int, old: int, new: int) -> Callable[[int], int]:
    """Where a step of a run of `old` steps lies in one of `new`, of which `done` are done: those stay, the others are
    stretched evenly over the rest."""
    ratio = max(0, new - done) / (old - done) if old > done else 1.0
    return lambda step: step if step <= done else done + round(ratio * (step - done))


def stretch(run: Any) -> None:
    """The run has another number of steps than was planned: it goes on from a checkpoint with more epochs, or begins
    anew with a smaller batch. While the model is fine-tuned the whole plan keeps its proportions."""
    agenda, host = run.agenda, run.host
    moved = moving(0 if run.fit.going else host.step, agenda.max_steps, host.max_steps)
    agenda.rescale(moved)
    run.fit.rescale(moved, host.step)
    run.pace.rescale(moved, host.max_steps)
    agenda.max_steps = host.max_steps
    if not run.fit.going and run.pace.phases:
        suit(run, host.step)
        host.reschedule()


def begin_again(run: Any) -> None:
    """The steps are counted anew, and the model is partly done: another training follows one that is over, or the same
    one was broken off or starts again with a smaller batch. What was fine-tuned and cut stays so, a stage that is open
    begins anew, and the cuts to come are spread over the steps that there are.

    A model that is done is trained on by the user's own schedule.
    """
    agenda, pace, host = run.agenda, run.pace, run.host
    run.fit.leave_behind(agenda.max_steps)
    agenda.begin_anew(host.step, host.max_steps, run.config.span_of_cuts)
    if not (pace.phases or agenda.stays or agenda.open is not None or agenda.next_cut() is not None):
        return
    pace.begin(0)
    if agenda.stays:
        suit_what_stays(run, host.step)
        return
    suit(run, host.step)
    if agenda.open is not None:
        begin_stage(run, host.step)
