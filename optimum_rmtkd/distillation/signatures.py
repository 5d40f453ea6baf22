"""What a model's forward takes: which columns of a batch are meant for it."""

from __future__ import annotations

import inspect
import typing
from typing import Any

from torch import nn

from ..models import unwrapped


__all__ = ["TOKEN_TYPES", "named_inputs", "taken", "unwrapped"]

TOKEN_TYPES = "token_type_ids"


def named_inputs(model: nn.Module) -> list[str]:
    """Names of the parameters of a model's forward; *args and **kwargs are none, nor are token types where there is
    but one (RoBERTa): the second text of a pair would lie outside their table."""
    names = [p.name for p in _parameters(model) if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    kinds = getattr(getattr(unwrapped(model), "config", None), "type_vocab_size", None)
    return [name for name in names if name != TOKEN_TYPES or kinds is None or kinds > 1]


def taken(model: nn.Module) -> set[str] | None:
    """Names that a model's forward takes; None: any, it has **kwargs and does not say of what.

    transformers says so by a type, `**kwargs: Unpack[TransformersKwargs]`. What is not named there is swallowed
    without a word by some layers and refused by others: it was not meant for this model.
    """
    names = set(named_inputs(model))
    for parameter in _parameters(model):
        if parameter.kind is parameter.VAR_KEYWORD:
            declared = _declared(parameter.annotation)
            if declared is None:
                return None
            names |= declared
    return names


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(unwrapped(model).forward).parameters.values())


def _declared(annotation: Any) -> set[str] | None:
    """Keys of the `TypedDict` in `Unpack[TypedDict]`; None for any other annotation."""
    for inner in typing.get_args(annotation):
        if typing.is_typeddict(inner):
            return set(inner.__annotations__)
    return None
