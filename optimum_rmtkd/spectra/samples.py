"""What counts as a sample: choice of positions, masks, and the checks every batch goes through."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CalibrationError, RMTKDError


__all__ = ["SAMPLE_UNITS", "check_finite", "checked", "sample_tokens", "select", "work_dtype"]

SAMPLE_UNITS = ("token", "spaced", "sequence_mean")


@torch.no_grad()
def sample_tokens(
    x: Tensor, mask: Tensor | None = None, unit: str = "token", tokens_per_sequence: int = 8
) -> tuple[Tensor, Tensor | None]:
    """Reduce a batch of sequences to the samples that count.

    Args:
        x: (batch, ..., dim); axes between the first and the last are flattened to positions. (batch, dim) comes back
            as is.
        mask: (batch, ...) the positions that are no padding, or None.
        unit: "token": all of them. "spaced": up to `tokens_per_sequence` evenly spaced unmasked positions of each
            sequence (the middles of equal stretches), in order. "sequence_mean": the mean over unmasked positions.

    Returns:
        (samples, mask): (batch, length, dim) and (batch, length) or None for tokens; (batch, dim) and (batch,) or None
        for means, where False marks a sequence without any unmasked position.

    Raises:
        RMTKDError: unknown unit.
    """
    if unit not in SAMPLE_UNITS:
        raise RMTKDError(f"sample unit {unit!r}: expected one of {', '.join(SAMPLE_UNITS)}.")
    if x.dim() < 3 or unit == "token":
        return x, mask
    x = x.flatten(1, -2)
    mask = None if mask is None else mask.to(x.device).bool().flatten(1)
    if unit == "sequence_mean":
        values = x.to(work_dtype(x))
        if mask is None:
            return values.mean(1), None
        kept = torch.where(mask[..., None], values, 0.0).sum(1)
        return kept / mask.sum(1, keepdim=True).clamp_min(1), mask.any(1)
    length, slots = x.shape[1], torch.arange(tokens_per_sequence, device=x.device)
    if length <= tokens_per_sequence:
        return x, mask
    if mask is None:
        return x[:, ((2 * slots + 1) * length).div(2 * tokens_per_sequence, rounding_mode="floor")], None
    lengths = mask.sum(1, keepdim=True)
    spaced = ((2 * slots + 1) * lengths).div(2 * tokens_per_sequence, rounding_mode="floor")
    ranks = torch.where(lengths > tokens_per_sequence, spaced, slots)  # (batch, tokens_per_sequence)
    # A stable sort by the mask lists the unmasked positions first, in order, wherever the padding sits.
    positions = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True).gather(1, ranks)
    return x[torch.arange(len(x), device=x.device)[:, None], positions], slots < lengths


def work_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def checked(x, mask, weight, dim):
    """Shapes and dtypes of one update; x comes back with at least two axes, the mask as bool, weights validated."""
    if not x.dim() or x.shape[-1] != dim or not x.is_floating_point():
        raise CalibrationError(
            f"Got {x.dtype} of shape {tuple(x.shape)}; expected floating point of shape (..., {dim})."
        )
    x = x.detach()
    for name, value in (("mask", mask), ("weight", weight)):
        if value is not None and value.shape != x.shape[:-1]:
            raise CalibrationError(
                f"{name} of shape {tuple(value.shape)} with x of shape {tuple(x.shape)}: expected "
                f"{tuple(x.shape[:-1])}."
            )
    if weight is not None and not bool(((weight >= 0) & torch.isfinite(weight)).all()):
        raise CalibrationError("Weights must be finite and at least 0; got negative or non-finite ones.")
    mask = None if mask is None else mask.to(x.device).bool()
    weight = None if weight is None else weight.to(x.device)
    if x.dim() == 1:
        x, mask, weight = (None if t is None else t.unsqueeze(0) for t in (x, mask, weight))
    return x, mask, weight


def select(x, mask, weight):
    """The counted rows (n, dim) and their weights (n,) or None; a view where nothing is masked."""
    if mask is None or bool(mask.all()):
        return x.reshape(-1, x.shape[-1]), None if weight is None else weight.reshape(-1)
    return x[mask], None if weight is None else weight[mask]


def check_finite(squares: list[Tensor], rows: list[Tensor], what: str) -> None:
    """Raise CalibrationError when a sum of squares is not finite, naming how many values are bad."""
    if all(bool(torch.isfinite(each).all()) for each in squares):
        return
    values = torch.cat(rows)
    bad = ~torch.isfinite(values)
    if not bool(bad.any()):
        raise CalibrationError(
            f"{what.capitalize()} up to {float(values.abs().max()):.3g} overflow the sums of squares: expected values "
            "whose square fits their dtype; pass float64 or rescale."
        )
    raise CalibrationError(
        f"{int(bad.sum())} of {values.numel()} values of the {what} are NaN or infinite, in {int(bad.any(0).sum())} "
        f"of {values.shape[1]} channels. Expected finite values: look for overflow (float16) or a diverged model."
    )
