"""Measures the model under training and says whether a stage stands. Knows a host and numbers; it changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..config import RMTKDConfig
from ..errors import RMTKDError
from ..surgery import divergence_warning, loss_warning
from ..surgery.divergence import mean_divergence
from . import plain, verdicts
from .data import isolated_rng
from .host import Host
from .stages import metric_dropped, metric_reached


__all__ = ["Judge", "Measured"]

logger = logging.getLogger(__name__)


MOMENTS = ("baseline", "just_cut", "last")
LOSS = "eval_loss"
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
    last: the moment measured last.
    """

    def __init__(self, host: Host, config: RMTKDConfig):
        self.host, self.config = host, config
        self._said: set[str] = set()
        self.reset()

    def reset(self) -> None:
        """Forget the run."""
        self.baseline = self.just_cut = self.last = Measured()

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
        value = None if metrics is None else metrics.get(host.metric_name)
        if value is None and metrics is not None:
            self._complain(metrics)
        away = self._divergence(uncut) if value is None and uncut is not None else None
        self.last = Measured(metrics, None if value is None else float(value), away)
        return self.last

    def _divergence(self, uncut: nn.Module) -> float | None:
        host = self.host
        with isolated_rng(self.config.seed):
            found = mean_divergence(
                uncut,
                plain.plain(host.model),
                list(host.calibration_batches(min(COMPARED, self.config.calibration_samples))),
            )
        if found is None or host.accelerator.num_processes == 1:
            return found
        tensor = torch.tensor([found], dtype=torch.float64, device=host.accelerator.device)
        return host.accelerator.reduce(tensor, reduction="mean").item()

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

    def worse(self, now: Measured) -> bool:
        """Is the model worse than just after the cut of the open stage, beyond the noise?"""
        cut = self.just_cut
        if now.value is not None and cut.value is not None:
            return verdicts.worse(now.value, cut.value, self.host.greater_is_better, self.host.validation_rows)
        if now.divergence is not None and cut.divergence is not None:
            return verdicts.farther(now.divergence, cut.divergence)
        return False

    def spoiled(self, now: Measured) -> bool:
        """The same in the midst of training, of its loss where the evaluation has one: a share of right answers moves
        by points on the way to a better one."""
        loss, cut = ((moment.metrics or {}).get(LOSS) for moment in (now, self.just_cut))
        if loss is None or cut is None:
            return self.worse(now)
        return verdicts.worse(loss, cut, greater_is_better=False)

    def words(self, now: Measured) -> str:
        """A moment beside the one just after the cut, for people."""
        cut = self.just_cut
        if now.value is not None:
            names = dict.fromkeys(name for name in (self.host.metric_name, LOSS) if name in (now.metrics or {}))
            return ", ".join(f"{n} {now.metrics[n]:.4g}, {cut.metrics[n]:.4g} just after the cut" for n in names)
        return f"{now.divergence:.3g} nats an answer from the uncut model, {cut.divergence:.3g} just after the cut"

    def loss_of(self, now: Measured) -> str | None:
        """A warning where the run lost more than a few points, or a tenth of the perplexity; None where it did not."""
        if now.value is None and now.divergence is not None:
            return divergence_warning(now.divergence)
        before, after = self.baseline.metrics or {}, now.metrics or {}
        for name, greater in ((self.host.metric_name, self.host.greater_is_better), (LOSS, False)):
            if text := loss_warning(name, before.get(name), after.get(name), greater):
                return text
        return None

    def come_back(self, value: float | None, chance: float | None = None) -> bool:
        """Is the model close enough to the uncut one to be cut again? Where the user has set `stage_threshold` or
        `max_metric_drop`, that says it.

        Args:
            chance: task loss of knowing nothing.
        """
        said = self.config.stage_threshold is not None or self.config.max_metric_drop is not None
        if said or value is None or self.baseline.value is None:
            return True
        scale = chance if self.host.metric_name.endswith("loss") else None
        return verdicts.come_back(value, self.baseline.value, self.host.greater_is_better, scale)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {name: list(getattr(self, name)) for name in MOMENTS}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for name in MOMENTS:
            setattr(self, name, Measured(*values[name]))
