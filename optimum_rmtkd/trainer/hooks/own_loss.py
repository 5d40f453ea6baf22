"""Losses that a user computes: `compute_loss` of a subclass, or a `compute_loss_func`. They give the task's term.

Knows how `transformers.Trainer` calls them, and nothing of a run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...distillation.counts import IGNORED
from ...errors import RMTKDError
from ...modeling_rmtkd import LowRankLinear


__all__ = [
    "carries_gradient",
    "counting",
    "items_of",
    "standing_alone",
    "told_what_it_takes",
    "whole_head",
    "whole_result",
]


def told_what_it_takes(function: Callable) -> Callable:
    """A loss that is not told `num_items_in_batch` where its signature has no place for it: many were written before
    the Trainer gave it."""
    taken = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD or p.name == "num_items_in_batch" for p in taken):
        return function

    def told(*args, num_items_in_batch=None, **kwargs):
        return function(*args, **kwargs)

    return told


def items_of(batch: Mapping[str, Any], shifted: bool) -> torch.Tensor | None:
    """Labels that are not -100, as the Trainer counts them, of one micro-batch."""
    if torch.is_tensor(aligned := batch.get("shift_labels")):
        return (aligned != IGNORED).sum()
    labels = batch.get("labels")
    if not torch.is_tensor(labels):
        return None
    return ((labels[..., 1:] if shifted and labels.dim() > 1 else labels) != IGNORED).sum()


def counting(compute_loss_func: Callable, shifted: Callable[[], bool]) -> Callable:
    """The same, told the number of labels in the micro-batch at hand: that makes its loss a mean like the others."""
    told = told_what_it_takes(compute_loss_func)

    def counted(outputs, labels, num_items_in_batch=None):
        return told(outputs, labels, num_items_in_batch=items_of({"labels": labels}, shifted()))

    return counted


def whole_result(result: Any, owner: str) -> tuple[torch.Tensor, Any]:
    """(loss, outputs) as a compute_loss of `owner` returned them.

    Raises:
        RMTKDError: something else, or a loss that is no scalar.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise RMTKDError(
            f"compute_loss(..., return_outputs=True) of {owner} returned a {type(result).__name__}; expected (loss, "
            "outputs). Distillation compares the outputs."
        )
    if torch.is_tensor(result[0]) and result[0].dim():
        raise RMTKDError(
            f"compute_loss of {owner} returned a loss of shape {tuple(result[0].shape)}; expected a scalar, the mean "
            "over the micro-batch. Take its .mean()."
        )
    return result


def carries_gradient(outputs: Any) -> bool:
    """Whether something among a model's named outputs leads back to its weights. A compute_loss may compute its loss
    from one pass and return the outputs of another, without gradient (TRL), or none at all."""
    if not isinstance(outputs, Mapping):
        return True
    return any(torch.is_tensor(value) and value.requires_grad for name, value in outputs.items() if name != "loss")


@contextmanager
def whole_head(model: nn.Module) -> Iterator[None]:
    """While open, the weight of a factored output layer is the whole matrix: losses that are fused with the head (TRL)
    do not call the layer but multiply by its weight."""
    get = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    if not isinstance(head, LowRankLinear):
        yield
        return
    head.whole = True
    try:
        yield
    finally:
        del head.whole


@contextmanager
def standing_alone(trainer: Any) -> Iterator[None]:
    """While open, a loss that asks finds what goes with the number of items in one micro-batch: no accumulation, and
    no other processes to make up for, as `Trainer.compute_loss` and TRL do."""
    steps, args = "current_gradient_accumulation_steps", trainer.args
    averaged, accumulated = args.average_tokens_across_devices, getattr(trainer, steps, 1)
    args.average_tokens_across_devices = False
    setattr(trainer, steps, 1)
    try:
        yield
    finally:
        args.average_tokens_across_devices = averaged
        setattr(trainer, steps, accumulated)
