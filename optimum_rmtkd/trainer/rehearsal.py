"""One pass over a few rows, before the first expensive step: is there what the terms on the models' answers compare?

Knows a run, its models and batches; no trainer.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..batches import evaluating, explained, first_samples, to_device
from ..distillation import DistillationStep, Teacher
from ..distillation.objectives.answers import Answers
from ..distillation.teachers import without_labels
from ..errors import RMTKDError
from .data import isolated_rng
from .run import Run
from .step import Around, named_outputs
from .streaming import Plan
from .tutor import step_on


__all__ = ["outputs_on", "rehearse"]

logger = logging.getLogger(__name__)

ROWS = 4  # that are looked at


def rehearse(run: Run, model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Compute the terms on answers once. Of the recipe's own choice those are left out that cannot be. No process
    waits for another one here.

    Args:
        model: the student, whole.
        batch: on any device, with what is there for the teacher alone.

    Raises:
        RMTKDError: a term that was named, or nothing left, or a given teacher without such answers: why.
        CalibrationError: the model cannot run on the batch.
    """
    tutor = run.tutor
    reading = [objective for objective in tutor.objectives if objective.reads_answers]
    if not reading:
        return
    batch = first_samples(batch, ROWS)
    device = next(model.parameters()).device
    plan = _plan(run, model, None, reading, batch)
    ours = outputs_on(run, model, batch, plan and plan.student_answers())
    step = _step(model, batch, ours, ours, plan)
    for objective in reading:
        objective.to(device)
        objective.setup(model, None if tutor.given is None else tutor.given.model, {})
        try:
            objective(step)
        except RMTKDError as error:
            if run.parts.named or len(tutor.objectives) == 1:
                raise
            tutor.objectives.remove(objective)
            headless = getattr(model, "base_model", None) is model  # which nobody expects to answer
            logger.log(
                logging.INFO if headless else logging.WARNING,
                "%s is left out, there is nothing that it could compare: %s What remains: %s.",
                type(objective).__name__,
                error,
                ", ".join(objective.label for objective in tutor.objectives),
            )
    if tutor.given is not None and (reading := [o for o in tutor.objectives if o.reads_answers]):
        step = _taught_step(run, model, batch, ours if plan is None else None, reading)
        for objective in reading:
            objective(step)


@torch.no_grad()
def outputs_on(
    run: Run, model: nn.Module, batch: Mapping[str, Any], around: Around | None = None
) -> Mapping[str, Any]:
    """What the model, whole, returns by name where it is not told its labels.

    Raises:
        CalibrationError: it cannot run on the batch.
    """
    host = run.host
    inputs = without_labels(model, host.columns.for_calibration(first_samples(batch, ROWS)), host.label_names)
    inputs = to_device(dict(inputs), next(model.parameters()).device)
    with isolated_rng(run.config.seed), evaluating(model), named_outputs(model), host.accelerator.autocast():
        with explained(model, inputs, 0), around or contextlib.nullcontext():
            return model(**inputs)


def _place(teacher: Teacher) -> torch.device | None:
    """Device of a teacher's models; None where it has none."""
    return next((parameter.device for model in teacher.models for parameter in model.parameters()), None)


@torch.no_grad()
def _taught(run: Run, batch: Mapping[str, Any]) -> Any:
    """Answers of the teacher that was given."""
    given = run.tutor.given
    if (place := _place(given)) is not None:
        batch = to_device(dict(batch), place)
    with isolated_rng(run.config.seed), run.host.accelerator.autocast():
        outputs, _ = given(batch, (), drop=run.host.label_names)
    return outputs


def _plan(run: Run, model: nn.Module, teacher: Any, reading: list, batch: Mapping[str, Any]) -> Plan | None:
    """Whether the answers on these rows are too many to be held at once."""
    batch = to_device(dict(batch), next(model.parameters()).device)
    read = run.host.columns.for_calibration(batch)
    return run.loss.streaming.plan(model, teacher, reading, batch, read, "apart", run.config.logits_chunk)


def _taught_step(run: Run, model: nn.Module, batch: Mapping[str, Any], whole: Any, reading: list) -> DistillationStep:
    """Against the teacher that was given. Whole answers are compared where it lies on another device than the model,
    which some ways of training move late.

    Args:
        whole: what the student returned; None where its answers were made as a stream.
    """
    given, place = run.tutor.given, next(model.parameters()).device
    apart = _place(given) not in (None, place)
    plan = None if apart else _plan(run, model, given, reading, batch)
    if plan is None:
        ours = outputs_on(run, model, batch) if whole is None else whole
        return _step(model, batch, ours, to_device(_taught(run, batch), place))
    ours = outputs_on(run, model, batch, plan.student_answers())
    with plan.teacher_answers():
        theirs = None if plan.cached else to_device(_taught(run, batch), place)
    return _step(model, batch, ours, theirs, plan, given)


def _step(
    model: nn.Module, batch: Mapping[str, Any], ours: Any, theirs: Any, plan: Plan | None = None, teacher: Any = None
) -> DistillationStep:
    batch = to_device(dict(batch), next(model.parameters()).device)
    stream = None if plan is None else plan.stream(batch, Answers.of(model), ours, teacher, theirs)
    return step_on(model, batch, student_outputs=ours, teacher_outputs=theirs, stream=stream)
