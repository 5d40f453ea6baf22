"""A model as it would be saved, whatever it is trained as: reparameterised, or sharded over processes. Plain functions
over models; those that return a plain one are collective where the model is sharded: each process has to call them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..reparameterization import Reparameterization, core_parameters, fold, is_reparameterized, plain_parameters
from .swap import in_engine, outline, whole, whole_copy


__all__ = ["at_hand", "parameters", "plain", "plain_copy", "put_on", "readable", "state_of"]


def parameters(model: nn.Module) -> int:
    """Parameters of the model as it would be saved, tied ones once."""
    from .. import surgery

    cores, model = core_parameters(model), outline(model)
    named = {name for name, _ in model.named_parameters()}
    inner = sum(t.numel() for name, t in plain_parameters(model).items() if name not in named) if cores else 0
    return surgery.count_parameters(model) - sum(p.numel() for p in cores.values()) + inner


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of the model with plain, whole weights, in evaluation mode."""
    return fold(whole_copy(model))


def readable(model: nn.Module) -> nn.Module:
    """The model itself, unless an engine holds its weights: then a whole copy."""
    return whole(model) if in_engine(model) else model


def plain(model: nn.Module) -> nn.Module:
    """The model itself where its weights are plain and whole, else a copy."""
    return plain_copy(model) if is_reparameterized(model) else whole(model)


@contextmanager
def at_hand(device: torch.device | str, *models: nn.Module | None) -> Iterator[None]:
    """While open, models that are kept aside lie on this device."""
    kept = [(model, next(model.parameters()).device) for model in models if model is not None]
    for model, _ in kept:
        model.to(device)
    try:
        yield
    finally:
        for model, home in kept:
            model.to(home)


def put_on(
    how: Reparameterization | None, model: nn.Module, tensors: Mapping[str, torch.Tensor] | None = None
) -> nn.Module:
    """`model` with the reparameterization on, in place; with the tensors of `state_of` where they are given."""
    if how is not None:
        how.apply(model, tensors)
    return model


def state_of(how: Reparameterization | None, model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint's plain weights were folded from."""
    return {} if how is None else how.state(model)
