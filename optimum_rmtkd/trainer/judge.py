"""Measures the model under training and says whether a stage stands. Knows a host and numbers; it changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..config import RMTKDConfig
from ..errors import RMTKDError
from . import verdicts
from .data import isolated_rng
from .host import Host
from .stages import Stage, metric_dropped, metric_reached


__all__ = ["Judge", "Measured"]

logger = logging.getLogger(__name__)


class Measured(NamedTuple):
    """All metrics of one moment, and the one among them that judges."""

    metrics: dict[str, float] | None = None
    value: float | None = None


class Judge:
    """Attributes:
    baseline: metrics of the uncut model, once it is fine-tuned.
    """

    def __init__(self, host: Host, config: RMTKDConfig):
        self.host, self.config = host, config
        self._said: set[str] = set()
        self.reset()

    def reset(self) -> None:
        """Forget the run."""
        self.baseline = Measured()

    def measure(self) -> Measured:
        """The validation metrics now.

        Raises:
            RMTKDError: the metric that the user named, or that the recipe compares, is not among them.
        """
        host = self.host
        with isolated_rng(self.config.seed):
            metrics = host.measure()
        if metrics is None:
            return Measured()
        value = metrics.get(host.metric_name)
        if value is None:
            self._complain(metrics)
        return Measured(metrics, None if value is None else float(value))

    def _complain(self, metrics: Mapping[str, float]) -> None:
        host = self.host
        needed = [n for n in ("stage_threshold", "max_metric_drop") if getattr(self.config, n) is not None]
        found = ", ".join(sorted(metrics)) or "nothing (eval_dataset is empty, or holds no labels)"
        hint = "Set metric_for_best_model to one of them (with several eval datasets: <name>_<metric>)."
        if host.metric_asked_for or needed:
            raise RMTKDError(f"The evaluation gave {found}; the stages are judged by {host.metric_name!r}. {hint}")
        self.say_once(
            "The evaluation gave %s, and no %s: the stages are judged without a metric. %s",
            found,
            host.metric_name,
            hint if metrics else "Give the validation data labels.",
        )

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
        return not metric_reached(value, self.baseline.value, share, self.host.greater_is_better)

    def dropped(self, value: float | None) -> bool:
        """Whether the metric lies further below the uncut model's than `max_metric_drop`, which the user has set."""
        allowed = self.config.max_metric_drop
        if allowed is None or value is None or self.baseline.value is None:
            return False
        return metric_dropped(value, self.baseline.value, allowed, self.host.greater_is_better)

    def worse(self, value: float | None, stage: Stage) -> bool:
        """Is the model worse than just after the stage's cut, beyond the noise?"""
        if value is None or stage.metric_cut is None:
            return False
        return verdicts.worse(value, stage.metric_cut, self.host.greater_is_better, self.host.validation_rows)

    def come_back(self, value: float | None, chance: float | None = None) -> bool:
        """Is the model close enough to the uncut one to be cut again?

        Args:
            chance: task loss of knowing nothing.
        """
        if value is None or self.baseline.value is None:
            return True
        scale = chance if self.host.metric_name.endswith("loss") else None
        return verdicts.come_back(value, self.baseline.value, self.host.greater_is_better, scale)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"baseline": list(self.baseline)}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.baseline = Measured(*values["baseline"])
