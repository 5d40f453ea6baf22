"""One training step's loss: student and teacher on one batch, objectives weighed and logged."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..batches import evaluating, padding_mask
from ..distillation import DistillationObjective, DistillationStep, TaskLoss, capture
from ..distillation.counts import IGNORED, UNITS, masked_labels, total_units
from ..distillation.objectives.answers import Answers
from ..distillation.teachers import without_labels
from ..errors import RMTKDError
from .columns import for_calibration, for_student


if TYPE_CHECKING:
    from .trainer import RMTKDTrainer


__all__ = ["Distiller", "LateBatches"]

logger = logging.getLogger(__name__)


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


def told_what_it_takes(function: Callable) -> Callable:
    """A loss that is not told `num_items_in_batch` where its signature has no place for it: many were written before
    the Trainer gave it."""
    taken = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD or p.name == "num_items_in_batch" for p in taken):
        return function

    def told(*args, num_items_in_batch=None, **kwargs):
        return function(*args, **kwargs)

    return told


class Distiller:
    """Computes the training loss for a trainer and remembers each term for its log.

    Attributes:
        totals: (4,) units (`distillation.counts.UNITS`) in the accumulated batch at hand, over all processes.
        parts: micro-batches in it, over all processes.
        busy: a training loss is being computed; what calls `compute_loss` now wants the task's.
    """

    def __init__(self, trainer: RMTKDTrainer):
        self.trainer = trainer
        self.totals: torch.Tensor | None = None
        self.parts = 1
        self.busy = False
        self._terms: dict[str, list] = {}
        self._losses = 0  # computed since the last optimizer step
        self._warned: set[str] = set()

    @property
    def objectives(self) -> list[DistillationObjective]:
        """Those that found something to compare."""
        return [objective for objective in self.trainer.objectives if objective.active]

    @property
    def shifted(self) -> bool:
        """Whether the answer at one position is for the label at the next."""
        return Answers.of(self.trainer.model).shifted

    @property
    def decoding(self) -> bool:
        """Whether labels belong to a decoder, of which `attention_mask` says nothing."""
        return Answers.of(self.trainer.model).decoding

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
        totals = total_units(batches, self.shifted, self.decoding)
        if totals[UNITS.index("labels")] > totals[UNITS.index("answers")]:
            self.look_at_labels(batches)
        if trainer.accelerator.num_processes > 1:
            totals = trainer.accelerator.reduce(totals.to(trainer.args.device), reduction="sum").cpu()
        self.totals, self.parts = totals, len(batches) * trainer.accelerator.num_processes
        return batches

    def loss(self, model, inputs, task_loss_of: Callable) -> tuple[torch.Tensor, Any]:
        """(weighted sum of the terms, student's outputs).

        Args:
            task_loss_of: `Trainer.compute_loss`, or an override of it.
        """
        self._losses += 1
        objectives, teacher = self.objectives, self.trainer.staging.teacher
        requests = [objective.features() for objective in objectives]
        paths = dict.fromkeys(path for request in requests for path in request.student)
        with contextlib.ExitStack() as stack:
            for transform in self.trainer.transforms:
                inputs = stack.enter_context(transform.around(inputs, [self.trainer.model, *teacher.models]))
            offered = dict(inputs)  # label smoothing takes the labels out of `inputs`
            inputs = for_student(self.trainer, inputs)
            with capture(self.trainer.model, paths) as features:
                if any(isinstance(objective, TaskLoss) for objective in objectives):
                    task_loss, outputs = self._task_loss(model, inputs, task_loss_of)
                else:  # the data may be unlabelled
                    task_loss, outputs = None, model(**for_calibration(self.trainer, inputs))
            if not isinstance(outputs, Mapping):
                raise RMTKDError(
                    f"The student's outputs are a {type(outputs).__name__}; the objectives read them by name. Set "
                    "return_dict=True in its config; a compute_loss of your own returns (loss, outputs) with the "
                    "outputs as the model gave them."
                )
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
            decoding=self.decoding,
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
        self.busy = True
        try:
            return task_loss_of(model, inputs, return_outputs=True)
        except ValueError as error:
            if labelled:
                raise
            raise RMTKDError(
                f"The task loss of a batch without {' or '.join(self.trainer.label_names)}: {error} Give labels, or "
                "leave TaskLoss out of the objectives to distil on unlabelled data."
            ) from error
        finally:
            self.busy = False

    # -- losses of the user's own -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def in_charge(self) -> Iterator[None]:
        """While open, what `Trainer.training_step` calls as `compute_loss` is the whole loss; a subclass's own gives
        its task term."""
        trainer = self.trainer
        if not trainer.overrides_loss or trainer.staging.teacher is None:
            yield
            return
        theirs = told_what_it_takes(trainer.compute_loss)

        def task(model, inputs, return_outputs):
            result = theirs(model, inputs, return_outputs=True, num_items_in_batch=self.items(inputs.get("labels")))
            if not isinstance(result, tuple) or len(result) != 2:
                raise RMTKDError(
                    f"compute_loss(..., return_outputs=True) of {type(trainer).__name__} returned a "
                    f"{type(result).__name__}; expected (loss, outputs). Distillation compares the outputs."
                )
            if torch.is_tensor(result[0]) and result[0].dim():
                raise RMTKDError(
                    f"compute_loss of {type(trainer).__name__} returned a loss of shape {tuple(result[0].shape)}; "
                    "expected a scalar, the mean over the micro-batch. Take its .mean()."
                )
            return result

        def whole(model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = self.loss(model, inputs, task)
            return (loss, outputs) if return_outputs else loss

        with self._in_place_of_theirs(whole):
            yield

    @contextlib.contextmanager
    def told_alike(self) -> Iterator[None]:
        """While open, `Trainer` may give the number of items to a `compute_loss` that does not take it."""
        theirs = told_what_it_takes(self.trainer.compute_loss)
        with self._in_place_of_theirs(theirs) if self.trainer.overrides_loss else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def _in_place_of_theirs(self, function: Callable) -> Iterator[None]:
        trainer, set_here = self.trainer, vars(self.trainer).get("compute_loss")
        trainer.compute_loss = function
        try:
            yield
        finally:
            del trainer.compute_loss
            if set_here is not None:
                trainer.compute_loss = set_here

    def counting(self, compute_loss_func: Callable) -> Callable:
        """The same, told the number of labels in the micro-batch at hand: that makes its loss a mean like the
        others."""
        told = told_what_it_takes(compute_loss_func)

        def counted(outputs, labels, num_items_in_batch=None):
            return told(outputs, labels, num_items_in_batch=self.items(labels))

        return counted

    def items(self, labels: Any) -> torch.Tensor | None:
        """Labels that are not -100, as the Trainer counts them, of one micro-batch."""
        if not torch.is_tensor(labels):
            return None
        return ((labels[..., 1:] if self.shifted and labels.dim() > 1 else labels) != IGNORED).sum()

    def end_step(self) -> None:
        """An optimizer step is done: was it made on our loss?"""
        trainer, computed = self.trainer, self._losses
        self._losses = 0
        if not computed and not trainer.replaces_loss:
            self._warn_once(
                "%s trains on a loss of its own: the step was made without the distillation terms. Its training_step "
                "has to call self.compute_loss or super().training_step; or say replaces_loss = True.",
                type(trainer).__name__,
            )

    def look_at_labels(self, batches: list[Mapping[str, Any]]) -> None:
        """Warn once where labels of padding count."""
        count = sum(masked_labels(batch, self.shifted, self.decoding) for batch in batches)
        if count:
            self._warn_once(
                "%d labels of a batch count though the attention mask calls their positions padding: the task's loss "
                "is a mean over them as well, and depends on how far a batch is padded. The other terms leave them "
                "out. Set such labels to -100, as DataCollatorForLanguageModeling does.",
                count,
            )

    def _warn_once(self, message: str, *values: Any) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message, *values)

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
        mask = padding_mask(inputs)
        return DistillationStep(
            inputs,
            teacher_outputs=outputs,
            teacher_features=features,
            mask=mask,
            shifted=self.shifted,
            decoding=self.decoding,
        )

    def pair_step(self, inputs: Mapping[str, Any], objectives: list[DistillationObjective]) -> DistillationStep:
        """Features of both sides on one batch, the student in evaluation mode."""
        step = self.teacher_step(inputs, objectives)
        model, paths = self.trainer.model, dict.fromkeys(p for o in objectives for p in o.features().student)
        with evaluating(model), capture(model, paths) as features, self.trainer.accelerator.autocast():
            model(**without_labels(model, for_calibration(self.trainer, step.inputs), self.trainer.label_names))
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
