"""One training step's loss: student and teacher on one batch, objectives weighed and logged."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..distillation import DistillationObjective, DistillationStep, TaskLoss, capture
from ..distillation.counts import total_units
from ..distillation.objectives.answers import Answers
from ..distillation.step import token_mask
from ..distillation.teachers import without_labels
from ..errors import RMTKDError


if TYPE_CHECKING:
    from .trainer import RMTKDTrainer


__all__ = ["Distiller", "LateBatches"]


class LateBatches(list):
    """Micro-batches that are made ready when the training loop begins to go through them.

    A resumed run gets its random numbers back after the batches were fetched and before they are used: transforms that
    draw must wait until then.
    """

    def __init__(self, batches: list, ready: Callable[[list], list]):
        super().__init__(batches)
        self._ready = ready

    def __iter__(self):
        return iter(self._ready(list(super().__iter__())))


class Distiller:
    """Computes the training loss for a trainer and remembers each term for its log.

    Attributes:
        totals: (3,) units (`distillation.counts.UNITS`) in the accumulated batch at hand, over all processes.
        parts: micro-batches in it, over all processes.
    """

    def __init__(self, trainer: RMTKDTrainer):
        self.trainer = trainer
        self.totals: torch.Tensor | None = None
        self.parts = 1
        self._terms: dict[str, list] = {}

    @property
    def objectives(self) -> list[DistillationObjective]:
        """Those that found something to compare."""
        return [objective for objective in self.trainer.objectives if objective.active]

    @property
    def shifted(self) -> bool:
        """Whether the answer at one position is for the label at the next."""
        return Answers.of(self.trainer.model).shifted

    @property
    def progress(self) -> float:
        """Share of the training steps that are done."""
        state = self.trainer.state
        return state.global_step / max(1, state.max_steps)

    def begin_batch(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Transform the micro-batches of an accumulated batch and count its units: what every mean in it is taken
        over."""
        trainer = self.trainer
        for transform in trainer.transforms:
            batches = [transform(trainer, batch) for batch in batches]
        totals = total_units(batches, self.shifted)
        if trainer.accelerator.num_processes > 1:
            totals = trainer.accelerator.reduce(totals.to(trainer.args.device), reduction="sum").cpu()
        self.totals, self.parts = totals, len(batches) * trainer.accelerator.num_processes
        return batches

    def loss(self, model, inputs, task_loss_of: Callable) -> tuple[torch.Tensor, Any]:
        """(weighted sum of the terms, student's outputs).

        Args:
            task_loss_of: `Trainer.compute_loss` of the parent class.
        """
        objectives, teacher = self.objectives, self.trainer.staging.teacher
        requests = [objective.features() for objective in objectives]
        paths = dict.fromkeys(path for request in requests for path in request.student)
        with contextlib.ExitStack() as stack:
            for transform in self.trainer.transforms:
                inputs = stack.enter_context(transform.around(inputs, [self.trainer.model, *teacher.models]))
            offered = dict(inputs)  # label smoothing takes the labels out of `inputs`
            inputs = teacher.strip(inputs)
            with capture(self.trainer.model, paths) as features:
                if any(isinstance(objective, TaskLoss) for objective in objectives):
                    task_loss, outputs = self._task_loss(model, inputs, task_loss_of)
                else:  # the data may be unlabelled
                    task_loss, outputs = None, model(**inputs)
            if missing := [path for path in paths if path not in features]:
                raise RMTKDError(
                    f"The forward pass did not reach the hooks of {missing[0]!r}: torch.compile drops hooks set after "
                    "compilation. Set torch_compile=False, or leave out the objectives on hidden states "
                    "(hidden_weight=0)."
                )
            self._check_gradients(features)
            taught = self.teacher_step(offered, [o for o in objectives if o.needs_teacher], prepared=True)
        step = DistillationStep(
            inputs=offered,
            student_outputs=outputs,
            teacher_outputs=taught.teacher_outputs,
            student_features=features,
            teacher_features=taught.teacher_features,
            mask=taught.mask,
            totals=self.totals,
            parts=self.parts,
            shifted=self.shifted,
            task_loss=task_loss,
            progress=self.progress,
        )
        return self._weigh(step, objectives), outputs

    def _check_gradients(self, features: Mapping[str, torch.Tensor]) -> None:
        """Reentrant checkpointing runs the blocks without a graph: what is seen inside them carries no gradient."""
        args = self.trainer.args
        if not args.gradient_checkpointing or not (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            return
        if dead := [
            path for path, feature in features.items() if torch.is_tensor(feature) and not feature.requires_grad
        ]:
            raise RMTKDError(
                f"{dead[0]!r} carries no gradient under reentrant activation checkpointing, so its objective would "
                "train nothing. Set gradient_checkpointing_kwargs={'use_reentrant': False}, or leave that objective "
                "out."
            )

    def _task_loss(self, model, inputs, task_loss_of: Callable) -> tuple[torch.Tensor, Any]:
        labelled = any(name in inputs for name in self.trainer.label_names)  # smoothing takes them out
        try:
            return task_loss_of(model, inputs, return_outputs=True)
        except ValueError as error:
            if labelled:
                raise
            raise RMTKDError(
                f"The task loss of a batch without {' or '.join(self.trainer.label_names)}: {error} Give labels, or "
                "leave TaskLoss out of the objectives to distil on unlabelled data."
            ) from error

    def teacher_step(
        self, inputs: Mapping[str, Any], objectives: list[DistillationObjective], prepared: bool = False
    ) -> DistillationStep:
        """A step with the teacher's side filled in, for those objectives that look at it."""
        trainer = self.trainer
        if not prepared:
            inputs = trainer._prepare_inputs(dict(inputs))
        outputs, features = None, {}
        if objectives:
            paths = dict.fromkeys(path for objective in objectives for path in objective.features().teacher)
            with trainer.accelerator.autocast():
                outputs, features = trainer.staging.teacher(inputs, paths, drop=trainer.label_names)
        mask = token_mask(inputs)
        return DistillationStep(
            inputs, teacher_outputs=outputs, teacher_features=features, mask=mask, shifted=self.shifted
        )

    def pair_step(self, inputs: Mapping[str, Any], objectives: list[DistillationObjective]) -> DistillationStep:
        """Features of both sides on one batch, the student in evaluation mode."""
        step = self.teacher_step(inputs, objectives)
        model, paths = self.trainer.model, dict.fromkeys(p for o in objectives for p in o.features().student)
        training = model.training
        model.eval()
        try:
            with capture(model, paths) as features, self.trainer.accelerator.autocast():
                model(**without_labels(model, step.inputs, self.trainer.label_names))
        finally:
            model.train(training)
        return dataclasses.replace(step, student_features=features)

    def _weigh(self, step: DistillationStep, objectives: list[DistillationObjective]) -> torch.Tensor:
        total = None
        for objective in objectives:
            term = objective(step)
            if not torch.is_tensor(term) or term.dim():
                got = f"a tensor {tuple(term.shape)}" if torch.is_tensor(term) else type(term).__name__
                raise RMTKDError(f"{type(objective).__name__}.forward returned {got}; expected a scalar tensor.")
            weighted = objective.weight_at(step.progress) * term
            total = weighted if total is None else total + weighted
            self.note(objective.label, term)
        own = self.trainer.staging.teacher.loss(step)
        if own is not None:
            self.note("teacher", own)
            total = total + own
        return total

    # -- log ----------------------------------------------------------------------------------------------------------

    def note(self, label: str, term: torch.Tensor) -> None:
        """Remember one micro-batch's term for the log."""
        entry = self._terms.setdefault(label, [torch.zeros((), device=term.device), 0])
        entry[0] += term.detach()
        entry[1] += 1

    def forget(self) -> None:
        """Drop the terms not logged yet."""
        self._terms.clear()

    def log_terms(self) -> dict[str, float]:
        """Mean of each term since the last call, over all processes, under loss/<label>."""
        means = {
            f"loss/{label}": self.trainer.accelerator.gather((total / count).reshape(1)).mean().item()
            for label, (total, count) in self._terms.items()
        }
        self._terms.clear()
        return means
