"""A backward pass that keeps one block's activations at a time: the others run again on the way back (Chen et al.
2016)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..models import Scratch
from .norms import norm_of
from .replay import forwards
from .sites import Point, get_module


__all__ = ["inside", "recomputed"]


@contextlib.contextmanager
def recomputed(model: nn.Module, blocks: Iterable[str], scratch: Scratch | None) -> Iterator[None]:
    """Within this context a pass with gradients keeps of each block what goes into it. Hooks inside a block run twice,
    the second time on the way back; those of a block itself once.

    Args:
        scratch: where the weights lie: what was read before a block is given back when it begins, both times. None:
            in memory, and there is room for all activations: nothing is done.
    """
    if scratch is None:
        yield
        return

    def again(forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            scratch.release()
            return forward(*args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return run(*args, **kwargs)
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return call

    modules = [get_module(model, path) for path in blocks]
    with forwards({module: again(module.forward) for module in modules}), set_checkpoint_early_stop(False):
        yield


def inside(model: nn.Module, blocks: Iterable[str], points: Iterable[Point]) -> set[Point]:
    """Those of `points` whose gradient comes after their block has run again: what a layer in it reads, or a norm in
    it gives to one."""
    within = tuple(f"{block}." for block in blocks)
    return {
        point
        for point in points
        if point.path.startswith(within) and (point.side == "input" or norm_of(get_module(model, point.path)))
    }
