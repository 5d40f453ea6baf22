"""Hooks of the loss: what a trainer computes as the task's loss, and all terms around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Trainer

from ...distillation.objectives.answers import Answers
from ...distillation.teachers import without_labels
from ...errors import RMTKDError
from .own_loss import (
    carries_gradient,
    counting,
    in_place_of,
    items_of,
    told_what_it_takes,
    whole_head,
    whole_result,
)


__all__ = ["LossHooks"]


class LossHooks:
    """In front of a trainer: `compute_loss` is the sum of all terms where the model trains, the task's elsewhere."""

    # Our loss is averaged over the micro-batches. Inferred, it would be wrong: BERT & co. swallow `num_items_in_batch`
    # through **kwargs and ignore it, so loss and gradients would grow with accumulation steps and processes
    # (transformers #47688).
    loss_is_scaled_for_ga = False

    replaces_loss = False  # does a subclass's compute_loss stand for all terms, and not for the task's alone?

    _term = _blind = False  # the task's term is being computed; from outputs without gradient

    @property
    def overrides_loss(self) -> bool:
        """Does a subclass, or a function set on this object, compute the task's loss?"""
        own = self.compute_loss
        return not self.replaces_loss and getattr(own, "__func__", own) is not LossHooks.compute_loss

    @property
    def own_loss(self) -> bool:
        """The same, also below the mixin (`class X(RMTKDMixin, MyTrainer)`), or by a `compute_loss_func`."""
        known = (LossHooks.compute_loss, Trainer.compute_loss)
        theirs = [vars(cls)["compute_loss"] for cls in type(self).__mro__ if "compute_loss" in vars(cls)]
        return self.overrides_loss or self.compute_loss_func is not None or any(own not in known for own in theirs)

    def _their_loss(self):
        """The `compute_loss` that gives the task's term."""
        return self.compute_loss if self.overrides_loss else super().compute_loss

    def _adapt_losses(self) -> None:
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

        `num_items_in_batch` is withheld from the task loss: all terms alike are weighed by `DistillationStep.share`.
        """
        if not model.training or not self.run.active or self._term:
            with whole_head(self._host.model):
                inputs = self._host.columns.for_student(inputs)
                return super().compute_loss(model, inputs, return_outputs=return_outputs)
        loss, outputs = self._distil(model, inputs, super().compute_loss)
        return (loss, outputs) if return_outputs else loss

    def _distil(self, model, inputs, task_loss_of) -> tuple[torch.Tensor, Any]:
        """(sum of all terms, outputs).

        Args:
            task_loss_of: `compute_loss` of the trainer below, or an override of it.
        """
        columns, student, inside = self._host.columns, self._host.model, self._host.inside

        def plain_outputs(inputs):
            return inside.run(model, without_labels(student, columns.for_calibration(inputs), self.label_names))

        def around(read, tasked: bool, compared: bool):
            loss = self._task_loss(model, dict(inputs), task_loss_of, return_outputs=False) if tasked else None
            return loss, plain_outputs(read) if compared else {}

        def forward(inputs, tasked: bool, compared: bool):
            if not tasked:  # the data may be unlabelled
                return None, model(**columns.for_calibration(inputs))
            if self._blind and compared:
                return self._task_loss(model, inputs, task_loss_of, return_outputs=False), plain_outputs(inputs)
            offered = dict(inputs)  # label smoothing takes the labels out
            loss, outputs = self._task_loss(model, inputs, task_loss_of, return_outputs=True)
            if compared and torch.is_grad_enabled() and not carries_gradient(outputs):
                self._blind, outputs = True, plain_outputs(offered)
            return loss, outputs

        forward = around if inside.wraps else forward
        return self.run.loss(student, inside.read(inputs), forward, columns.for_student, self.run.progress)

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
        if not self.overrides_loss or not self.run.active:
            yield
            return
        theirs, owner = told_what_it_takes(self.compute_loss), type(self).__name__

        def task(model, inputs, return_outputs):
            items = items_of(inputs.get("labels"), self._shifted())
            result = theirs(model, inputs, return_outputs=return_outputs, num_items_in_batch=items)
            return whole_result(result, owner) if return_outputs else result

        def whole(model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = self._distil(model, inputs, task)
            return (loss, outputs) if return_outputs else loss

        with in_place_of(self, whole):
            yield

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **generation):
        """As the trainer's own, without columns that are there for the teacher alone."""
        told = contextlib.nullcontext()
        if self.overrides_loss:  # it may not take the number of items
            told = in_place_of(self, told_what_it_takes(self.compute_loss))
        with told:
            inputs = self._host.columns.for_student(inputs)
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **generation)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As the trainer's own, with the batch transforms applied and the units of the whole batch counted."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        return _LateBatches(batches, self._begin_batch), num_items_in_batch

    def _begin_batch(self, batches: list) -> list:
        inside = self._host.inside
        if not inside.wraps:
            return self.run.begin_batch(batches)
        self.run.begin_batch([inside.read(batch) for batch in batches])
        return batches

    def _get_num_items_in_batch(self, batch_samples, device):
        # of which the model is not told, but a compute_loss of the user's own is
        self.model_accepts_loss_kwargs = self.overrides_loss and self._model_takes_items
        try:
            return super()._get_num_items_in_batch(batch_samples, device)
        finally:
            self.model_accepts_loss_kwargs = False

    def _end_step(self) -> None:
        """An optimizer step is done: was it made on our loss?"""
        computed, self.run.loss.computed = self.run.loss.computed, 0
        if not computed and not self.replaces_loss:
            self.run.loss.warn_once(
                "%s trains on a loss of its own: the step was made without the distillation terms. Its training_step "
                "has to call self.compute_loss or super().training_step; or say replaces_loss = True.",
                type(self).__name__,
            )


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
