"""This library: `narrow` in free and native shape, `trim_vocabulary` before it and alone."""

from __future__ import annotations

from transformers import PreTrainedModel

from optimum_rmtkd import BudgetError, RMTKDConfig, narrow

from .common import Given, OutOfReachError


def prune(given: Given, shape: str = "free") -> PreTrainedModel:
    """One cut by the default recipe; the target counts from the size before a trimming."""
    if given.is_small:
        return given.copied()
    try:
        recipe = RMTKDConfig(target_reduction=given.target, shape=shape, seed=given.seed)
        return narrow(given.model, given.batches, recipe, progress=False)
    except BudgetError as error:
        raise OutOfReachError(str(error).splitlines()[0]) from error


def untouched(given: Given) -> PreTrainedModel:
    """What the trimming left."""
    return given.copied()
