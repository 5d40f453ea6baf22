"""Several teachers as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import RMTKDError
from ..validation import Positive, checked
from .teachers import FrozenTeacher, Teacher


__all__ = ["WeightedTeachers", "as_teacher"]


def as_teacher(given: Any) -> Teacher:
    """A teacher from a `Teacher`, a model, or a list of models or (model, weight) pairs.

    Raises:
        RMTKDError: anything else.
    """
    if isinstance(given, Teacher):
        return given
    if isinstance(given, nn.Module):
        return FrozenTeacher(given)
    if isinstance(given, Sequence) and given and not isinstance(given, str):
        pairs = [item if isinstance(item, (tuple, list)) else (item, 1.0) for item in given]
        if all(len(pair) == 2 and isinstance(pair[0], (nn.Module, Teacher)) for pair in pairs):
            return WeightedTeachers([model for model, _ in pairs], [weight for _, weight in pairs])
    raise RMTKDError(
        f"teacher_model is a {type(given).__name__}; expected a model, a Teacher, or a list of models or (model, "
        "weight) pairs."
    )


class WeightedTeachers(Teacher):
    """Weighted mean of several teachers' logits: of their outputs in regression, of their log-odds in classification.

    Features (hidden states) are those of the first one. All teachers stay in memory and run at every step.

    Args:
        teachers: models or teachers without trained parts.
        weights: one a teacher, positive, scaled to sum 1; None: equal.

    Raises:
        RMTKDError: none, or weights that do not fit.
    """

    @checked
    def __init__(self, teachers: Iterable[nn.Module | Teacher], weights: Sequence[Positive] | None = None):
        members = [t if isinstance(t, Teacher) else FrozenTeacher(t) for t in teachers]
        weights = [1.0] * len(members) if weights is None else list(weights)
        if not members or len(weights) != len(members):
            raise RMTKDError(
                f"WeightedTeachers: {len(members)} teachers, weights {weights}; expected one positive weight each."
            )
        if any(t.model is None or t.parameters() for t in members):
            raise RMTKDError("WeightedTeachers takes frozen models; cached or online teachers stand alone.")
        self.members, self.weights = members, [w / sum(weights) for w in weights]
        self.model = members[0].model

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"weights": self.weights, "members": [type(t).__name__ for t in self.members]}

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for teacher in self.members for name in teacher.columns))

    @property
    def models(self) -> list[nn.Module]:
        return [teacher.model for teacher in self.members]

    def __call__(
        self, inputs: Mapping[str, Any], paths: Iterable[str] = (), drop: Iterable[str] = ()
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        answers, features = [], {}
        for number, teacher in enumerate(self.members):
            outputs, found = teacher(inputs, paths if number == 0 else (), drop)
            answers.append(outputs)
            features = features or found
        shared = [key for key in answers[0] if key.endswith("logits")]
        for key in shared:
            shapes = {tuple(a[key].shape) for a in answers if key in a}
            if len(shapes) > 1 or not all(key in a for a in answers):
                raise RMTKDError(
                    f"The teachers' {key} have shapes {sorted(shapes)}; expected the same from all of them."
                )
        mean = {key: sum(w * a[key].float() for w, a in zip(self.weights, answers, strict=True)) for key in shared}
        return mean, features

    @property
    def streams(self) -> bool:
        return type(self).__call__ is WeightedTeachers.__call__ and all(member.streams for member in self.members)

    def merged(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        return sum(weight * one.float() for weight, one in zip(self.weights, logits, strict=True))

    def update(self, student: nn.Module) -> None:
        for teacher in self.members:
            teacher.update(student)
