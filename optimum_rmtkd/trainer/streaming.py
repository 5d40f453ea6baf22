"""Whether the answers of a step are made as a stream, and of what. Knows models and batches; no trainer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..batches import main_input, padding_mask
from ..distillation import CachedTeacher, DistillationObjective, Teacher
from ..distillation.counts import IGNORED, token_labels
from ..distillation.heads import Head, Heads, Postponed
from ..distillation.objectives.answers import Answers, has_head
from ..distillation.signatures import unwrapped
from ..distillation.stream import CHUNK_NUMBERS, AnswerStream, chunk_of
from ..distillation.teachers import in_precision_of, without_labels


__all__ = ["TASK", "Plan", "Streaming"]

logger = logging.getLogger(__name__)

# How the task's loss comes about: by the model itself from its labels; by code that needs no logits of the outputs, in
# a pass of its own; or by code that reads the very outputs that are compared.
TASK = Literal["model", "apart", "outputs"]
LOSSES = ("ForCausalLMLoss", "ForMaskedLMLoss")  # the mean cross-entropy over the labels, in transformers' words
KNOWN = ("transformers", __name__.partition(".")[0])  # packages whose forward computes no loss of its own


@dataclass
class Plan:
    """One step whose logits are made a few positions at a time.

    Attributes:
        ours, theirs: heads of the student, and of each of the teacher's models.
        terms: what reads each chunk.
        apart: the task's loss is computed in a pass of its own.
        cached: the teacher's answers lie in the batch, and it need not be asked for them.
        chunk: positions at a time.
    """

    ours: Head
    theirs: tuple[Head, ...]
    terms: list[DistillationObjective]
    apart: bool
    cached: bool
    chunk: int

    def __post_init__(self):
        self._kept, self._kept_by_teachers = Postponed(), [Postponed() for _ in self.theirs]

    def student_answers(self) -> contextlib.AbstractContextManager:
        """Around the pass of the student whose outputs are compared."""
        return self._kept.around(self.ours.layer)

    @contextlib.contextmanager
    def teacher_answers(self) -> Iterator[None]:
        """Around the teacher's pass."""
        with contextlib.ExitStack() as stack:
            for head, kept in zip(self.theirs, self._kept_by_teachers, strict=True):
                stack.enter_context(kept.around(head.layer))
            yield

    def stream(self, inputs: Mapping[str, Any], answers: Answers, outputs: Any, teacher: Teacher | None, taught: Any):
        """What both passes kept, as a stream.

        Args:
            inputs: the batch, labels included.
            teacher: None: the student is held against itself.
            outputs, taught: what student and teacher returned; read where a pass kept nothing, because a compiled
                model has hooks from before its compilation alone.
        """
        ours = self._kept.hidden if self._kept.hidden is not None else outputs["logits"]
        shift = slice(None, -1) if answers.shifted else slice(None)
        shape = ours[:, shift].shape[:2]
        compared = answers.compared(inputs, padding_mask(inputs), shape)
        compared = torch.ones(shape, dtype=torch.bool, device=ours.device) if compared is None else compared
        labelled = token_labels(inputs, answers.shifted)
        labelled = labelled if labelled is not None and labelled.shape == shape else None
        chosen = compared if labelled is None else compared | labelled
        labels = None
        if labelled is not None:
            labels = inputs["labels"][:, 1:] if answers.shifted else inputs["labels"]
            labels = labels[chosen].long().masked_fill(~labelled[chosen], IGNORED)
        made = _of(self.ours if self._kept.hidden is not None else None, ours[:, shift][chosen])
        terms = [term for term in self.terms if labels is not None or not term.needs_labels]
        theirs = None
        if any(term.needs_teacher for term in terms):
            theirs = made if teacher is None else self._theirs(inputs, teacher, taught, shift, chosen)
        return AnswerStream(
            ours=made,
            theirs=theirs,
            count=int(chosen.sum()),
            labels=labels,
            compared=compared[chosen],
            terms=terms,
            chunk=self.chunk,
        )

    def _theirs(self, inputs, teacher, taught, shift: slice, chosen: torch.Tensor) -> Callable:
        if isinstance(teacher, CachedTeacher):
            whole = torch.zeros_like(padding_mask(inputs)) if padding_mask(inputs) is not None else None
            whole = chosen.new_zeros(main_input(inputs).shape[:2]) if whole is None else whole
            whole[:, shift] = chosen
            kept = teacher.answers_at(inputs, whole)
            return lambda part: kept[part]
        if any(kept.hidden is None for kept in self._kept_by_teachers):
            return _of(None, taught["logits"][:, shift][chosen])
        made = [
            _of(head, kept.hidden[:, shift][chosen])
            for head, kept in zip(self.theirs, self._kept_by_teachers, strict=True)
        ]
        return lambda part: teacher.merged([logits(part) for logits in made])


def _of(head: Head | None, kept: torch.Tensor) -> Callable[[slice], torch.Tensor]:
    """Positions -> logits, from hidden states (n, d), or logits as they are where there is no head."""
    return lambda part: kept[part] if head is None else head(kept[part])


class Streaming:
    """Decides for each step.

    Args:
        around: autocast of the run.
        label_names: entries of a batch that are labels.
    """

    def __init__(self, around: Callable[[], contextlib.AbstractContextManager], label_names: Sequence[str]):
        self._heads, self._label_names = Heads(around), tuple(label_names)
        self._said: set[str] = set()

    def plan(
        self,
        model: nn.Module,
        teacher: Teacher | None,
        objectives: Sequence[DistillationObjective],
        inputs: Mapping[str, Any],
        read: Mapping[str, Any],
        task: TASK,
        asked: int | None = None,
    ) -> Plan | None:
        """None: the logits of the whole batch are made, because they are few, or because something needs them, which
        is said once.

        Args:
            inputs: the batch as the teacher is asked.
            read: of it what the student takes.
            asked: positions at a time, of any batch; None: as many as take `CHUNK_NUMBERS`, of larger ones.
        """
        ids, vocabulary = main_input(inputs), _vocabulary(model)
        unread = all(_reads(objective) == "none" for objective in objectives)
        if vocabulary is None or ids is None or ids.dim() not in (2, 3) or unread:
            return None
        if asked is None and ids.shape[0] * ids.shape[1] * vocabulary <= CHUNK_NUMBERS:
            return None
        why = self._needed_whole(model, teacher, objectives, inputs, task)
        heads = [] if why else self._all_heads(model, teacher, inputs, read)
        if why := why or next((head for head in heads if isinstance(head, str)), None):
            if why not in self._said:
                self._said.add(why)
                logger.warning(
                    "The logits of whole batches are kept in memory, %d x %d numbers in several copies, not made in "
                    "chunks: %s.",
                    ids.shape[0] * ids.shape[1],
                    vocabulary,
                    why,
                )
            return None
        terms = [objective for objective in _reading(objectives) if task == "model" or not objective.needs_labels]
        if not terms:
            return None
        cached = isinstance(teacher, CachedTeacher)
        return Plan(heads[0], tuple(heads[1:]), terms, task != "model", cached, chunk_of(vocabulary, asked))

    def _needed_whole(self, model, teacher, objectives, inputs, task: TASK) -> str | None:
        """Why the stream cannot be, as far as nothing has to be run for it."""
        config = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        if whole := [type(o).__name__ for o in objectives if _reads(o) == "whole"]:
            return f"{', '.join(whole)} reads them"
        if teacher is not None and not teacher.streams:
            return f"{type(teacher).__name__} does not answer as its models do"
        if task == "outputs":
            return "the task's loss is computed from them by code of its own"
        if task == "model" and getattr(text, "output_router_logits", False):
            return "the model adds a loss of its routers to the task's (output_router_logits)"
        if task == "model" and not _usual_loss(model):
            return f"the loss of {type(unwrapped(model)).__name__} is not the mean cross-entropy over the labels"
        if inputs.get("shift_labels") is not None:
            return "the batch brings shift_labels"
        return None

    def _all_heads(self, model, teacher, inputs, read) -> list[Head | str]:
        """The student's, then those of the teacher's models, as far as they are asked for logits."""
        heads = [self._heads.of(model, in_precision_of(model, without_labels(model, read, self._label_names)))]
        for member in [] if teacher is None else teacher.models:
            asked = Teacher(member).accepted(without_labels(member, inputs, self._label_names))
            heads.append(self._heads.of(member, asked))
        return heads


def _vocabulary(model: nn.Module) -> int | None:
    """Words, of a causal or masked language model; None for others."""
    if not (has_head(model, "CAUSAL_LM") or has_head(model, "MASKED_LM")):
        return None
    config = model.config.get_text_config()
    return None if getattr(config, "is_encoder_decoder", False) else getattr(config, "vocab_size", None)


def _usual_loss(model: nn.Module) -> bool:
    """Whether what the model makes of labels is known: by a forward of transformers', and its loss. A reduced class
    inherits its own."""
    inner = unwrapped(model)
    function = getattr(inner, "loss_function", None)
    known = getattr(type(inner).forward, "__module__", "").partition(".")[0] in KNOWN
    return known and (function is None or getattr(function, "__name__", "") in LOSSES)


def _reads(objective: DistillationObjective) -> str:
    """How an objective reads logits; "whole" where a subclass computes otherwise than the class that said how."""
    owners = [next(n for n, cls in enumerate(type(objective).__mro__) if name in vars(cls)) for name in WAYS]
    return "whole" if owners[0] < owners[1] else objective.logits


WAYS = ("forward", "logits")


def _reading(objectives: Sequence[DistillationObjective]) -> list[DistillationObjective]:
    return [objective for objective in objectives if _reads(objective) == "by_position"]
