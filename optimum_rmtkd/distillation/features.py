"""Outputs of inner modules, taken by removable forward hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import RMTKDError


__all__ = ["capture"]


@contextmanager
def capture(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Collect the outputs of the modules at `paths` while the context is open.

    A module that returns a tuple gives its first element. The hooks are gone when the context closes, so a
    recomputation by activation checkpointing during the backward pass does not see them.

    Yields:
        A dictionary filled by the forward pass: path -> output, with its gradient history.

    Raises:
        RMTKDError: a path that names no module of the model.
    """
    outputs: dict[str, torch.Tensor] = {}
    handles = []

    def keep(path: str):
        def hook(module, args, output):
            outputs[path] = output[0] if isinstance(output, (tuple, list)) else output

        return hook

    try:
        for path in paths:
            try:
                module = model.get_submodule(path)
            except AttributeError as error:
                raise RMTKDError(
                    f"No module {path!r} in {type(model).__name__} ({error}); expected one of the names that "
                    "named_modules() lists."
                ) from error
            handles.append(module.register_forward_hook(keep(path)))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
