"""Fine-tuning before the first cut: whether, for how long, and what came of it. Knows a host, no run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ..batches import to_device
from ..config import RMTKDConfig
from ..errors import RMTKDError
from ..surgery.processes import one_for_all
from . import plain
from .data import isolated_rng
from .host import Host
from .rates import FIT_SHARE, fit_pace
from .readiness import Readiness, readiness


__all__ = ["Fit"]

logger = logging.getLogger(__name__)

SEEN = 256  # samples of each process that say whether a model can teach
CUTS = 1  # of a recipe that does not say how many
STATE = {"steps": 0, "why": "", "going": False, "metrics": None, "chance": None, "quicker": 1.0, "earlier": None}


class Fit:
    """Attributes:
    steps: of fine-tuning; 0 for a model that can teach.
    earlier: share of a training before the one at hand, in which the model was fine-tuned; None: in this one.
    why: so many, for people.
    going: whether the model is fine-tuned now.
    asked: the model is fine-tuned whatever it can do; where the recipe says no share, as one that cannot teach.
    metrics: of the validation data, at its end.
    quicker: what the given learning rate is multiplied by in it.
    chance: task loss of knowing nothing on the calibration labels, nats (or the labels' variance); None: unknown, or
        not on the scale of a loss of the user's own.
    """

    def __init__(self, host: Host, config: RMTKDConfig):
        self.host, self.config = host, config
        self.asked = False
        self.reset()

    def reset(self) -> None:
        """Forget the run."""
        self.steps, self.why, self.going = 0, "", False
        self.quicker = 1.0
        self.earlier: float | None = None
        self.metrics: dict[str, float] | None = None
        self.chance: float | None = None

    def decide(self, tasked: bool = True, taught: bool = False) -> None:
        """How many steps, from the recipe and from what the model can do on the calibration data.

        Args:
            tasked: the task's loss is among the objectives. Without it there is nothing to fine-tune with.
            taught: by another model, so that this one need not be able to teach.

        Raises:
            RMTKDError: a share of the steps for it all the same.
        """
        host, share = self.host, self.config.fit_share
        if not tasked and (share or self.asked):
            how = "fine-tuning first" if share is None else f"fit_share={share:g}"
            raise RMTKDError(
                f"{how} and objectives without TaskLoss: fine-tuning needs the task's loss. Add TaskLoss, or leave "
                f"{'that' if share is None else 'fit_share'} out."
            )
        if share is not None:
            self.why = f"fit_share={share:g}"
        elif self.asked:
            share, self.quicker = fit_pace(host.max_steps)
            self.why = "as asked for"
        if self.config.schedule != "none":
            found = self._readiness()
            self.chance = None if host.columns.own_loss else found.chance
            self.why = self.why or found.why
            if share is None and tasked and not found.can_teach:
                share, self.quicker = fit_pace(host.max_steps)
            if not share and not taught:
                self._caution(found, tasked)
        most = host.max_steps - (self.config.rounds or CUTS)  # a step for each cut at least
        self.steps = max(0, min(max(1, round(share * host.max_steps)), most)) if share else 0
        self.going = self.steps > 0
        if share and not self.going:
            steps = "1 step is" if host.max_steps == 1 else f"{host.max_steps} steps are"
            logger.warning("%s too few to fine-tune the model first (%s).", steps, self.why)
        if self.going:
            logger.warning(
                "The model is fine-tuned for %d of %d steps before its first cut%s: %s. RMTKDConfig(fit_share=0) cuts "
                "at once.",
                self.steps,
                host.max_steps,
                f", at {self.quicker:.2g} times the learning rate" if self.quicker != 1 and host.rate else "",
                self.why,
            )

    def _caution(self, found: Readiness, tasked: bool) -> None:
        """Of a model that is cut before its first step: it cannot teach, or that could not be checked. Without the
        task's loss nothing is to be checked; fit_share=0 is the user's word for a model that can."""
        if not found.can_teach:
            how = f"RMTKDConfig(fit_share={FIT_SHARE:g}) fine-tunes it first."
            if not tasked:
                how = "Fine-tune it first, or let the run do it: it needs the task's loss (task_weight, TaskLoss)."
            logger.warning(
                "The model is cut at once, though it cannot teach: %s. What is distilled from it will know no more. "
                "%s",
                found.why,
                how,
            )
        elif not found.checked and tasked and self.config.fit_share is None:
            logger.warning(
                "The model is cut at once; %s. If it comes straight from pretraining, RMTKDConfig(fit_share=%g) "
                "fine-tunes it first; fit_share=0 says that it can teach.",
                found.why,
                FIT_SHARE,
            )

    def _readiness(self) -> Readiness:
        host = self.host
        wanted = min(SEEN * host.accelerator.num_processes, self.config.calibration_samples)
        with isolated_rng(self.config.seed):
            with one_for_all(host.accelerator):  # or the others wait for the sums of a process that is gone
                batches = list(host.calibration_batches(wanted))
            model = plain.plain(host.model)
            return readiness(
                model,
                to_device(batches, next(model.parameters()).device),
                samples=SEEN,
                label_names=tuple(host.label_names),
                own_loss=host.columns.own_loss,
                accelerator=host.accelerator,
            )

    @property
    def last_step(self) -> int:
        """Of the training at hand, in the fit: distillation begins after it."""
        return self.steps if self.earlier is None else 0

    def rescale(self, moved: Callable[[int], int], step: int) -> None:
        """The run has another number of steps than was thought, of which `step` are done.

        Args:
            moved: step of the old run -> step of the new one.
        """
        if self.going:
            self.steps = max(step, moved(self.steps))

    def leave_behind(self, max_steps: int) -> None:
        """The steps of a training of so many are over, and counted anew."""
        if self.steps and self.earlier is None:
            self.earlier = self.steps / max(1, max_steps)

    def end(self, metrics: dict[str, float] | None) -> None:
        """The model is fine-tuned."""
        self.going, self.metrics = False, metrics
        shown = ", ".join(f"{name} {value:.4g}" for name, value in (metrics or {}).items())
        logger.warning("Fine-tuned for %d steps%s: the teacher from here on.", self.steps, shown and f" ({shown})")
        found = self._readiness()
        if not found.can_teach and found.loss is not None:
            logger.warning(
                "The teacher still knows nothing of the task: %s. What is distilled from it will not, either, "
                "whatever the table says. Give it more steps (num_train_epochs, fit_share) or another learning rate.",
                found.why,
            )

    def to_dict(self) -> dict[str, Any] | None:
        """For the journal; None where nothing was fine-tuned."""
        if not self.steps:
            return None
        share = self.steps / max(1, self.host.max_steps) if self.earlier is None else self.earlier
        return {"steps": self.steps, "share": share, "why": self.why, "metrics": self.metrics}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for name, usual in STATE.items():  # checkpoints of earlier versions have not all of them
            setattr(self, name, values.get(name, usual))
