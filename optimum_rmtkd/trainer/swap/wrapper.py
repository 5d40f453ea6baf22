"""The wrapper that Accelerate put around a model (DDP, compilation) learns of its new inside and stays that object.

A script of the user's own holds the wrapper in a variable. It goes on being the one that trains.
"""

from __future__ import annotations

from typing import Any

from torch import nn


__all__ = ["renew_wrapper"]

KEPT = ("training", "require_backward_grad_sync")  # `no_sync` may be open around the very step of a cut


def renew_wrapper(accelerator: Any, model: nn.Module, wrapped: nn.Module) -> None:
    """Prepare the changed `model` again, and give `wrapped` the inside of what came of it.

    Everything that refers to `wrapped` (the script, a `no_sync` that is open) refers to the live wrapper afterwards.
    Where Accelerate wraps nothing, `wrapped` is `model` itself.

    Args:
        model: the inner model, which has another inside than when it was prepared.
        wrapped: as `accelerator.prepare` gave it to the user.
    """
    models = accelerator._models  # it knows what it was given: the inside of a DDP wrapper
    place = next(number for number, known in enumerate(models) if known is wrapped or known is model)
    del models[place]
    fresh = accelerator.prepare_model(model)
    models.insert(place, models.pop())
    if fresh is not wrapped:
        kept = {name: vars(wrapped)[name] for name in KEPT if name in vars(wrapped)}
        vars(wrapped).clear()
        vars(wrapped).update(vars(fresh) | kept)
