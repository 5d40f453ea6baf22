"""The contract of an objective, and the registry that finds it by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ...errors import RMTKDError
from ...registry import Part, Registry, with_name
from ...validation import check_value
from ..sparse import SparseLogits
from ..step import DistillationStep
from .schedules import Weight, check_weight, weight_at


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
    """Module paths whose outputs an objective wants to find in `DistillationStep.student_features` /
    `teacher_features`."""

    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()


class DistillationObjective(Part, nn.Module):
    """One additive term of the loss: total = sum over objectives of weight * forward(step).

    To add one, subclass, name it, and register it:

        @register_objective
        class LogitsMSE(DistillationObjective):
            name = "logits_mse"                      # log key "loss/logits_mse" and key in a recipe

            def forward(self, step):                 # scalar, unweighted, in fp32
                ours, theirs = (outputs["logits"].float() for outputs in (step.student_outputs, step.teacher_outputs))
                return (ours - theirs).square().mean() * step.share("samples")

    `share` makes a mean over the micro-batch this micro-batch's part of the mean over the accumulated batch, so that
    the gradients do not depend on how the batch was split over accumulation steps and processes.

    Constructor arguments are stored under their own names: that is all `to_dict` needs. Life of an objective:
    `setup` after every cut; then, if `observes`, `observe` once per calibration batch (no gradient, no student
    outputs), `finish`, and `prepare` with one batch of both; then `forward` at every step. What it learns there and a
    resumed run needs goes into buffers: they are part of the training checkpoint. Parameters it registers by then are
    trained beside the student and never saved with it.

    Args:
        weight: a number of at least 0, or a schedule ({"start": 1, "end": 0, "over": [0, 0.5]}, see `schedules`).

    Attributes:
        label: its key in the log ("loss/<label>") and in the checkpoint; the name unless given. Two objectives of one
            class in one run need two labels: `KLDivergence(reverse=True).labelled("reverse_kl")`.
        needs_teacher: it reads the teacher's answers or features.
        needs_projection: it compares streams through the known projection between them, so it has nothing to say of
            a teacher that the student was not cut from, and is left out there.
        reads_answers: it compares the models' answers, without features: computed once on a few rows before the run
            begins, so that models without such answers are refused then.
        logits: how it reads a language model's. "none": not at all; "by_position": through `by_position`, a few
            positions at a time, so that the logits of a whole batch never exist; "whole": from the outputs.
        needs_labels: `by_position` is over the positions that have a label, not over all that are compared.
        active: False where `setup` found that there is nothing to compare for these models; it is then left out.
    """

    checked_by_base = {"weight": Mapping}

    needs_teacher: bool = True
    needs_projection: bool = False
    reads_answers: bool = False
    observes: bool = False
    logits: Literal["none", "by_position", "whole"] = "whole"
    needs_labels: bool = False

    def __init__(self, weight: Weight = 1.0):
        super().__init__()
        self.weight = check_weight(weight, type(self).__name__)
        self.label, self.active = self.name, True

    def labelled(self, label: str) -> DistillationObjective:
        """Set the label; returns self."""
        self.label = check_value(label, str, "label", type(self).__name__)
        return self

    def weight_at(self, progress: float) -> float:
        """The weight after the share `progress` of the training steps."""
        return weight_at(self.weight, progress)

    def features(self) -> FeatureRequest:
        """What it needs besides the outputs; valid after `setup`."""
        return FeatureRequest()

    def check(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Refuse, before anything is cut or trained, models that it cannot work with.

        Raises:
            RMTKDError: with the reason.
        """

    def setup(self, student: nn.Module, teacher: nn.Module | None, projections: Mapping[str, torch.Tensor]) -> None:
        """Get ready for this pair of models; called again after every cut.

        Args:
            projections: name -> (d_teacher, d_student) such that teacher stream @ P is the student's target; empty
                where both streams are the same.
        """

    def observe(self, step: DistillationStep) -> None:
        """See one calibration batch of the teacher."""

    def finish(self, reduce_sum: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> None:
        """Close the observation; `reduce_sum` adds a tensor up over all processes."""

    def prepare(self, step: DistillationStep) -> None:
        """After `finish`: see one batch with both sides' features (no gradient), to create parameters of the right
        shapes."""

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take up the `state_dict()` of an earlier run, in place of `observe`, `finish` and `prepare`."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, step: DistillationStep) -> torch.Tensor:
        """The unweighted term: a scalar in fp32, this micro-batch's part of a mean over the accumulated batch."""
        raise NotImplementedError(f"{type(self).__name__} must implement forward(step).")

    def by_position(
        self, ours: torch.Tensor, theirs: torch.Tensor | SparseLogits | None, labels: torch.Tensor | None
    ) -> torch.Tensor:
        """The value at each of n positions, (n,) in fp32; `forward` takes `step.stream.mean(self)` where there is a
        stream.

        Args:
            ours, theirs: (n, vocabulary) logits; the teacher's without a history, None where nobody is asked.
            labels: (n,) the words to be predicted; None without labels.
        """
        raise NotImplementedError(f"{type(self).__name__} reads logits position by position: it must implement that.")

    def to_dict(self) -> dict[str, Any]:
        """{"name": ..., constructor arguments}: JSON-able inverse of `from_dict`."""
        return super().to_dict() | ({} if self.label == self.name else {"label": self.label})

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> DistillationObjective:
        """Build the objective registered under `values["name"]`.

        Raises:
            RMTKDError: no or an unknown name (answered with the known ones), or arguments it does not take.
        """
        arguments = dict(values)
        label = arguments.pop("label", arguments.get("name"))
        return OBJECTIVES.build(arguments).labelled(label)


OBJECTIVES: Registry[DistillationObjective] = Registry("objective")
register_objective = OBJECTIVES.register
objective_class = OBJECTIVES.find


def objective_names() -> tuple[str, ...]:
    """Names of the registered objectives, sorted."""
    return tuple(OBJECTIVES)


def build_objectives(given: Mapping[str, Mapping[str, Any] | None] | Iterable) -> list[DistillationObjective]:
    """Objectives from what a user may pass: a list of objectives, names or `to_dict()`s, or {name: arguments}.

    In a mapping the key is the registered name; or any label, with the name among the arguments:
    {"back": {"name": "kl", "reverse": true}}.

    Raises:
        RMTKDError: none at all, something else, or two objectives of one label (their log lines would collide).
    """
    if isinstance(given, (str, DistillationObjective)):
        given = [given]
    if isinstance(given, Mapping):
        given = [_labelled(label, arguments) for label, arguments in given.items()]
    if not isinstance(given, Iterable):
        raise RMTKDError(
            f"objectives is a {type(given).__name__}; expected a list of objectives, names or dicts, or {{name: "
            "arguments}."
        )
    built = [_build(item) for item in given]
    labels = [item.label for item in built]
    if not built:
        raise RMTKDError(f"objectives is empty; expected at least one of {', '.join(objective_names())}.")
    if len(set(labels)) < len(labels):
        raise RMTKDError(
            f"objectives={labels}: expected each label once. Give the second one another: {{'again': {{'name': "
            f"{labels[-1]!r}}}}}, or objective.labelled('again')."
        )
    return built


def _labelled(label: str, arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    named = with_name("objectives", label, arguments)
    # With a name of its own the key is a free label; else it is the name, and names its known ones when it is wrong.
    return named | ({"label": label} if "name" in (arguments or {}) else {})


def _build(item: Any) -> DistillationObjective:
    if isinstance(item, DistillationObjective):
        if not item.name or not hasattr(item, "label"):
            raise RMTKDError(
                f"{type(item).__name__} has no {'label' if item.name else 'name'}; expected a class attribute `name` "
                "(its log key) and a call of super().__init__(weight)."
            )
        return item
    if isinstance(item, type):
        raise RMTKDError(f"objectives holds the class {item.__name__}; expected an instance: {item.__name__}().")
    if isinstance(item, str):
        item = {"name": item}
    if isinstance(item, Mapping):
        short = "name" not in item and len(item) == 1
        return DistillationObjective.from_dict(_labelled(*next(iter(item.items()))) if short else item)
    raise RMTKDError(
        f"objectives holds a {type(item).__name__}; expected DistillationObjective instances, names or dicts."
    )
