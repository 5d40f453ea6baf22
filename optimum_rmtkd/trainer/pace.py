"""The learning rate of a run: its phases, the peak that suits the cut, and what lowers it. Knows a host, no run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

from ..config import RMTKDConfig
from ..models import has_head
from .host import Training
from .rates import distil_rate, few_steps, rate_band, warmup_steps
from .schedule import Phase


__all__ = ["Pace"]

logger = logging.getLogger(__name__)

LOWER = 1 / 3  # of the rate, where a stage is repeated


class Pace:
    """Attributes:
    phases: of the learning rate; none where the user's schedule stands as it is.
    lowering: what the peak rate is multiplied by, after repeated stages.
    """

    def __init__(self, host: Training, config: RMTKDConfig):
        self.host, self.config = host, config
        self.reset()

    def reset(self) -> None:
        """Forget the run."""
        self.phases: tuple[Phase, ...] = ()
        self.lowering = 1.0
        self._said = ""

    def begin(self, fit_steps: int, quicker: float = 1.0) -> None:
        """One schedule for the fit, if there is one, and one for the distillation.

        Args:
            quicker: what the given rate is multiplied by in the fit, where it is ours to change.
        """
        if not self.host.follows_phases:
            self.phases = ()
            return
        fit = (Phase("fit", 0, fit_steps, quicker if self.host.rate else 1.0),) if fit_steps else ()
        self.phases = (*fit, Phase("distil", fit_steps, self.host.max_steps - fit_steps))

    @property
    def rate(self) -> float | None:
        """Peak learning rate of the phase at hand; None where it is not ours to know."""
        given = self.host.rate
        return None if given is None or not self.phases else given * self.phases[-1].factor

    @property
    def _is_language(self) -> bool:
        # a small one wanted ten times the rate that the rule allows (docs/guides/rates.md)
        return has_head(self.host.model, "CAUSAL_LM")

    def suit(self, removed: float, steps: int) -> None:
        """Choose the rate of the distillation after a cut: the highest of the stage by the rule; that of the whole
        phase where the recipe names it, for then the user has one schedule in mind.

        Args:
            removed: share of the uncut model's parameters that are gone.
            steps: to the next cut, or to the end.
        """
        given, wanted = self.host.rate, self.config.distil_learning_rate
        if given != 0 and not self._is_language and (advice := few_steps(removed, steps)):
            logger.warning(advice)
        if not self.phases or not given:
            if given != 0:
                self._say_why_not(removed, steps)
            return
        chosen = wanted or given
        why = f"learning rate of {chosen:.3g}: {'distil_learning_rate' if wanted else 'nothing was removed'}"
        if wanted is None and self._is_language:
            why = f"learning rate of {given:.3g} as given: the rule was measured on encoders, not on language models"
        elif wanted is None and 0 < removed < 1:
            chosen, why = dataclasses.astuple(distil_rate(given, removed, steps))
        since = self.host.step if wanted is None else None
        self._change(factor=chosen / given * self.lowering, since=since)
        if self.lowering != 1.0:
            why = f"{why}, times {self.lowering:.2g} after repeated stages"
        self._say("Distilling at a peak %s.", why)

    def _say_why_not(self, removed: float, steps: int) -> None:
        """The rate is not ours to choose: which one stands, why, and what it would have been."""
        wanted = self.config.distil_learning_rate
        why = "the optimizer is not of Adam's kind, or its groups have rates of their own"
        if not self.host.follows_phases:
            why = "its schedule is not known as a function of the step (a LambdaLR)"
        if wanted is not None:
            self._say("distil_learning_rate=%.3g is not used: the learning rate stays yours, for %s.", wanted, why)
        elif 0 < removed < 1 and not self._is_language:
            self._say(
                "The learning rate stays yours: %s. With an optimizer of Adam's kind, %.0f%% of the parameters "
                "removed and %d steps to distil allow %.2g to %.2g.",
                why,
                100 * removed,
                steps,
                *rate_band(removed, steps),
            )

    def rescale(self, moved: Callable[[int], int], max_steps: int) -> None:
        """The run has another number of steps than was thought. Stages that have begun keep their warm-ups.

        Args:
            moved: step of the old run -> step of the new one, see `again.moving`.
        """
        starts = [moved(phase.start) for phase in self.phases]
        ends = [*starts, max_steps][1:]
        self.phases = tuple(
            dataclasses.replace(phase, start=start, steps=max(1, end - start))
            for phase, start, end in zip(self.phases, starts, ends, strict=True)
        )

    def slow_down(self) -> str:
        """A stage is repeated: the rate is lowered. The one that it goes on at, in words."""
        if not self.phases:
            return "the rate of a schedule of your own, which stays as it is"
        self.lowering *= LOWER
        self._change(factor=self.phases[-1].factor * LOWER)
        return "a third of the learning rate"

    def warm_up(self, step: int, steps: int) -> None:
        """A stage of so many steps begins: its rate rises first."""
        length = warmup_steps(steps)
        if self.phases and length:
            self._change(warmups=(*self.phases[-1].warmups, (step, length)))

    def _change(self, **values: Any) -> None:
        self.phases = (*self.phases[:-1], dataclasses.replace(self.phases[-1], **values))

    def _say(self, line: str, *values: Any) -> None:
        if self._said != (said := line % values):
            self._said = said
            logger.warning(line, *values)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"phases": [phase.to_dict() for phase in self.phases], "lowering": self.lowering}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.phases = tuple(Phase.from_dict(phase) for phase in values["phases"])
        self.lowering = values["lowering"]
