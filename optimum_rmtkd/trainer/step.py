"""The loss of one step, from student, teacher, objectives and a batch. Knows no trainer and no run."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..distillation import BatchTransform, DistillationObjective, DistillationStep, TaskLoss, capture
from ..distillation.counts import UNITS, masked_labels, total_units
from ..distillation.objectives.answers import Answers
from ..distillation.teachers import without_labels
from ..errors import RMTKDError
from .streaming import TASK, Streaming
from .tutor import Tutor


__all__ = ["Around", "StepLoss", "named_outputs"]

logger = logging.getLogger(__name__)

Around = contextlib.AbstractContextManager
Forward = Callable[[Mapping[str, Any], bool, bool, Around | None], tuple[torch.Tensor | None, Any]]


class StepLoss:
    """Weighs the terms of one (micro-)batch and remembers each for the log.

    Attributes:
        totals: (4,) units (`distillation.counts.UNITS`) in the accumulated batch at hand, over all processes; None:
            each batch stands for itself.
        parts: micro-batches in it, over all processes.
        streaming: whether the logits of a step are made in chunks.
        computed: losses since the last optimizer step.
        reentrant: activations are recomputed by reentrant checkpointing, whose inner features carry no gradient.
    """

    def __init__(self, tutor: Tutor, transforms: list[BatchTransform], host: Any, reentrant: bool = False):
        self.tutor, self.transforms, self.host, self.reentrant = tutor, transforms, host, reentrant
        self._task = TaskLoss(1.0)
        self.streaming = Streaming(lambda: self.accelerator.autocast(), tutor.label_names)
        self.totals: torch.Tensor | None = None
        self.parts = 1
        self.computed = 0
        self._terms: dict[str, list] = {}
        self._warned: set[str] = set()

    @property
    def accelerator(self) -> Any:
        """The processes of the run: those of the moment, a search over hyperparameters makes others for each trial."""
        return self.host.accelerator

    @property
    def objectives(self) -> list[DistillationObjective]:
        """Those that found something to compare; the task's alone while nobody teaches."""
        return self.tutor.active if self.tutor.teacher is not None else [self._task]

    def begin_batch(self, model: nn.Module, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Count the units of an accumulated batch: what every mean in it is taken over."""
        answers = Answers.of(model)
        totals = total_units(batches, answers.shifted, answers.decoding)
        if totals[UNITS.index("labels")] > totals[UNITS.index("answers")]:
            self.look_at_labels(model, batches)
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals.to(self.accelerator.device), reduction="sum").cpu()
        self.totals, self.parts = totals, len(batches) * self.accelerator.num_processes
        return batches

    def __call__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        forward: Forward,
        strip: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda batch: batch,
        progress: float = 0.0,
        task: TASK = "outputs",
    ) -> tuple[torch.Tensor, Any]:
        """(weighted sum of the terms, student's outputs).

        Args:
            model: the student, without wrappers.
            inputs: a batch on the device, with what is there for the teacher alone.
            forward: (inputs, whether a task loss is wanted, whether outputs are compared, None or a context to open
                around the pass that these come from) -> (task loss or None, the student's outputs).
            strip: leaves in a batch what the student takes.
            progress: share of the distillation that is done.
            task: how `forward` comes to the task's loss.
        """
        self.computed += 1
        objectives, teacher = self.objectives, self.tutor.teacher
        requests = [objective.features() for objective in objectives]
        paths = dict.fromkeys(path for request in requests for path in request.student)
        with contextlib.ExitStack() as stack:
            for transform in self.transforms if teacher is not None else ():
                inputs = stack.enter_context(transform.around(inputs, [model, *teacher.models]))
            offered = dict(inputs)  # label smoothing takes the labels out of `inputs`
            tasked = any(isinstance(objective, TaskLoss) for objective in objectives)
            compared = any(not isinstance(objective, TaskLoss) for objective in objectives)
            read, around = strip(inputs), None
            chunk = self.tutor.config.logits_chunk
            plan = self.streaming.plan(model, teacher, objectives, offered, read, task, chunk)
            if plan is not None:
                around, compared = plan.student_answers(), True
            if plan is not None and not plan.apart:
                read, tasked = without_labels(model, read, self.tutor.label_names), False
            with capture(model, paths) as features, named_outputs(model):
                task_loss, outputs = forward(read, tasked, compared, around)
            self._check(model, outputs, features, paths)
            asked = [o for o in objectives if o.needs_teacher]
            if plan is not None and plan.cached:
                asked = [o for o in asked if o.features().teacher]
            with contextlib.nullcontext() if plan is None else plan.teacher_answers():
                taught = self.tutor.side(offered, asked, model)
        if plan is not None:
            stream = plan.stream(offered, Answers.of(model), outputs, teacher, taught.teacher_outputs)
            taught = dataclasses.replace(taught, stream=stream)
        step = dataclasses.replace(
            taught,
            student_outputs=outputs,
            student_features=features,
            totals=self.totals,
            parts=self.parts,
            task_loss=task_loss,
            progress=progress,
        )
        return self._weigh(step, objectives), outputs

    def of_labels(
        self, model: nn.Module, inputs: Mapping[str, Any], forward: Callable[[Mapping[str, Any]], Any]
    ) -> torch.Tensor | None:
        """The model's own loss of a batch of which nothing else is wanted, without its logits; None: they are few, or
        needed."""
        if not any(name in inputs for name in self.tutor.label_names):
            return None
        chunk = self.tutor.config.logits_chunk
        plan = self.streaming.plan(model, None, [self._task], inputs, inputs, "model", chunk)
        if plan is None:
            return None
        with named_outputs(model), plan.student_answers():
            outputs = forward(without_labels(model, inputs, self.tutor.label_names))
        return plan.stream(inputs, Answers.of(model), outputs, None, None).mean(self._task)

    def _check(self, model: nn.Module, outputs: Any, features: Mapping[str, Any], paths: Mapping[str, None]) -> None:
        if not isinstance(outputs, Mapping):
            what = (
                f"The forward of {type(model).__name__} returns a {type(outputs).__name__}, whatever its config says; "
                "expected a ModelOutput, or a dictionary: the objectives read the outputs by name."
            )
            if self.host.columns.own_loss:
                what = (
                    f"The student's outputs are a {type(outputs).__name__}; the objectives read them by name. A "
                    "compute_loss of your own returns (loss, outputs) with the outputs as the model gave them, and "
                    f"calls {type(model).__name__} without return_dict=False."
                )
            raise RMTKDError(what)
        if missing := [path for path in paths if path not in features]:
            raise RMTKDError(
                f"The forward pass did not reach the hooks of {missing[0]!r}: torch.compile drops hooks set after "
                "compilation. Set torch_compile=False, or leave out the objectives on hidden states "
                "(hidden_weight=0)."
            )
        tensors = {path: feature for path, feature in features.items() if torch.is_tensor(feature)}
        if self.reentrant and (dead := [path for path, tensor in tensors.items() if not tensor.requires_grad]):
            raise RMTKDError(
                f"{dead[0]!r} carries no gradient under reentrant activation checkpointing, so its objective would "
                "train nothing. Set gradient_checkpointing_kwargs={'use_reentrant': False}, or leave that objective "
                "out."
            )

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
        own = None if self.tutor.teacher is None else self.tutor.teacher.loss(step)
        if own is not None:
            self.note("teacher", own)
            total = total + own
        return total

    # -- said once ----------------------------------------------------------------------------------------------------

    def look_at_labels(self, model: nn.Module, batches: list[Mapping[str, Any]]) -> None:
        """Warn once where labels of padding count."""
        answers = Answers.of(model)
        count = sum(masked_labels(batch, answers.shifted, answers.decoding) for batch in batches)
        if count:
            self.warn_once(
                "%d labels of a batch count though the attention mask calls their positions padding: the task's loss "
                "is a mean over them as well, and depends on how far a batch is padded. The other terms leave them "
                "out. Set such labels to -100, as DataCollatorForLanguageModeling does.",
                count,
            )

    def warn_once(self, message: str, *values: Any) -> None:
        """A warning, the first time that it is due."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message, *values)

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
            f"loss/{label}": self.accelerator.gather((total / count).reshape(1)).mean().item()
            for label, (total, count) in self._terms.items()
        }
        self._terms.clear()
        return means


@contextlib.contextmanager
def named_outputs(model: nn.Module) -> Iterator[None]:
    """While open, a model whose config says return_dict=False answers by name all the same."""
    config = getattr(model, "config", None)
    if getattr(config, "return_dict", True):
        yield
        return
    config.return_dict = True
    try:
        yield
    finally:
        config.return_dict = False
