"""The contract of an objective, and the registry that finds it by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import RMTKDError
from ..step import DistillationStep


__all__ = [
    "DistillationObjective",
    "FeatureRequest",
    "build_objectives",
    "objective_class",
    "objective_names",
    "register_objective",
]


@dataclass(frozen=True)
class FeatureRequest:
    """Module paths whose outputs an objective wants to find in `DistillationStep.student_features` / `teacher_features`."""

    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()


class DistillationObjective(nn.Module):
    """One additive term of the loss: total = sum over objectives of weight * forward(step).

    To add one, subclass, name it, and register it:

        @register_objective
        class LogitsMSE(DistillationObjective):
            name = "logits_mse"                      # log key "loss/logits_mse" and key in a recipe

            def forward(self, step):                 # scalar, unweighted, a mean over the micro-batch, in fp32
                return (step.student_outputs["logits"].float() - step.teacher_outputs["logits"].float()).square().mean()

    Constructor arguments are stored under their own names: that is all `to_dict` needs. Life of an objective:
    `setup` after every cut; then, if `observes`, `observe` once per calibration batch (no gradient, no student outputs) and
    `finish`; then `forward` at every step. What it learns there and a resumed run needs goes into buffers: they are part of
    the training checkpoint.
    """

    name: str = ""
    needs_teacher: bool = True
    observes: bool = False

    def __init__(self, weight: float = 1.0):
        super().__init__()
        if not weight >= 0:
            raise RMTKDError(f"{type(self).__name__}(weight={weight}): expected a number of at least 0.")
        self.weight = float(weight)

    def features(self) -> FeatureRequest:
        """What it needs besides the outputs; valid after `setup`."""
        return FeatureRequest()

    def setup(self, student: nn.Module, teacher: nn.Module | None, projections: Mapping[str, torch.Tensor]) -> None:
        """Get ready for this pair of models; called again after every cut.

        Args:
            projections: name -> (d_teacher, d_student) such that teacher stream @ P is the student's target; empty where
                both streams are the same.
        """

    def observe(self, step: DistillationStep) -> None:
        """See one calibration batch of the teacher."""

    def finish(self, reduce_sum: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> None:
        """Close the observation; `reduce_sum` adds a tensor up over all processes."""

    def forward(self, step: DistillationStep) -> torch.Tensor:
        """The unweighted term: a scalar in fp32, mean over the micro-batch."""
        raise NotImplementedError(f"{type(self).__name__} must implement forward(step).")

    def to_dict(self) -> dict[str, Any]:
        """{"name": ..., constructor arguments}: JSON-able inverse of `from_dict`."""
        arguments = [n for n in inspect.signature(type(self).__init__).parameters if n != "self"]
        return {"name": self.name, **{n: getattr(self, n) for n in arguments}}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> DistillationObjective:
        """Build the objective registered under `values["name"]`.

        Raises:
            RMTKDError: no or an unknown name (answered with the known ones), or arguments it does not take.
        """
        arguments = dict(values)
        cls = objective_class(arguments.pop("name", None))
        known = [n for n in inspect.signature(cls.__init__).parameters if n != "self"]
        unknown = sorted(set(arguments) - set(known))
        if unknown:
            raise RMTKDError(f"{cls.name} takes no {', '.join(unknown)}; expected among {', '.join(known)}.")
        return cls(**arguments)


_REGISTRY: dict[str, type[DistillationObjective]] = {}


def register_objective(cls: type[DistillationObjective]) -> type[DistillationObjective]:
    """Class decorator: make an objective known by its `name`.

    Raises:
        RMTKDError: no name, or a name that another class has already taken.
    """
    if not cls.name:
        raise RMTKDError(f"{cls.__name__} has no name; set the class attribute `name`, its log and registry key.")
    taken = _REGISTRY.get(cls.name)
    if taken is not None and taken.__qualname__ != cls.__qualname__:
        raise RMTKDError(
            f"The name {cls.name!r} belongs to {taken.__qualname__}; give {cls.__qualname__} another one."
        )
    _REGISTRY[cls.name] = cls
    return cls


def objective_names() -> tuple[str, ...]:
    """Names of all registered objectives, sorted."""
    return tuple(sorted(_REGISTRY))


def objective_class(name: str | None) -> type[DistillationObjective]:
    """The class registered under `name`.

    Raises:
        RMTKDError: unknown; the message lists the known names.
    """
    if name not in _REGISTRY:
        raise RMTKDError(f"No objective {name!r}; expected one of {', '.join(objective_names())}.")
    return _REGISTRY[name]


def build_objectives(given: Mapping[str, Mapping[str, Any]] | Iterable) -> list[DistillationObjective]:
    """Objectives from what a user may pass: a list of objectives or of `to_dict()`s, or {name: arguments}.

    Raises:
        RMTKDError: an empty list, something else, or two objectives of one name (their log lines would collide).
    """
    if isinstance(given, Mapping):
        given = [{"name": name, **(arguments or {})} for name, arguments in given.items()]
    built = [DistillationObjective.from_dict(item) if isinstance(item, Mapping) else item for item in given]
    for item in built:
        if not isinstance(item, DistillationObjective):
            raise RMTKDError(
                f"objectives holds a {type(item).__name__}; expected DistillationObjective instances or dicts."
            )
    names = [item.name for item in built]
    if not built or len(set(names)) < len(names):
        raise RMTKDError(
            f"objectives={names}: expected at least one, each name once. Known: {', '.join(objective_names())}."
        )
    return built
