"""The moments of transformers' training loop that concern a run, and patience that counts from the last cut.

Knows the callbacks of transformers and a run; no trainer.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import CallbackHandler, ExportableState, TrainerControl

from ...signals import Termination
from ..run import Run


__all__ = ["Patience", "StageCallback", "VerdictCallback"]

logger = logging.getLogger(__name__)


class StageCallback(TrainerCallback):
    """Tells the run that training began or a step ended. At both moments the gradients have been cleared.

    Args:
        ended: called after each optimizer step, before the run hears of it.
    """

    def __init__(self, run: Run, patience: Patience, termination: Termination, ended: Callable[[], None]):
        self.run, self.patience, self.termination, self.ended = run, patience, termination, ended

    def on_train_begin(self, args, state, control: TrainerControl, **kwargs):
        self.patience.begin()
        with _flags_kept(control), self.termination.busy():
            self.run.begin()
        self.termination.soon = True

    def on_pre_optimizer_step(self, args, state, control: TrainerControl, optimizer=None, **kwargs):
        self.run.tutor.companions.step(optimizer)

    def on_evaluate(self, args, state, control: TrainerControl, metrics=None, **kwargs):
        for transform in self.run.parts.transforms:
            transform.on_evaluate(metrics or {}, self.run.progress)

    def on_step_end(self, args, state, control: TrainerControl, **kwargs):
        self.ended()
        step, termination, due = state.global_step, self.termination, self.run.is_due(state.global_step)
        long = due or control.should_evaluate or control.should_save or step >= state.max_steps
        leaving = termination.agreed(self.run.host.accelerator, now=long)
        with _flags_kept(control), termination.busy(not leaving and due):
            self.run.after_step(step, leaving)


class VerdictCallback(TrainerCallback):
    """Judges the last stage before any other callback hears that training is over: one that saves the model then saves
    the one that stands.

    Args:
        settle: judges.
    """

    def __init__(self, termination: Termination, settle: Callable[[], None]):
        self.termination, self.settle = termination, settle

    def on_train_end(self, args, state, control: TrainerControl, **kwargs):
        self.termination.over()
        self.settle()


class _flags_kept:
    """What `log` and an evaluation inside a callback clear: without it the step's own log line would be swallowed."""

    names = ("should_log", "should_evaluate", "should_save")

    def __init__(self, control: TrainerControl):
        self.control = control

    def __enter__(self):
        self.values = {name: getattr(self.control, name) for name in self.names}

    def __exit__(self, *exception):
        for name, value in self.values.items():
            setattr(self.control, name, value)


class Patience:
    """Early stopping looks for the best model; before the last cut that is a model of another size.

    A stop that a callback asks for after an evaluation is not granted while cuts are to come, and callbacks that count
    (`EarlyStoppingCallback`, or any with a `patience` of its own) count anew after each cut. A stop asked for at any
    other moment (a time limit, a signal, a log line), or because the metric or a loss is not finite, is granted as
    ever.

    A cut that is due and waits for its `stage_threshold` may never come: from then on the callbacks count anew, and
    their stop is granted.
    """

    def __init__(self, run: Run, handler: CallbackHandler):
        self.run, self.handler = run, handler
        self._fresh: list[tuple[TrainerCallback, dict[str, Any]]] = []
        self._granted = self._warned = False
        self.remember()

    def remember(self) -> None:
        """Before a training: where the counting of callbacks begins that were not there before."""
        known = {id(callback) for callback, _ in self._fresh}
        callbacks = _patient(self.handler.callbacks)
        self._fresh += [(callback, _unused(callback)) for callback in callbacks if id(callback) not in known]
        self._before = [_numbers(callback) for callback, _ in self._fresh]

    def begin(self) -> None:
        """The training has begun, and the callbacks know it: numbers that they have set are no counts. (Those of one
        that a checkpoint gave back may be.)"""
        before = self._before
        self.remember()
        for (callback, fresh), earlier in zip(self._fresh, before, strict=False):
            if not isinstance(callback, ExportableState):
                now = _numbers(callback)
                fresh.update({name: now[name] for name in now if name not in earlier or now[name] != earlier[name]})
        self._warned = False

    def renew(self) -> None:
        """The model has another size, a cut begins to wait, or weights were put back: count anew. What is no number
        any more (a file that was opened) stays."""
        for callback, fresh in self._fresh:
            now = _numbers(callback)
            vars(callback).update({name: value for name, value in fresh.items() if name in now})

    def grant(self, control: TrainerControl, asked_before: bool) -> None:
        """After a line was logged: a stop that it led to is none that an evaluation led to."""
        self._granted |= control.should_training_stop and not asked_before

    def weigh(self, control: TrainerControl, asked_before: bool, metrics: Mapping[str, Any]) -> None:
        """After an evaluation: take a stop back that it led to, where cuts are to come."""
        run = self.run
        granted = asked_before or self._granted or _broken(metrics, run.host.metric_name)
        self._granted = False
        # a cut that waits for a threshold of the user's may never come
        may_never_come = run.agenda.waits and run.config.stage_threshold is not None
        if granted or not control.should_training_stop or not run.cuts_to_come or may_never_come:
            return
        control.should_training_stop = False
        if not self._warned:
            self._warned = True
            logger.warning(
                "A callback asked to stop after the evaluation at step %d, before the last cut: training goes on, and "
                "patience counts from the last cut. To end it all the same, stop in on_step_end.",
                run.host.step,
            )


def _patient(callbacks: Iterable[TrainerCallback]) -> list[TrainerCallback]:
    return [
        c for c in callbacks if isinstance(c, EarlyStoppingCallback) or any("patience" in name for name in vars(c))
    ]


def _unused(callback: TrainerCallback) -> dict[str, Any]:
    """Its numbers before it counted. One that can say its arguments, and takes them, is made anew: a resumed run gives
    it back in the midst of counting."""
    if isinstance(callback, ExportableState):
        arguments = callback.state().get("args", {})
        if _takes(type(callback), arguments):
            callback = type(callback)(**arguments)
    return _numbers(callback)


def _takes(made: Callable, arguments: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(made).bind(**arguments)
    except TypeError:
        return False
    return True


def _broken(metrics: Mapping[str, Any], judged: str) -> bool:
    values = [value for name, value in metrics.items() if name == judged or name.endswith("loss")]
    return any(isinstance(value, float) and not math.isfinite(value) for value in values)


def _numbers(callback: TrainerCallback) -> dict[str, Any]:
    return {k: v for k, v in vars(callback).items() if v is None or isinstance(v, (bool, int, float))}
