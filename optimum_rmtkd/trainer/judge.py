"""Measures the model under training and says whether a stage stands. Knows a host and numbers; it changes nothing."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..batches import to_device
from ..config import COMPARING, RMTKDConfig
from ..errors import RMTKDError
from ..surgery import allowed_loss, divergence_warning, keeps_tolerance, loss_warning
from ..surgery.divergence import mean_divergence
from ..validation.wording import close
from . import plain, verdicts
from .data import isolated_rng
from .host import Host
from .stages import metric_dropped, metric_reached


__all__ = ["Judge", "Measured"]

logger = logging.getLogger(__name__)


MOMENTS = ("baseline", "just_cut", "last")
COMPARED = 256  # calibration samples that show how far the model is from the uncut one


class Measured(NamedTuple):
    """One moment: all metrics, the one among them that judges, and, where there is none, how far the model's answers
    are from the uncut model's (`surgery.divergence`, nats an answer)."""

    metrics: dict[str, float] | None = None
    value: float | None = None
    divergence: float | None = None

    def at_the_end(self) -> dict[str, Any]:
        """Fields of the record of a stage that ends here."""
        return {"metric_after": self.value, "metrics_after": self.metrics, "divergence_after": self.divergence}


class Judge:
    """Attributes:
    baseline: of the uncut model, once it is fine-tuned.
    just_cut: just after the cut of the open stage.
    pending: that moment is not measured yet.
    last: the moment measured last.
    chosen: the metric that judges where the host names none that the evaluation returns.
    stand_in: what judges in place of a metric that is no finite number of the uncut model: the loss by its name, or ""
        for the divergence from the uncut model; None where that metric judges.
    """

    def __init__(self, host: Host, config: RMTKDConfig):
        self.host, self.config = host, config
        self._said: set[str] = set()
        self.reset()

    def reset(self) -> None:
        """Forget the run."""
        self.baseline = self.just_cut = self.last = Measured()
        self.chosen: str | None = None
        self.stand_in: str | None = None
        self.pending = False

    def begin(self, uncut: Measured) -> Measured:
        """Take a moment as that of the uncut model, which all others are held against. A metric that is no finite
        number there says nothing of any later model: from here on the loss judges, or else the divergence.

        Returns:
            The moment with the value of what judges.

        Raises:
            RMTKDError: the recipe compares that metric.
        """
        if uncut.value is not None and not math.isfinite(uncut.value):
            uncut = uncut._replace(value=self._appoint_stand_in(uncut))
        self.baseline = self.last = uncut
        return uncut

    def _appoint_stand_in(self, uncut: Measured) -> float | None:
        """Its value; None for the divergence."""
        name, loss, finite = self.name, self.host.loss_name, _finite_ones(uncut.metrics)
        cause = f"{name} is {uncut.value:g} for the uncut model, no finite number, and cannot judge the stages"
        others = f" (finite are {', '.join(sorted(finite))})" if finite else ""
        cure = f"Look at compute_metrics, or name another metric as metric_for_best_model{others}."
        if needed := self._compared():
            raise RMTKDError(f"{cause}, as {needed[0]} expects. {cure}")
        self.stand_in = loss if loss in finite else ""
        instead = f"{loss} judges" if self.stand_in else "how far the answers are from the uncut model's judges"
        self.say_once("%s: %s in its place. %s", cause, instead, cure)
        return finite.get(self.stand_in)

    def _compared(self) -> list[str]:
        """Fields of the recipe that compare the metric."""
        return [name for name in COMPARING if getattr(self.config, name) is not None]

    def measure(self, uncut: nn.Module | None = None) -> Measured:
        """The model under training now.

        Args:
            uncut: what it is compared with where no metric judges; None: it is the uncut one.

        Raises:
            RMTKDError: the metric that the user named, or that the recipe compares, is not among them.
        """
        host = self.host
        with isolated_rng(self.config.seed):
            metrics = host.measure()
        value = None if metrics is None or self.stand_in == "" else metrics.get(self.name)
        if value is None and metrics is not None and self.stand_in is None:
            value = self._choose(metrics)
        judges = value is not None and math.isfinite(value)
        away = self._divergence(uncut) if not judges and uncut is not None else None
        self.last = Measured(metrics, None if value is None else float(value), away)
        return self.last

    def _divergence(self, uncut: nn.Module) -> float | None:
        host = self.host
        with isolated_rng(self.config.seed):
            model = plain.plain(host.model)
            place = next(model.parameters()).device
            batches = list(host.calibration_batches(min(COMPARED, self.config.calibration_samples)))
            with plain.at_hand(place, uncut):
                found = mean_divergence(uncut, model, to_device(batches, place))
        if found is None or host.accelerator.num_processes == 1:
            return found
        tensor = torch.tensor([found], dtype=torch.float64, device=host.accelerator.device)
        return host.accelerator.reduce(tensor, reduction="mean").item()

    @property
    def name(self) -> str:
        """Of the metric that judges the stages."""
        return self.stand_in or self.chosen or self.host.metric_name

    @property
    def greater_is_better(self) -> bool:
        """Its direction."""
        if self.stand_in:
            return False  # a loss
        if self.chosen is None or self.host.metric_asked_for:
            return self.host.greater_is_better
        return verdicts.greater_is_better(self.chosen)

    def _choose(self, metrics: Mapping[str, float]) -> float | None:
        """The metric to judge by where the host's is not there, or the complaint that there is none."""
        host = self.host
        found = verdicts.telling(metrics)
        if host.metric_asked_for:  # an evaluation may have another prefix
            asked = host.metric_name.removeprefix("eval_")
            alike = [name for name in metrics if name == asked or name.endswith(f"_{asked}")]
            found = alike[0] if len(alike) == 1 else None
        if found is not None and self.chosen is None:
            self.chosen = found
            self.say_once(
                "The evaluation gives no %s: the stages are judged by %s. metric_for_best_model names another one.",
                host.metric_name,
                found,
            )
            return metrics[found]
        found = ", ".join(sorted(metrics)) or "nothing (eval_dataset is empty, or holds no labels)"
        hint = "Set metric_for_best_model to one of them (with several eval datasets: <name>_<metric>)."
        if host.metric_asked_for or self._compared():
            meant = close(host.metric_name, metrics)
            raise RMTKDError(
                f"The evaluation gave {found}; the stages are judged by {host.metric_name!r}. "
                f"{meant}{' ' if meant else ''}{hint}"
            )
        self.say_once(
            "The evaluation gave %s, and no %s: the stages are judged without a metric, by how far the model's "
            "answers are from the uncut model's. %s",
            found,
            host.metric_name,
            hint if metrics else "Give the validation data labels.",
        )
        return None

    def say_once(self, message: str, *values: Any) -> None:
        """A warning, the first time that it is due."""
        if message not in self._said:
            self._said.add(message)
            logger.warning(message, *values)

    def below_threshold(self, value: float | None) -> bool:
        """Whether `stage_threshold`, which the user has set, is not reached."""
        share = self.config.stage_threshold
        if share is None or value is None or self.baseline.value is None:
            return False
        return not metric_reached(value, self.baseline.value, share, self.greater_is_better)

    def dropped(self, value: float | None) -> bool:
        """Whether the metric lies further below the uncut model's than `max_metric_drop` or `tolerance`, which the
        user has set."""
        allowed, tolerance, uncut = self.config.max_metric_drop, self.config.tolerance, self.baseline.value
        if not self.rolls_back or value is None or uncut is None:
            return False
        if tolerance is not None:
            return not keeps_tolerance(tolerance, value, uncut, self.greater_is_better)
        return metric_dropped(value, uncut, allowed, self.greater_is_better)

    @property
    def rolls_back(self) -> bool:
        """Whether a stage that loses too much is rolled back."""
        return self.config.max_metric_drop is not None or self.config.tolerance is not None

    def rule(self) -> str:
        """What `dropped` holds a metric against, for people."""
        if self.config.tolerance is None:
            return f"max_metric_drop {self.config.max_metric_drop:g}"
        allowed = allowed_loss(self.config.tolerance, self.baseline.value, self.greater_is_better)
        return f"tolerance {self.config.tolerance:g} allows a loss of {allowed:.4g}"

    def worse(self, now: Measured) -> bool:
        """Is the model worse than just after the cut of the open stage, beyond the noise?"""
        cut = self.just_cut
        if now.value is None or cut.value is None:
            return self._farther(now, midst=False)
        if not (math.isfinite(now.value) or math.isfinite(cut.value)):  # a correlation of equal answers is none
            losses = self._losses(now, cut)
            return verdicts.worse(*losses, greater_is_better=False) if losses else self._farther(now, midst=False)
        return self._lost(now, cut)

    def _losses(self, now: Measured, cut: Measured) -> list[float] | None:
        """At two moments; None where there are none to compare."""
        losses = [moment.metrics.get(self.host.loss_name) for moment in (now, cut)]
        return None if None in losses or not math.isfinite(losses[1]) else losses

    def _farther(self, now: Measured, midst: bool) -> bool:
        """Where no metric judges."""
        away = [moment.divergence for moment in (now, self.just_cut)]
        return None not in away and verdicts.farther(*away, midst=midst)

    def _lost(self, now: Measured, cut: Measured) -> bool:
        """Of the metric that judges. A loss that nobody asked for grows with confidence, also where the model gets
        better: another metric that did says so, if it is one of which that is known."""
        rows = self.host.validation_rows
        if self._fell(now, cut):
            return True
        if not verdicts.worse(now.value, cut.value, self.greater_is_better, rows):
            return False
        others = self._others(now, cut)
        return not any(verdicts.worse(cut.metrics[name], now.metrics[name], True, rows) for name in others)

    def _others(self, now: Measured, then: Measured) -> list[str]:
        """Metrics, known as the greater the better, that have a say beside a loss that nobody asked for; the one that
        says most first."""
        asked_for = self.host.metric_asked_for and not self.stand_in
        if asked_for or not self.name.endswith("loss"):
            return []
        both = [name for name in now.metrics or {} if name in _finite_ones(then.metrics)]
        return [name for name in verdicts.known(both) if verdicts.greater_is_better(name)]

    def second(self, now: Measured, then: Measured) -> str | None:
        """The one among them that says most of the model: a loss may stand where an accuracy falls."""
        return next(iter(self._others(now, then)), None)

    def _fell(self, now: Measured, then: Measured) -> bool:
        name = self.second(now, then)
        return name is not None and verdicts.fell(now.metrics[name], then.metrics[name], self.host.validation_rows)

    def spoiled(self, now: Measured) -> bool:
        """Is a stage in its midst being ruined, by its loss, by the metric that judges, or by the second one?"""
        cut = self.just_cut
        if now.value is None or cut.value is None:
            return self._farther(now, midst=True)
        losses = self._losses(now, cut)
        if losses and verdicts.spoiled(*losses, greater_is_better=False):
            return True
        if not losses and not math.isfinite(cut.value):
            return self._farther(now, midst=True)
        if verdicts.spoiled(now.value, cut.value, self.greater_is_better, self.host.validation_rows):
            return True
        return self._fell(now, cut)

    def words(self, now: Measured) -> str:
        """A moment beside the one just after the cut, for people."""
        cut = self.just_cut
        if now.value is not None:
            wanted = (self.name, self.host.loss_name, self.second(now, cut))
            names = dict.fromkeys(name for name in wanted if name in (now.metrics or {}))
            return ", ".join(f"{n} {now.metrics[n]:.4g}, {cut.metrics[n]:.4g} just after the cut" for n in names)
        near, at_first = (max(0.0, moment.divergence) for moment in (now, cut))
        return f"{near:.3g} nats an answer from the uncut model, {at_first:.3g} just after the cut"

    def loss_of(self, now: Measured) -> str | None:
        """A warning where the run lost more than a few points, or a tenth of the perplexity; None where it did not."""
        if now.value is None and now.divergence is not None:
            return divergence_warning(now.divergence)
        before, after = self.baseline.metrics or {}, now.metrics or {}
        asked = [(self.name, self.greater_is_better), (self.host.loss_name, False)]
        if second := self.second(now, self.baseline):
            asked.append((second, True))
        for name, greater in asked:
            if text := loss_warning(name, before.get(name), after.get(name), greater):
                return text
        return None

    def come_back(self, now: Measured, chance: float | None = None) -> bool | None:
        """Is the model close enough to the uncut one to be cut again? None where there is no metric to say it.

        Args:
            chance: task loss of knowing nothing, on the scale of the loss that judges.
        """
        if now.value is None or self.baseline.value is None:
            return None
        return self.behind(now, chance) is None

    def behind(self, now: Measured, chance: float | None = None) -> str | None:
        """The metric that has not come back; None where all have. Where the user has set `stage_threshold`,
        `max_metric_drop` or `tolerance`, that says it."""
        value, uncut = now.value, self.baseline
        if self.config.stage_threshold is not None or self.rolls_back:
            return self.name if self.below_threshold(value) or self.dropped(value) else None
        scale = chance if self.name.endswith("loss") else None
        if not verdicts.come_back(value, uncut.value, self.greater_is_better, scale):
            return self.name
        name = self.second(now, uncut)
        if name is None or not self._fell(now, uncut):
            return None
        return None if verdicts.come_back(now.metrics[name], uncut.metrics[name], True) else name

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        moments = {name: [_told(part) for part in getattr(self, name)] for name in MOMENTS}
        return moments | {"chosen": self.chosen, "stand_in": self.stand_in, "pending": self.pending}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.chosen, self.stand_in = values["chosen"], values.get("stand_in")
        self.pending = values.get("pending", False)
        for name in MOMENTS:
            setattr(self, name, Measured(*map(_heard, values[name])))


def _finite_ones(metrics: Mapping[str, float] | None) -> dict[str, float]:
    return {name: value for name, value in (metrics or {}).items() if math.isfinite(value)}


def _told(part: Any) -> Any:
    """Numbers as JSON has them; those that are not finite by name, or a resumed run would judge otherwise."""
    if isinstance(part, dict):
        return {name: _told(value) for name, value in part.items()}
    return str(part) if isinstance(part, float) and not math.isfinite(part) else part


def _heard(part: Any) -> Any:
    """Inverse of `_told`."""
    if isinstance(part, dict):
        return {name: _heard(value) for name, value in part.items()}
    return float(part) if isinstance(part, str) else part
