"""Batches of texts of like length: less padding to compute, where padding is proven to change nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..batches import LABELS, Store, evaluating, run
from ..errors import UnsupportedArchitectureError
from ..models import nearly_equal
from .calibration import observed, token_mask
from .families import family_of
from .sites import Point


__all__ = ["by_length"]

TOKENS = ("input_ids", "attention_mask", "token_type_ids")  # one entry a token


def by_length(
    model: nn.Module, batches: Sequence[dict[str, Any]], points: Iterable[Point]
) -> Sequence[dict[str, Any]]:
    """The same samples in batches of like length, without the padding that those then have in common; no batch has
    more positions than the largest had before, so short sentences come in larger batches.

    On short sentences in random order this halves the work, and more. It is done only where nothing can depend on it:

    * the family declares that padding behind a mask is inert, and nothing in the model normalises over a batch;
    * the batches hold nothing but token ids, their types, a mask of zeros and ones that pads on the right, and labels
      that say nothing about padding;
    * activations at `points` are the same for three samples in either form.

    Everything else comes back as it is.
    """
    points = list(points)
    if not (_allows(model) and all(_is_plain_text(batch) and batch.keys() == batches[0].keys() for batch in batches)):
        return batches
    names = _over_tokens(batches)
    if names is None:
        return batches
    lengths = [int(length) for batch in batches for length in batch["attention_mask"].sum(-1)]
    places = [(b, row) for b, batch in enumerate(batches) for row in range(len(batch["input_ids"]))]

    def sample(i: int) -> dict[str, torch.Tensor]:
        batch, row = places[i]
        return {k: v[row : row + 1] for k, v in batches[batch].items()}

    order = sorted(range(len(places)), key=lengths.__getitem__)
    room = max(batch["attention_mask"].numel() for batch in batches)
    chunks: list[list[int]] = [[]]
    for i in order:
        if chunks[-1] and (len(chunks[-1]) + 1) * max(lengths[i], 1) > room:
            chunks.append([])
        chunks[-1].append(i)
    trial = [sample(order[at]) for at in (0, len(order) // 2, -1)]
    if not _same_either_way(model, trial, names, points):
        return batches
    grouped = (_stack([sample(i) for i in chunk], names, lengths[chunk[-1]]) for chunk in chunks)
    return Store(trial[0]["input_ids"].device, grouped)


def _allows(model: nn.Module) -> bool:
    try:
        inert = family_of(model).inert_padding
    except UnsupportedArchitectureError:
        return False
    over_batch = any(isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is None for m in model.modules())
    return inert and not over_batch and not getattr(model.config, "is_encoder_decoder", False)


def _is_plain_text(batch: dict[str, Any]) -> bool:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not (isinstance(ids, torch.Tensor) and isinstance(mask, torch.Tensor) and ids.dim() == 2):
        return False
    if mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
        return False
    if bool((mask[:, 1:] > mask[:, :-1]).any()):  # padding before a token: absolute positions would move
        return False
    return all(
        isinstance(value, torch.Tensor)
        and (value.shape == ids.shape if name in TOKENS else name in LABELS and _inert_label(value, mask))
        for name, value in batch.items()
    )


def _inert_label(labels: torch.Tensor, mask: torch.Tensor) -> bool:
    """One label a sample, or one a token that ignores padding; classes of several-label tasks may look like tokens."""
    if labels.shape[:1] != mask.shape[:1] or labels.dim() > 2:
        return False
    if labels.dim() == 1 or labels.shape[1] != mask.shape[1]:
        return True
    return not labels.is_floating_point() and bool((labels[mask == 0] == -100).all())


def _over_tokens(batches: Sequence[dict[str, torch.Tensor]]) -> set[str] | None:
    """Names of what has one entry a token; None where a column cannot be told apart in all batches, or stacked."""
    names = set()
    for name, first in batches[0].items():
        alike = {batch[name].shape == batch["input_ids"].shape for batch in batches}
        if len(alike) > 1 or (alike == {False} and any(b[name].shape[1:] != first.shape[1:] for b in batches)):
            return None
        names |= {name} if alike == {True} else set()
    return names


def _stack(samples: list[dict[str, torch.Tensor]], names: set[str], length: int) -> dict[str, torch.Tensor]:
    """Samples of one row each as one batch, those of `names` with `length` positions; what is added is masked, in the
    labels too."""
    length = max(length, 1)

    def fitted(name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in names:
            return x
        missing = length - min(x.shape[1], length)
        return nn.functional.pad(x[:, :length], (0, missing), value=0 if name in TOKENS else -100)

    return {name: torch.cat([fitted(name, sample[name]) for sample in samples]) for name in samples[0]}


def _same_either_way(
    model: nn.Module, trial: list[dict[str, torch.Tensor]], names: set[str], points: list[Point]
) -> bool:
    """Whether activations at real tokens are those of the collator's own batches, padded further and cut shorter."""
    lengths = [int(sample["attention_mask"].sum()) for sample in trial]
    together = _activations(model, _stack(trial, names, max(lengths)), points)
    shortest = _activations(model, _stack(trial[:1], names, lengths[0]), points)
    for row, (sample, length) in enumerate(zip(trial, lengths, strict=True)):
        before = _activations(model, sample, points)
        for point, (x, mask) in before.items():
            others = [_row(together[point][0], row, len(trial))] + ([shortest[point][0]] if not row else [])
            if not all(nearly_equal(_real(x, mask, length), _real(y, mask, length)) for y in others):
                return False
    return True


def _activations(model: nn.Module, batch: dict[str, torch.Tensor], points: list[Point]) -> dict:
    """{point: (activation, whether its second axis is that of the tokens)}"""
    found = {}

    def see(point: Point, x: torch.Tensor) -> None:
        found[point] = (x.detach(), token_mask(batch, x) is not None)

    with evaluating(model), torch.no_grad(), observed(model, points, see):
        run(model, batch)
    return found


def _row(x: torch.Tensor, row: int, rows: int) -> torch.Tensor:
    size = len(x) // rows
    if not size:  # what is made of relative positions, once for all samples
        return x
    return x[row * size : (row + 1) * size]


def _real(x: torch.Tensor, tokens: bool, length: int) -> torch.Tensor:
    return x[:, :length] if tokens else x
