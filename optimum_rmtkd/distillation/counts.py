"""How much one micro-batch weighs in the whole accumulated batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch


__all__ = ["IGNORED", "UNITS", "answered", "count_units", "token_labels", "total_units"]

IGNORED = -100
UNITS = ("samples", "tokens", "labels")


def token_labels(inputs: Mapping[str, Any], shifted: bool) -> torch.Tensor | None:
    """Bool (batch, tokens), True at the positions whose label counts; None where labels are not one integer a token.

    Args:
        shifted: the answer at position i is for label i + 1 (causal models): the mask is one position shorter.
    """
    labels = inputs.get("labels")
    if not torch.is_tensor(labels) or labels.dim() != 2 or labels.is_floating_point():
        return None
    return (labels[:, 1:] if shifted else labels) != IGNORED


def answered(mask: torch.Tensor, shifted: bool) -> torch.Tensor:
    """Bool (batch, tokens), True where an unlabelled answer counts: at real tokens, for causal models those that a
    real token follows (one position shorter).

    Args:
        mask: bool (batch, tokens), True at real tokens.
    """
    return mask[:, 1:] & mask[:, :-1] if shifted else mask


def count_units(inputs: Mapping[str, Any], shifted: bool = False) -> torch.Tensor:
    """(3,) int64 on the CPU: samples, unmasked tokens and labels of one batch, in the order of `UNITS`.

    Labels are those of tokens that are not -100; where there is no label a token, the tokens whose answer counts
    (`answered`). Without an attention mask every token id counts; without tokens (images) these counts are 0.
    """
    tensors = [value for value in inputs.values() if torch.is_tensor(value) and value.dim()]
    samples = len(tensors[0]) if tensors else 0
    mask, ids, counted = inputs.get("attention_mask"), inputs.get("input_ids"), token_labels(inputs, shifted)
    if not torch.is_tensor(mask):
        mask = torch.ones_like(ids) if torch.is_tensor(ids) else torch.zeros(0, 0)
    mask = mask.bool()
    if counted is None:
        counted = answered(mask, shifted) if mask.dim() == 2 else mask
    return torch.tensor([samples, int(mask.sum()), int(counted.sum())])


def total_units(batches: Iterable[Mapping[str, Any]], shifted: bool = False) -> torch.Tensor:
    """Sum of `count_units` over batches."""
    return sum((count_units(batch, shifted) for batch in batches), torch.zeros(len(UNITS), dtype=torch.long))
