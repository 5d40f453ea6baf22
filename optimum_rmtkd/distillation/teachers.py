"""Teachers: models that answer in evaluation mode and receive no gradient."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import nn

from ..batches import INPUTS
from ..errors import RMTKDError
from ..models import copied
from ..reparameterization.base import plain_parameters
from ..validation import Interval, checked
from .features import capture
from .signatures import named_inputs, taken
from .step import DistillationStep


__all__ = [
    "EMATeacher",
    "FrozenTeacher",
    "SnapshotTeacher",
    "Teacher",
    "check_compatible",
    "clean_copy",
    "fingerprint",
]

# What accelerate leaves on a prepared module; a copy that kept them would run the original's forward wrapper.
_PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")


class Teacher:
    """Calls `model` on a batch without gradient.

    Not an `nn.Module`: registered beneath a student it would be saved, counted and optimised with it.
    """

    def __init__(self, model: nn.Module):
        self.model = model.eval()
        self._accepted = taken(model)
        tuples = getattr(getattr(model, "config", None), "return_dict", True) is False
        self._named = {"return_dict": True} if tuples else {}  # objectives read answers by name

    @torch.no_grad()
    def __call__(
        self, inputs: Mapping[str, Any], paths: Iterable[str] = (), drop: Iterable[str] = ()
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """Run the model on `inputs` less the keys in `drop` (the labels) and those that its forward does not take.

        Returns:
            (outputs, features by path)
        """
        kept = self.accepted(without_labels(self.model, inputs, drop))
        with capture(self.model, paths) as features:
            outputs = self.model(**kept | self._named)
        return outputs, features

    @property
    def streams(self) -> bool:
        """Are its logits `merged` from those of its models, position by position? Not known of a subclass that answers
        otherwise."""
        return type(self).__call__ is Teacher.__call__

    def merged(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Its logits from those of its `models`, in their order."""
        return logits[0]

    def accepted(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Those that the model's forward takes; pixels and the like in the precision of its weights."""
        kept = {k: v for k, v in inputs.items() if self._accepted is None or k in self._accepted}
        return in_precision_of(self.model, kept)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the training data that it reads, beside those of the student: they stay in its batches. A teacher
        of your own that reads others overrides it."""
        return tuple(dict.fromkeys(name for model in self.models for name in named_inputs(model)))

    @property
    def origins(self) -> tuple[str, ...]:
        """Fingerprints of its models, as they are."""
        return tuple(fingerprint(model) for model in self.models)

    def describe(self) -> dict[str, Any]:
        """What a resumed run has to have in common, before any training: JSON-able."""
        return {"teacher": type(self).__name__, "models": list(self.origins)}

    def update(self, student: nn.Module) -> None:
        """Called after every optimizer step; a teacher that follows the student overrides it."""

    def strip(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The inputs without what is meant for the teacher alone (columns of answers)."""
        return inputs

    def loss(self, step: DistillationStep) -> torch.Tensor | None:
        """What the teacher itself is trained with, scalar; None: it is not."""
        return None

    @property
    def models(self) -> list[nn.Module]:
        """All models it asks; none where answers are cached."""
        return [] if self.model is None else [self.model]

    def parameters(self) -> list[nn.Parameter]:
        """What of it is trained beside the student."""
        return []


class FrozenTeacher(Teacher):
    """A given model, as it is. The model is put in evaluation mode and otherwise left untouched."""


class SnapshotTeacher(FrozenTeacher):
    """A copy of the student, taken now."""

    def __init__(self, student: nn.Module):
        super().__init__(clean_copy(student))


class EMATeacher(SnapshotTeacher):
    """Exponential moving average of the student: t <- decay t + (1 - decay) s after every step, in the weights' dtype.

    It has the student's own shapes, so it is created anew at each cut, from the student just cut: what was lost in the
    cut has to come back through the other objectives.
    """

    @checked
    def __init__(
        self, student: nn.Module, decay: Annotated[float, Interval(0, 1, "left", "a decay per step")] = 0.999
    ):
        super().__init__(student)
        self.decay = decay

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        # a state dict has the names without what activation checkpointing wraps around blocks
        new = {**student.state_dict(keep_vars=True), **plain_parameters(student)}
        for name, old in self.model.named_parameters():
            old.lerp_(new[name].to(old.dtype), 1.0 - self.decay)
        for old, fresh in zip(self.model.buffers(), student.buffers(), strict=True):
            old.copy_(fresh)


def in_precision_of(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs, pixels and the like in the precision of the model's weights."""
    measured = [k for k in INPUTS if torch.is_tensor(inputs.get(k)) and inputs[k].is_floating_point()]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None) if measured else None
    return dict(inputs) if dtype is None else dict(inputs) | {k: inputs[k].to(dtype) for k in measured}


def without_labels(model: nn.Module, inputs: Mapping[str, Any], labels: Iterable[str]) -> Mapping[str, Any]:
    """The inputs less the named labels; all of them for an encoder-decoder, whose decoder inputs derive from them."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return inputs
    dropped = set(labels)
    return {name: value for name, value in inputs.items() if name not in dropped}


def clean_copy(model: nn.Module) -> nn.Module:
    """A deep copy in evaluation mode, free of gradients and of what accelerate hung on the original."""
    twin = copied(model)
    for name in _PREPARED:
        twin.__dict__.pop(name, None)
    for parameter in twin.parameters():
        parameter.grad = None
    return twin.eval()


def fingerprint(model: nn.Module, per_tensor: int = 256) -> str:
    """Hash of names, shapes, dtypes and at most `per_tensor` evenly spaced raw values of each tensor, or none
    (0), which tells architectures apart.

    Milliseconds where a full hash takes seconds; any training step moves nearly every value, so two different sets of
    weights agree only if somebody edited single entries.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if not per_tensor:
            continue
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // per_tensor)][:per_tensor].contiguous().cpu()
        digest.update(picked.view(torch.uint8).numpy().tobytes() if picked.numel() else b"")
    return digest.hexdigest()


def check_compatible(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher whose answers do not mean what the student's mean.

    Raises:
        RMTKDError: different vocabularies, numbers of labels, or meanings of a label.
    """
    ours, theirs = student.config, getattr(teacher, "config", None)
    if theirs is None:  # a plain module says nothing of its labels; the shapes of its logits are checked at every step
        return
    for what, get in (("vocab_size", _vocab_size), ("num_labels", lambda config: getattr(config, "num_labels", None))):
        mine, other = get(ours), get(theirs)
        if mine is not None and other is not None and mine != other:
            raise RMTKDError(
                f"teacher_model ({type(teacher).__name__}) has {what}={other}, the student ({type(student).__name__}) "
                f"{what}={mine}; expected the same. Distillation needs one tokenizer and one label set for both: "
                "choose a teacher trained with the student's, or leave teacher_model out for self-distillation."
            )
    mine, other = _label_names(ours), _label_names(theirs)
    if mine and other and mine != other:
        raise RMTKDError(
            f"teacher_model calls its labels {other}, the student {mine}; expected the same names at the same "
            "indices. Reorder the labels of one of the two, or set the same id2label if only the names differ."
        )


def _vocab_size(config) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def _label_names(config) -> dict[int, str] | None:
    """id2label, or None where it is the placeholder LABEL_0, LABEL_1, ... and says nothing."""
    names = {int(k): str(v) for k, v in (getattr(config, "id2label", None) or {}).items()}
    return None if all(v == f"LABEL_{k}" for k, v in names.items()) else names
