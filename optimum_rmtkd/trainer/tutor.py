"""Who teaches and what is compared: the teacher of the moment, the objectives made ready for it and the student.

Knows models, objectives and batches; no trainer, no run, no stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..batches import evaluating, padding_mask
from ..config import RMTKDConfig
from ..distillation import (
    DistillationObjective,
    DistillationStep,
    EMATeacher,
    FrozenTeacher,
    Teacher,
    capture,
    compose,
)
from ..distillation.objectives.answers import Answers
from ..distillation.teachers import in_precision_of, without_labels
from ..errors import RMTKDError
from . import checkpoint, plain
from .companions import Companions
from .data import isolated_rng
from .swap import hold


__all__ = ["Tutor", "own_teacher", "step_on"]

Batches = Callable[[], Iterable[Mapping[str, Any]]]


class Tutor:
    """The teacher's side of a run.

    Attributes:
        objectives: all terms of the loss; `active` are those that found something to compare.
        given: a teacher that was passed in; None for self-distillation.
        described: that teacher, as a resumed run must have it.
        taught_by_itself: the given teacher started from the very model that is cut.
        teacher: who teaches now; None while the model is fine-tuned.
        before: the model before the last cut, kept where it may be needed again (teacher "previous", roll-back).
        projections, projections_before: teacher's stream -> student's, now and before the last cut.
        companions: what is trained beside the student.
    """

    def __init__(
        self,
        objectives: list[DistillationObjective],
        companions: Companions,
        label_names: Iterable[str],
        config: RMTKDConfig,
    ):
        self.objectives, self.companions, self.config = objectives, companions, config
        self.label_names = tuple(label_names)
        self.given: Teacher | None = None
        self.described: str | None = None
        self.taught_by_itself = False
        self.reset()

    def reset(self) -> None:
        """Forget the run; a teacher that was given stays."""
        self._let_go: Callable[[], None] = lambda: None
        self.teacher: Teacher | None = None
        self.before: nn.Module | None = None
        self.projections: dict[str, torch.Tensor] = {}
        self.projections_before: dict[str, torch.Tensor] = {}

    @property
    def previous(self) -> bool:
        """Whether the model before each cut teaches."""
        return self.given is None and self.config.teacher == "previous"

    def follow(self, projections: Mapping[str, torch.Tensor], before: nn.Module | None) -> None:
        """The student was cut.

        Args:
            projections: its stream before the cut -> after it.
            before: the model before, where it may be needed again.
        """
        cut = {name: matrix.detach().float() for name, matrix in projections.items()}
        self.before, self.projections_before = before, self.projections
        if self.given is not None or self.config.teacher == "initial":
            self.projections = compose(self.projections, cut)
        else:
            self.projections = cut if self.previous else {}

    def step_back(self) -> None:
        """The student is what it was before the last cut. The teacher before `before` is gone: "previous" teaches the
        model what it was itself."""
        self.projections = {} if self.previous else self.projections_before

    @property
    def active(self) -> list[DistillationObjective]:
        """Those that found something to compare."""
        return [objective for objective in self.objectives if objective.active]

    def let_go(self) -> None:
        """A given teacher asks its own models again, where they are held sharded."""
        self._let_go()
        self._let_go = lambda: None

    def appoint(
        self,
        model: nn.Module,
        initial: nn.Module,
        batches: Batches,
        optimizer: Any,
        restored: Mapping[str, torch.Tensor] | None = None,
        strip: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda batch: batch,
    ) -> None:
        """Choose the teacher and set the objectives up for the student and it; fit those that look at data first.
        Only then it is held as the student is: before, the processes ask it about batches of different numbers.

        Where another model teaches there are no projections: none leads from its stream to the student's.

        Args:
            initial: the uncut model.
            batches: gives the calibration data, with what is there for the teacher alone.
            optimizer: the student's.
            restored: `state_dict` of an earlier run, which takes the place of fitting.
            strip: leaves in a batch what the student takes.

        Raises:
            RMTKDError: models that an objective cannot work with, or nothing left to compare.
        """
        self.let_go()
        with plain.at_hand(self.companions.accelerator.device, initial, self.before):
            self._appoint(model, initial, batches, optimizer, restored, strip)
        let_go = hold(self.teacher, model)
        if self.given is not None:  # of the others there is a new one each time
            self._let_go = let_go

    def _appoint(self, model, initial, batches, optimizer, restored, strip) -> None:
        config, device = self.config, self.companions.accelerator.device
        copy = lambda: plain.plain_copy(model).to(device)  # noqa: E731
        teacher = self.given or own_teacher(config.teacher, initial, self.before, copy, config.ema_decay)
        if average := checkpoint.subset("ema", restored or {}):
            checkpoint.load_into(teacher.model, average)
        self.teacher, projections = teacher, self.projections
        if self.given is not None and not self.taught_by_itself:
            projections = {}
        for objective in self.objectives:
            objective.to(next(model.parameters()).device)
            objective.setup(model, teacher.model, projections)
        if not self.active:
            raise RMTKDError("No objective has anything to compare for these models; add TaskLoss or KLDivergence.")
        if restored is None:
            self._fit(model, batches, strip)
            self.companions.collect(self.active, teacher, optimizer)
            return
        for objective in self.active:
            objective.load_tensors(_on_device(checkpoint.subset(f"objective/{objective.label}", restored), model))
        self.companions.collect(self.active, teacher, optimizer)
        self.companions.load_state_dict(checkpoint.subset("extra", restored))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What objectives and the parts trained beside the student need in a resumed run: the same on all
        processes."""
        tensors = checkpoint.flatten("extra", self.companions.state_dict())
        for objective in self.objectives:
            tensors |= checkpoint.flatten(f"objective/{objective.label}", objective.state_dict())
        return tensors

    def side(
        self, inputs: Mapping[str, Any], objectives: list[DistillationObjective], model: nn.Module
    ) -> DistillationStep:
        """A step with the teacher's side filled in, for those objectives that look at it.

        Args:
            inputs: a batch on the device.
            model: the student, which says how labels are read.
        """
        outputs, features = None, {}
        if objectives:
            paths = dict.fromkeys(path for objective in objectives for path in objective.features().teacher)
            with self.companions.accelerator.autocast():
                outputs, features = self.teacher(inputs, paths, drop=self.label_names)
        return step_on(model, inputs, teacher_outputs=outputs, teacher_features=features)

    @torch.no_grad()
    def _fit(self, model: nn.Module, batches: Batches, strip: Callable) -> None:
        """Let those objectives that ask for it see the teacher on the calibration data, then one batch of both
        models."""
        accelerator = self.companions.accelerator
        watching = [objective for objective in self.active if objective.observes]
        if not watching:
            return
        with isolated_rng(self.config.seed):
            for batch in batches():
                step = self.side(batch, watching, model)
                for objective in watching:
                    objective.observe(step)
        for objective in watching:
            objective.finish(lambda tensor: accelerator.reduce(tensor, reduction="sum"))
        with isolated_rng(self.config.seed):
            step = self._both(next(iter(batches())), watching, model, strip)
        for objective in watching:
            objective.prepare(step)

    def _both(self, inputs: Mapping[str, Any], objectives: list, model: nn.Module, strip: Callable):
        """Features of both sides on one batch, the student in evaluation mode."""
        step = self.side(inputs, objectives, model)
        paths = dict.fromkeys(path for objective in objectives for path in objective.features().student)
        with evaluating(model), capture(model, paths) as features, self.companions.accelerator.autocast():
            model(**in_precision_of(model, without_labels(model, strip(step.inputs), self.label_names)))
        return dataclasses.replace(step, student_features=features)


def step_on(model: nn.Module, batch: Mapping[str, Any], **sides: Any) -> DistillationStep:
    """A step whose mask and way of reading labels are those of the batch and the student.

    Args:
        model: the student.
        **sides: outputs and features of either model.
    """
    answers = Answers.of(model)
    return DistillationStep(
        batch, mask=padding_mask(batch), shifted=answers.shifted, decoding=answers.decoding, **sides
    )


def own_teacher(
    kind: str, initial: nn.Module, before: nn.Module | None, copy: Callable[[], nn.Module], decay: float
) -> Teacher:
    """The model's former self.

    Args:
        kind: "initial", "previous" or "ema", see `RMTKDConfig.teacher`.
        before: the model before its last cut; None where there was none.
        copy: gives a copy of the model as it is.
    """
    if kind == "ema":
        return EMATeacher(copy(), decay)
    return FrozenTeacher(before if kind == "previous" and before is not None else initial)


def _on_device(tensors: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in tensors.items()}
