"""Hooks of the loss: what a trainer computes as the task's loss, and all terms around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Trainer

from ...distillation.heads import output_layer
from ...distillation.objectives.answers import Answers
from ...distillation.teachers import without_labels
from ...errors import RMTKDError
from ..streaming import TASK
from .names import instead
from .own_loss import (
    carries_gradient,
    counting,
    items_of,
    standing_alone,
    told_what_it_takes,
    whole_head,
    whole_result,
)


__all__ = ["LossHooks"]


class LossHooks:
    """In front of a trainer: `compute_loss` is the sum of all terms where the model trains, the task's elsewhere."""

    _term = _blind = False  # the task's term is being computed; from outputs without gradient
    _loss_alone = False  # an evaluation wants no outputs
    _calls_head: bool | None = None  # a loss of its own calls the output layer; None: not seen yet

    @property
    def _whole_loss(self) -> bool:
        """Does the `compute_loss` of a class in front of the mixin, or behind it, stand for all terms, and not for the
        task's alone? `replaces_loss` says so, in either."""
        return bool(getattr(self, "replaces_loss", False))

    @property
    def _in_front(self) -> bool:
        """Is `compute_loss` another one than ours: that of a subclass, or a function set on this object?"""
        own = self.compute_loss
        return getattr(own, "__func__", own) is not LossHooks.compute_loss

    @property
    def _overrides_loss(self) -> bool:
        """Does what is in front compute the task's loss?"""
        return self._in_front and not self._whole_loss

    @property
    def _own_loss(self) -> bool:
        """Is the task's loss computed by other code than Trainer's: the user's, behind the mixin as well, or a
        library's? It may read columns that no model takes, and need no labels."""
        return self._overrides_loss or self.compute_loss_func is not None or not _is_trainers(super().compute_loss)

    def _their_loss(self):
        """The `compute_loss` that gives the task's term."""
        return self.compute_loss if self._overrides_loss else super().compute_loss

    def _adapt_losses(self) -> None:
        # Our loss is averaged over the micro-batches, whatever a class says of its own. Inferred, it would be wrong:
        # BERT & co. swallow `num_items_in_batch` through **kwargs and ignore it, so loss and gradients would grow with
        # accumulation steps and processes (transformers #47688).
        self.loss_is_scaled_for_ga = self._whole_loss and bool(self.loss_is_scaled_for_ga)
        if (smooth := self.label_smoother) is not None:
            # transformers knows the causal models, whose labels are shifted, by the names of its own classes
            self.label_smoother = lambda outputs, labels, shift_labels=False, **rest: smooth(
                outputs, labels, shift_labels=shift_labels or self._shifted(), **rest
            )
        if self.compute_loss_func is not None:
            self.compute_loss_func = counting(self.compute_loss_func, self._shifted)

    def _shifted(self) -> bool:
        return Answers.of(self._host.model).shifted

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Evaluation, and what an override calls: the task loss. Training: sum over objectives of weight * term.

        `num_items_in_batch` is withheld from the model's loss: all terms alike are weighed by
        `DistillationStep.share`.
        """
        behind = self._a_micro_batch(super().compute_loss)
        whole = self._whole_loss and not self._in_front and not _is_trainers(super().compute_loss)
        if not model.training or not self._host.run.active or self._term or whole:
            inputs = self._host.columns.for_student(inputs)
            if self._loss_alone and not self._term and self._task_comes_about() == "model":
                loss = self._host.run.loss.of_labels(self._host.model, inputs, lambda read: model(**read))
                if loss is not None:
                    return (loss, {}) if return_outputs else loss
            with whole_head(self._host.model):
                return behind(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        loss, outputs = self._distil(model, inputs, behind)
        return (loss, outputs) if return_outputs else loss

    def _a_micro_batch(self, compute_loss: Callable) -> Callable:
        """A `compute_loss` that is told what the Trainer's is, of the micro-batch at hand: `num_items_in_batch` is the
        number of its labels. One that replaces the whole loss, and says that it is scaled for accumulation, hears of
        the accumulated batch. The Trainer's own is told of none."""
        theirs, owner = told_what_it_takes(compute_loss), type(self).__name__

        def told(model, inputs, return_outputs=False, num_items_in_batch=None):
            if _is_trainers(compute_loss):
                return compute_loss(model, inputs, return_outputs=return_outputs)
            if self.loss_is_scaled_for_ga and model.training:
                return theirs(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
            items = items_of(inputs, self._shifted())
            with standing_alone(self):
                result = theirs(model, inputs, return_outputs=return_outputs, num_items_in_batch=items)
            return whole_result(result, owner) if return_outputs else result

        return told

    def _distil(self, model, inputs, task_loss_of) -> tuple[torch.Tensor, Any]:
        """(sum of all terms, outputs).

        Args:
            task_loss_of: `compute_loss` of the trainer below, or an override of it.
        """
        columns, student, inside = self._host.columns, self._host.model, self._host.inside

        def plain_outputs(inputs):
            return inside.run(model, without_labels(student, columns.for_calibration(inputs), self.label_names))

        def overheard(read, tasked: bool, compared: bool, around):
            loss = self._task_loss(model, dict(inputs), task_loss_of, return_outputs=False) if tasked else None
            return loss, plain_outputs(read) if compared else {}

        def forward(inputs, tasked: bool, compared: bool, around):
            if not tasked:  # the data may be unlabelled
                with around or contextlib.nullcontext():
                    return None, model(**columns.for_calibration(inputs))
            if compared and (self._blind or task == "apart" and around is not None):
                with self._watched_head():
                    loss = self._task_loss(model, dict(inputs), task_loss_of, return_outputs=False)
                with around or contextlib.nullcontext():
                    return loss, plain_outputs(inputs)
            offered = dict(inputs)  # label smoothing takes the labels out
            loss, outputs = self._task_loss(model, inputs, task_loss_of, return_outputs=True)
            if compared and torch.is_grad_enabled() and not carries_gradient(outputs):
                self._blind, outputs = True, plain_outputs(offered)
            return loss, outputs

        task, forward = self._task_comes_about(), overheard if inside.wraps else forward
        read, progress = inside.read(inputs), self._host.run.progress
        return self._host.run.loss(student, read, forward, columns.for_student, progress, task)

    def _task_comes_about(self) -> TASK:
        """How the task's loss is computed. Of code that is not known, by whether it was seen to call the output layer,
        the first time that it matters."""
        if not self._own_loss:
            return "model" if self.label_smoother is None else "outputs"
        return "outputs" if self._calls_head else "apart"

    @contextlib.contextmanager
    def _watched_head(self) -> Iterator[None]:
        """While open, remember whether the output layer is called: not by a loss that is fused with it (TRL)."""
        layer = output_layer(self._host.model)
        if layer is None or self._calls_head is not None:
            yield
            return
        called: list[bool] = []
        handle = layer.register_forward_pre_hook(lambda module, args: called.append(torch.is_grad_enabled()))
        try:
            yield
        finally:
            handle.remove()
        self._calls_head = any(called)

    def _task_loss(self, model, inputs, task_loss_of, return_outputs: bool) -> Any:
        labelled = any(name in inputs for name in self.label_names)  # smoothing takes them out
        self._term = True
        try:
            with whole_head(self._host.model):
                return task_loss_of(model, inputs, return_outputs=return_outputs)
        except ValueError as error:
            if labelled:
                raise
            raise RMTKDError(
                f"The task loss of a batch without {' or '.join(self.label_names)}: {error} Give labels, or "
                "leave TaskLoss out of the objectives to distil on unlabelled data."
            ) from error
        finally:
            self._term = False

    @contextlib.contextmanager
    def _in_charge(self) -> Iterator[None]:
        """While open, what `Trainer.training_step` calls as `compute_loss` is the whole loss; a subclass's own gives
        its task term."""
        if not self._in_front or not self._host.run.active:
            yield
            return
        theirs = self._a_micro_batch(self.compute_loss)

        def whole(model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = self._distil(model, inputs, theirs)
            return (loss, outputs) if return_outputs else loss

        with instead(self, compute_loss=theirs if self._whole_loss else whole):
            yield

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **generation):
        """As the trainer's own, without columns that are there for the teacher alone."""
        told = contextlib.nullcontext()
        if self._in_front:
            told = instead(self, compute_loss=self._a_micro_batch(self.compute_loss))
        self._loss_alone = prediction_loss_only
        try:
            with told:
                inputs = self._host.columns.for_student(inputs)
                return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **generation)
        finally:
            self._loss_alone = False

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As the trainer's own, with the batch transforms applied and the units of the whole batch counted."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        return _LateBatches(batches, self._begin_batch), num_items_in_batch

    def _begin_batch(self, batches: list) -> list:
        inside = self._host.inside
        if not inside.wraps:
            return self._host.run.begin_batch(batches)
        self._host.run.begin_batch([inside.read(batch) for batch in batches])
        return batches

    def _get_num_items_in_batch(self, batch_samples, device):
        # of which the model is not told, but a compute_loss that is the whole loss is
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga and self._model_takes_items
        try:
            return super()._get_num_items_in_batch(batch_samples, device)
        finally:
            self.model_accepts_loss_kwargs = False

    def _end_step(self) -> None:
        """An optimizer step is done: was it made on our loss?"""
        computed, self._host.run.loss.computed = self._host.run.loss.computed, 0
        if not computed and not self._whole_loss:
            self._host.run.loss.warn_once(
                "%s trains on a loss of its own: the step was made without the distillation terms. Its training_step "
                "has to call self.compute_loss or super().training_step; or say replaces_loss = True.",
                type(self).__name__,
            )


def _is_trainers(compute_loss: Callable) -> bool:
    """Is it that of transformers' Trainer itself?"""
    return getattr(compute_loss, "__func__", compute_loss) is Trainer.compute_loss


class _LateBatches(list):
    """Micro-batches that are made ready when the training loop begins to go through them.

    A resumed run gets its random numbers back after the batches were fetched and before they are used: transforms that
    draw must wait until then.
    """

    def __init__(self, batches: list, ready):
        super().__init__(batches)
        self._ready = ready

    def __iter__(self):
        return iter(self._ready(list(super().__iter__())))
