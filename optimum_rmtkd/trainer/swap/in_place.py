"""One model object takes over the architecture of another in the middle of training: one process, or DDP.

A training loop keeps local references to the wrapped model, and users keep one to theirs. So the object stays and its
inside is exchanged (`become`); what had been built around the old inside (optimizer groups, DDP, autocast,
compilation) is refreshed in place (`regroup`, `rewrapped`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...models import carry_over, parameters_as
from .optimizer import regroup


__all__ = ["become", "install", "rewrapped"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS += tuple(f"{name}_with_kwargs" for name in _HOOKS[:2]) + ("_forward_hooks_always_called",)  # how to call them
_HOOKS += ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def become(model: nn.Module, other: nn.Module) -> set[str]:
    """Turn `model` into `other`, keeping the object. `other` must not be used afterwards: both share their inside.

    What the instance has beyond its class and config is carried over (`models.carry_over`), the training mode and
    hooks on the model itself are kept; whatever accelerate hung on it is gone with the old inside.

    Returns:
        Names of the parameters that the cut left as they were: same name (in a model of fewer blocks that of the same
        block), shape and values.
    """
    old = parameters_as(model, other)
    same = {
        name
        for name, parameter in carry_over(model, other, root=model).named_parameters()
        if name in old
        and old[name].shape == parameter.shape
        and torch.equal(old[name].detach(), parameter.detach().to(old[name]))
    }
    training = model.training
    hooks = {name: model.__dict__[name] for name in _HOOKS if model.__dict__.get(name)}
    model.__dict__.clear()
    model.__dict__.update(other.__dict__ | hooks)
    model.__class__ = other.__class__
    model.train(training)
    return same


def install(
    model: nn.Module,
    replacement: nn.Module,
    optimizer: Any = None,
    fresh_groups: Callable[[], list[dict[str, Any]]] | None = None,
) -> None:
    """Give `model` the inside of `replacement`, and its optimizer the new parameters; the learning rate goes on.

    Args:
        fresh_groups: the groups that an optimizer made now would have; None: the user built it, see `regroup`.
    """
    old, place = parameters_as(model, replacement), next(model.parameters())
    same = become(model, replacement.to(device=place.device))
    if optimizer is not None:
        groups = None if fresh_groups is None else fresh_groups()
        regroup(optimizer, old, dict(model.named_parameters()), same, groups)


def rewrapped(accelerator: Any, model: nn.Module, wrapped: nn.Module, live: Callable[[], nn.Module]) -> nn.Module:
    """The changed model, prepared again (DDP, autocast, compilation); its old wrapper is taken out of service.

    Args:
        live: gives the wrapper that is in use at the time of asking.
    """
    accelerator._models = [m for m in accelerator._models if m is not wrapped and m is not model]
    fresh = accelerator.prepare(model)
    if isinstance(wrapped, nn.parallel.DistributedDataParallel) and wrapped is not fresh:
        # A loop asks its local wrapper for no_sync until the epoch ends; its reducer would wait for dead gradients.
        # What keeps it goes on with the one in use.
        wrapped.no_sync = lambda: live().no_sync()
        wrapped.forward = lambda *positional, **kwargs: live()(*positional, **kwargs)
        wrapped.reducer = wrapped.logger = None
        wrapped._module_parameters, wrapped.modules_buffers, wrapped.named_module_buffers = [], [], {}
    return fresh
