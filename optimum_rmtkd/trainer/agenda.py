"""What of a run is done and what is due: planned cuts, records of those made, delays and looks. Plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .stages import PlannedCut, Stage, spread_steps


__all__ = ["Agenda"]

REPEATS = 2  # of one stage
LOOKED_AT = 40  # steps of a stage that is looked at in between
PLAIN = ("max_steps", "stopped", "retry_at", "look_at", "stage_from", "delay", "repeats")
LATER = {"stays": False}  # what checkpoints of earlier versions do not have


class Agenda:
    """Attributes:
    plan: all cuts, done ones included; None before training begins.
    max_steps: of the run that was planned.
    ended: whether the training it was planned for is over.
    anew: another training follows, whose steps are counted from its first one.
    stages: one record per cut that was tried.
    stopped: why no further cut will follow.
    retry_at: step at which a cut that waits is looked at again.
    stage_from, look_at: steps at which the open stage began, and will be looked at.
    stays: whether the search for a size is over, and the model that was found is distilled on.
    delay, repeats: steps by which cuts come later than planned, and how often the open stage was repeated.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget the run."""
        self.plan: tuple[PlannedCut, ...] | None = None
        self.max_steps = 0
        self.ended = self.anew = False
        self.stages: list[Stage] = []
        self.stopped: str | None = None
        self.retry_at: int | None = None
        self.look_at: int | None = None
        self.stage_from = self.delay = self.repeats = 0
        self.stays = False

    @property
    def standing(self) -> int | None:
        """Place of the last record whose widths the model has; None where it is uncut."""
        return next((at for at in reversed(range(len(self.stages))) if self.stages[at].accepted), None)

    @property
    def open(self) -> Stage | None:
        """The stage that is being distilled."""
        return self.stages[-1] if self.stages and self.stages[-1].status == "open" else None

    @property
    def waits(self) -> bool:
        """Whether a cut is due and waits for the metric."""
        return self.retry_at is not None

    def next_cut(self) -> PlannedCut | None:
        """The first cut that is not made yet; None where none will be."""
        done = len(self.stages)
        return self.plan[done] if self.plan and self.stopped is None and done < len(self.plan) else None

    def due(self, step: int) -> PlannedCut | None:
        """The cut that is to be made after so many steps."""
        cut = self.next_cut()
        return None if cut is None or step < max(cut.step + self.delay, self.retry_at or 0) else cut

    def is_due(self, step: int) -> bool:
        """Whether a cut, or a look at the open stage, is."""
        return self.due(step) is not None or (self.look_at is not None and step >= self.look_at)

    def stage_steps(self, step: int, max_steps: int) -> int:
        """From a step to the next cut, or to the end."""
        cut = self.next_cut()
        return max(1, (max_steps if cut is None else cut.step + self.delay) - step)

    def latest(self, max_steps: int) -> int:
        """The last step at which the next cut can be made: half of the steps that it was to have are left."""
        cut = self.next_cut()
        return max_steps if cut is None else max_steps - (max_steps - cut.step) // 2

    def begin_stage(self, step: int, max_steps: int) -> int:
        """The model just after its cut is at hand; it is looked at after half of the stage. Its steps."""
        steps = self.stage_steps(step, max_steps)
        looked_at = steps >= LOOKED_AT and self.repeats < REPEATS
        self.stage_from, self.look_at = step, step + steps // 2 if looked_at else None
        return steps

    def stay_from(self, step: int, max_steps: int) -> int:
        """No cut follows: the model at hand is distilled on. For how many steps."""
        self.stage_from, self.look_at = step, None
        return max(1, max_steps - step)

    def rescale(self, moved: Callable[[int], int]) -> None:
        """The run has another number of steps than was thought.

        Args:
            moved: step of the old run -> step of the new one.
        """
        due = [moved(cut.step) for cut in self.plan or ()]
        if (cut := self.next_cut()) is not None:
            self.delay = moved(cut.step + self.delay) - moved(cut.step)
        self._move_cuts(due[len(self.stages) :])
        self.look_at = None if self.look_at is None else moved(self.look_at)
        self.retry_at = None if self.retry_at is None else moved(self.retry_at)

    def begin_anew(self, step: int, max_steps: int, share: float) -> None:
        """Steps are counted anew, with the model as it is: the cuts to come are spread over them, after the stage that
        is open, if one is.

        Args:
            share: of the steps, at which the last cut is made.

        Raises:
            RMTKDError: fewer steps than cuts.
        """
        self.anew, self.max_steps = False, max_steps
        self.stage_from, self.delay = step, 0
        self.retry_at = self.look_at = None
        if self.next_cut() is not None:
            first = self.open is not None
            self._move_cuts(spread_steps(len(self.plan) - len(self.stages) + first, max_steps, share)[first:])

    def _move_cuts(self, steps: Iterable[int]) -> None:
        """Those that are not made yet."""
        done = len(self.stages)
        later = zip((self.plan or ())[done:], steps, strict=True)
        self.plan = (*(self.plan or ())[:done], *(dataclasses.replace(cut, step=step) for cut, step in later))

    def looks(self, step: int) -> bool:
        """Whether the open stage is to be looked at now: once."""
        due = self.look_at is not None and step >= self.look_at and self.open is not None
        if due:
            self.look_at = None
        return due

    def again(self, spent: int, step: int, max_steps: int) -> bool:
        """The open stage begins anew after `spent` steps; False where no cut may follow it any more."""
        self.repeats += 1
        self.delay += spent
        return self.repeats <= REPEATS and step + spent <= self.latest(max_steps)

    def change(self, **values: Any) -> Stage:
        """The last record with other values."""
        return self.change_at(-1, **values)

    def change_at(self, place: int, **values: Any) -> Stage:
        """The same of an earlier record."""
        self.stages[place] = dataclasses.replace(self.stages[place], **values)
        return self.stages[place]

    def note(self, note: str) -> None:
        """A line for people in the last record."""
        known = self.stages[-1].note
        self.change(note=f"{known}; {note}" if known else note)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        plan = [dataclasses.asdict(cut) for cut in self.plan or ()]
        stages = [stage.to_dict() for stage in self.stages]
        return {"plan": plan, "stages": stages} | {name: getattr(self, name) for name in (*PLAIN, *LATER)}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        cuts = [{**cut, "sites": None if cut["sites"] is None else tuple(cut["sites"])} for cut in values["plan"]]
        self.plan = tuple(PlannedCut(**cut) for cut in cuts)
        self.stages = [Stage.from_dict(stage) for stage in values["stages"]]
        self.anew = False
        for name in PLAIN:
            setattr(self, name, values[name])
        for name, usual in LATER.items():
            setattr(self, name, values.get(name, usual))
