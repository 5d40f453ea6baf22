"""How much one micro-batch weighs in the whole accumulated batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch


__all__ = ["IGNORED", "UNITS", "count_units", "token_labels", "total_units"]

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


def count_units(inputs: Mapping[str, Any], shifted: bool = False) -> torch.Tensor:
    """(3,) int64 on the CPU: samples, unmasked tokens and counted labels of one batch, in the order of `UNITS`.

    Without an attention mask every token id counts; without tokens (images) or labels of tokens these counts are 0.
    """
    tensors = [value for value in inputs.values() if torch.is_tensor(value) and value.dim()]
    samples = len(tensors[0]) if tensors else 0
    mask, ids, counted = inputs.get("attention_mask"), inputs.get("input_ids"), token_labels(inputs, shifted)
    tokens = int(mask.bool().sum()) if torch.is_tensor(mask) else ids.numel() if torch.is_tensor(ids) else 0
    return torch.tensor([samples, tokens, 0 if counted is None else int(counted.sum())])


def total_units(batches: Iterable[Mapping[str, Any]], shifted: bool = False) -> torch.Tensor:
    """Sum of `count_units` over batches."""
    return sum((count_units(batch, shifted) for batch in batches), torch.zeros(len(UNITS), dtype=torch.long))
