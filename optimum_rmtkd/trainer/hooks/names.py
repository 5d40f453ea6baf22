"""Names on a trainer that others may have as well: those for the user to read, and methods that others stand in for.

Knows no trainer and no run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


__all__ = ["instead", "shown", "with_wrapper_in_use"]

HANDED = ("training_step", "_run_epoch", "_clip_grad_norm", "_get_grad_norm", "_maybe_log_save_evaluate")


class shown:
    """What the user may read under a name. Nothing here reads it: a trainer with a name like that of its own (`run`,
    `patience`) keeps its own, set on the object or declared by a class, in front of the mixin or behind it."""

    def __init__(self, read: Callable[[Any], Any]):
        self.read = read

    def __set_name__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner, name

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        if trainer is None:
            return self
        kinds = type(trainer).__mro__
        behind = kinds[kinds.index(self.owner) + 1 :]
        if any(self.name in vars(kind) for kind in behind):  # of a trainer that the mixin stands in front of
            return getattr(super(self.owner, trainer), self.name)
        return self.read(trainer)


@contextmanager
def instead(trainer: Any, **functions: Callable) -> Iterator[None]:
    """While open, methods of this trainer are others, whatever class they are of."""
    own = vars(trainer)
    set_here = {name: own[name] for name in functions if name in own}
    own.update(functions)
    try:
        yield
    finally:
        for name in functions:
            own.pop(name, None)
        own.update(set_here)


def with_wrapper_in_use(trainer: Any) -> Any:
    """While open, what the training loop hands its model to gets the wrapper that is in use. The loop wraps the model
    once and keeps that wrapper in a local variable; after a cut (DDP, FSDP2, DeepSpeed, autocast, torch.compile) it is
    a stale one. Methods of a class in front of the mixin hear of the live one as well."""

    def told(method: Callable) -> Callable:
        def live(value: Any) -> Any:
            return trainer.model_wrapped if isinstance(value, nn.Module) else value

        @functools.wraps(method)
        def handed(*positional, **named):
            return method(*map(live, positional), **{name: live(value) for name, value in named.items()})

        return handed

    return instead(trainer, **{name: told(getattr(trainer, name)) for name in HANDED if hasattr(trainer, name)})
