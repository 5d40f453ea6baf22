"""What is done to the stage that is being distilled: it begins, is looked at, waits, begins anew, and is settled.

Plain functions over a `Run`; the model and its architecture are the run's own to change.
"""

from __future__ import annotations

import logging
from typing import Any

from .judge import Measured


__all__ = [
    "begin_stage",
    "conclude",
    "look",
    "repeat",
    "settle",
    "stay",
    "suit",
    "suit_what_stays",
    "wait",
    "wait_or_stop",
]

logger = logging.getLogger(__name__)


def suit(run: Any, step: int) -> None:
    """The rate follows the size of the model and the steps of the stage."""
    removed = 1 - run.parameters / run.reference_parameters
    run.pace.suit(removed, run.agenda.stage_steps(step, run.host.max_steps))
    if run.agenda.open is not None:
        run.agenda.change(learning_rate=run.pace.rate)


def suit_what_stays(run: Any, step: int) -> None:
    """The same where no cut follows, and the model that was found is distilled on: also the rate warms up."""
    left = run.agenda.stay_from(step, run.host.max_steps)
    run.pace.suit(1 - run.parameters / run.reference_parameters, left)
    run.pace.warm_up(step, left)
    run.host.reschedule()


def begin_stage(run: Any, step: int) -> None:
    """The model just after its cut is at hand: the rate warms up."""
    run.pace.warm_up(step, run.agenda.begin_stage(step, run.host.max_steps))
    run.host.reschedule()


def look(run: Any, step: int) -> None:
    """Once in a stage, early enough to mend it: is the model being ruined, and not as good as it was all the same?"""
    if not run.agenda.looks(step):
        return
    measured = run.measure()
    if run.judge.spoiled(measured) and not run.judge.come_back(measured, run.fit.chance):
        repeat(run, step, measured)


def wait(run: Any, step: int) -> None:
    """The next cut is not made yet; it is thought of again some steps later."""
    if not run.agenda.waits:
        run.host.model_changed()
    run.agenda.retry_at = step + run.host.looks()


def wait_or_stop(run: Any, step: int, measured: Measured) -> None:
    """A cut never follows a ruin: it waits, and no longer than leaves half of its own stage."""
    last, name = run.agenda.latest(run.host.max_steps), run.judge.behind(measured, run.fit.chance)
    value, came_from = measured.metrics[name], run.judge.baseline.metrics[name]
    if step + run.host.looks() <= last:
        words = "%s is %.4g at step %d, and was %.4g before the first cut: the next cut waits until it has come back"
        run.judge.say_once(words, name, value, step, came_from)
        wait(run, step)
        return
    run.agenda.stopped = f"{name} {value:.4g} had not come back to the {came_from:.4g} of the uncut model"
    logger.warning("No further cut is made: %s.", run.agenda.stopped)


def repeat(run: Any, step: int, measured: Measured) -> None:
    """The weights of just after the cut come back, and the stage begins anew at a lower rate."""
    agenda, stage, spent = run.agenda, run.agenda.open, step - run.agenda.stage_from
    lost = f"{run.judge.words(measured)}, after {spent} steps"
    _put_back(run)
    rate = run.pace.slow_down()
    if not agenda.again(spent, step, run.host.max_steps) or not run.pace.phases:
        agenda.stopped = agenda.stopped or f"stage {stage.index} made the model worse ({lost})"
    agenda.note(f"repeated at {rate} ({lost})")
    end = " No further cut is made." if agenda.stopped else ""
    logger.warning("Stage %d begins anew from its cut, at %s: %s.%s", stage.index, rate, lost, end)
    begin_stage(run, step)
    run.write_journal()


def settle(run: Any, measured: Measured) -> str | None:
    """Judge the stage for good; why it has to be rolled back, or None: it stands, with the better of the distilled
    weights and those of just after the cut."""
    judge, agenda, stage = run.judge, run.agenda, run.agenda.open
    if judge.dropped(measured.value):
        reason = f"{stage.metric_name} {measured.value:.4f}, uncut {judge.baseline.value:.4f}, {judge.rule()}"
        agenda.change(**measured.at_the_end(), status="rolled_back", reason=reason)
        return reason
    if judge.worse(measured):
        _put_back(run)
        why = judge.words(measured)
        agenda.note(f"distilling made it worse ({why}): the weights just after the cut stay")
        logger.warning("Stage %d: %s.", stage.index, agenda.stages[-1].note)
        judge.last = measured = judge.just_cut
    agenda.change(**measured.at_the_end(), status="accepted")
    run.keepsake.reset()
    run.write_journal()
    return None


def stay(run: Any, good: Measured) -> None:
    """No smaller model follows the one at hand, which keeps the tolerance: the steps that are left distil it, from
    weights that are kept.

    Args:
        good: the model at hand.
    """
    step, left = run.host.step, run.host.max_steps - run.host.step
    run.judge.just_cut = run.judge.last = good
    if left > 0:
        run.agenda.stays = True
        run.keepsake.keep()
        suit_what_stays(run, step)


def conclude(run: Any, measured: Measured) -> None:
    """What came of `stay`: the better of the weights that were kept and those of the end."""
    judge, agenda = run.judge, run.agenda
    if judge.dropped(measured.value) or judge.worse(measured):
        _put_back(run)
        logger.warning("Distilling on made the model worse (%s): the weights before stay.", judge.words(measured))
        judge.last = measured = judge.just_cut
    if agenda.standing is not None:
        agenda.change_at(agenda.standing, **measured.at_the_end())
    agenda.stays = False
    run.keepsake.reset()


def _put_back(run: Any) -> None:
    """The model just after the cut, and a moving average that begins with it."""
    run.dropout.restore()
    run.keepsake.put_back()
    run.disable_dropout()
    if run.tutor.given is None and run.config.teacher == "ema":
        run.appoint_teacher()
