"""What a run is put together from: the recipe's parts, or those that were passed in its place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from ..config import RMTKDConfig
from ..distillation import (
    BatchTransform,
    DistillationObjective,
    TensorAlignment,
    build_objectives,
    build_transforms,
    default_objectives,
)
from ..errors import RMTKDError
from ..registry import Part
from ..reparameterization import MatrixProductOperator, Reparameterization, build_reparameterization
from .checkpoint import flatten, subset


__all__ = ["Parts", "described", "load_transforms", "parts_of", "transforms_state"]


class Parts(NamedTuple):
    """Of a run.

    Attributes:
        named: the objectives were chosen, by the recipe or an argument; else they are the usual three.
    """

    objectives: list[DistillationObjective]
    reparameterization: Reparameterization | None
    transforms: list[BatchTransform]
    named: bool = True


def described(**kinds: Iterable[Part]) -> dict[str, list[str]]:
    """What a checkpoint remembers of the parts: kind -> one line of JSON each, with all arguments."""
    return {
        kind: [json.dumps(part.to_dict(), default=lambda value: type(value).__name__) for part in parts]
        for kind, parts in kinds.items()
    }


def parts_of(
    recipe: RMTKDConfig, objectives: Any = None, reparameterization: Any = None, transforms: Any = None
) -> Parts:
    """Instances of what the recipe names, or of what was given in its place.

    Raises:
        RMTKDError: unknown names (answered with the known ones), arguments they do not take, parts that do not go
            together, or that are given twice.
    """
    given = {"objectives": objectives, "reparameterization": reparameterization, "transforms": transforms}
    if twice := [name for name, part in given.items() if part is not None and getattr(recipe, name) is not None]:
        raise RMTKDError(
            f"{', '.join(twice)}: given in rmtkd_config and as an argument; expected one of both. The recipe's can be "
            "written to JSON, the argument may be an instance."
        )
    if objectives is not None:
        recipe.check_no_terms()
    chosen = recipe.objectives if objectives is None else objectives
    parts = Parts(
        default_objectives(recipe) if chosen is None else build_objectives(chosen),
        build_reparameterization(recipe.reparameterization if reparameterization is None else reparameterization),
        build_transforms(recipe.transforms if transforms is None else transforms),
        named=chosen is not None,
    )
    aligned = any(isinstance(objective, TensorAlignment) for objective in parts.objectives)
    if aligned and not isinstance(parts.reparameterization, MatrixProductOperator):
        raise RMTKDError(
            "TensorAlignment compares the tensors of a matrix product operator: pass reparameterization='mpo' as "
            "well, or leave it out."
        )
    return parts


def transforms_state(transforms: Iterable[BatchTransform]) -> dict[str, torch.Tensor]:
    """What transforms need in a resumed run."""
    tensors: dict[str, torch.Tensor] = {}
    for number, transform in enumerate(transforms):
        tensors |= flatten(f"transform/{number}", transform.state_dict())
    return tensors


def load_transforms(transforms: Iterable[BatchTransform], tensors: Mapping[str, torch.Tensor]) -> None:
    """Inverse of `transforms_state`, among other tensors."""
    for number, transform in enumerate(transforms):
        if state := subset(f"transform/{number}", tensors):
            transform.load_state_dict(state)
