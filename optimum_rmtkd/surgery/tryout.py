"""One forward pass over the batches that are hardest to take, before anything is computed of the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..batches import collect_batches, evaluating, explained, first_samples, guarded_tables, padding_mask, run
from ..errors import CalibrationError
from ..modeling_rmtkd import resolve_path
from .batches import check_batches, check_cross_attention
from .calibration import observed, points_of
from .sites import Anatomy, Point, Site


__all__ = ["checked_batches", "try_out"]


def checked_batches(
    model: nn.Module, dataloader: Iterable, samples: int, anatomy: Anatomy, sites: Sequence[Site]
) -> Sequence[dict[str, Any]]:
    """The first `samples` samples of a dataloader, on the device of `model`, which can run on them and be cut by them.

    Args:
        sites: those that are to be cut.

    Raises:
        CalibrationError, UnsupportedArchitectureError: see `collect_batches`, `check_batches`,
            `check_cross_attention` and `try_out`.
    """
    batches = collect_batches(model, dataloader, samples)
    check_batches(model, batches)
    check_cross_attention(model, batches, anatomy, sites)
    try_out(model, batches, points_of(anatomy, sites))
    return batches


@torch.no_grad()
def try_out(model: nn.Module, batches: Sequence[dict[str, Any]], points: Iterable[Point]) -> None:
    """Run the longest batch, and a sample of every batch of another form; nothing is left behind.

    Args:
        points: places that the calibration will look at, which have to be reached.

    Raises:
        CalibrationError: the model cannot run on a batch; or a place is reached by none of them.
    """
    missing = set(points)
    with evaluating(model), guarded_tables(model):
        for number, batch in _telling(batches):
            with observed(model, missing.copy(), lambda point, _: missing.discard(point)):
                with explained(model, batch, number):
                    run(model, batch)
        for number, batch in enumerate(batches):  # experts that no token of the first batch was routed to
            if not missing:
                return
            with observed(model, missing.copy(), lambda point, _: missing.discard(point)):
                with explained(model, batch, number):
                    run(model, batch)
    if missing:
        paths = sorted({resolve_path(model, point.path) for point in missing})
        raise CalibrationError(
            f"{len(paths)} module(s) of {type(model).__name__} that are to be cut never ran on the calibration data, "
            f"the first is {paths[0]}: expected batches that use the whole model. Add the inputs that this part "
            "reads, or leave it out of `sites`."
        )


def _telling(batches: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """(number, batch): those with the most positions and with the most real tokens in a row whole, and one sample each
    of those whose columns, dtypes, flags or image sizes none before had."""
    longest = max(range(len(batches)), key=lambda i: _positions(batches[i]))
    fullest = max(range(len(batches)), key=lambda i: _real_tokens(batches[i]))
    chosen = {i: batches[i] for i in (longest, fullest)}
    known = {_form(batch) for batch in chosen.values()}
    for i, batch in enumerate(batches):
        if _form(batch) not in known:
            known.add(_form(batch))
            chosen[i] = first_samples(batch, 1)
    return list(chosen.items())


def _positions(batch: dict[str, Any]) -> int:
    return max((v.shape[1] for v in batch.values() if isinstance(v, torch.Tensor) and v.dim() == 2), default=0)


def _real_tokens(batch: dict[str, Any]) -> int:
    mask = padding_mask(batch)
    return _positions(batch) if mask is None else int(mask.sum(-1).max())


def _form(batch: dict[str, Any]) -> tuple:
    """What batches that pass alike have in common."""

    def form(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.dim(), tuple(value.shape[1:]) if value.dim() > 2 else None
        return value if isinstance(value, (bool, int, float, str, type(None))) else type(value)

    return tuple((name, form(value)) for name, value in sorted(batch.items()))
