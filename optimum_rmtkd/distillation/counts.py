"""Which positions of a batch count, and how much one micro-batch weighs in the whole accumulated batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..batches import batch_size, padding_mask


__all__ = [
    "IGNORED",
    "UNITS",
    "answered",
    "answers_that_count",
    "count_units",
    "masked_labels",
    "token_labels",
    "total_units",
]

IGNORED = -100
UNITS = ("samples", "tokens", "labels", "answers")


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


def answers_that_count(inputs: Mapping[str, Any], shifted: bool, decoding: bool = False) -> torch.Tensor | None:
    """Bool (batch, tokens), True at the positions where the answers of student and teacher are compared; None where
    neither labels nor masks tell.

    Those with a label that counts, less those that the mask calls padding: labels are often a plain copy of
    `input_ids`, and what two networks make of padding depends on nothing but how far a batch was padded. Without a
    label a token, the real tokens.

    Args:
        shifted: as in `token_labels`; the mask is then one position shorter.
        decoding: labels belong to a decoder, whose tokens `decoder_attention_mask` is about; `attention_mask` is
            about those of the encoder.
    """
    labels, mask = token_labels(inputs, shifted), _label_mask(inputs, decoding)
    if mask is not None:
        mask = answered(mask, shifted)
    if labels is None or mask is None:
        return mask if labels is None else labels
    return labels & mask if labels.shape == mask.shape else labels


def masked_labels(inputs: Mapping[str, Any], shifted: bool, decoding: bool = False) -> int:
    """How many labels that count lie on padding: the model's own loss is a mean over them as well."""
    labels, mask = token_labels(inputs, shifted), _label_mask(inputs, decoding)
    if labels is None or mask is None:
        return 0
    mask = mask[:, 1:] if shifted else mask
    return int((labels & ~mask).sum()) if labels.shape == mask.shape else 0


def _label_mask(inputs: Mapping[str, Any], decoding: bool) -> torch.Tensor | None:
    """Bool (batch, tokens): which of the tokens that labels belong to are real."""
    if not decoding:
        return padding_mask(inputs)
    mask = inputs.get("decoder_attention_mask")
    return mask.bool() if torch.is_tensor(mask) and mask.dim() == 2 else None


def count_units(inputs: Mapping[str, Any], shifted: bool = False, decoding: bool = False) -> torch.Tensor:
    """(4,) int64 on the CPU: samples, unmasked tokens, labels and answers of one batch, in the order of `UNITS`.

    Labels are those of tokens that are not -100, which the model's own loss is a mean over; answers those of
    `answers_that_count`. Where there is no label a token, both are the tokens whose answer counts. Without an
    attention mask every token id counts; without tokens (images) these counts are 0.
    """
    samples = batch_size(inputs)
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if not torch.is_tensor(mask):
        mask = torch.ones_like(ids) if torch.is_tensor(ids) else torch.zeros(0, 0)
    mask = mask.bool()
    real = int((answered(mask, shifted) if mask.dim() == 2 else mask).sum())
    counted = token_labels(inputs, shifted)
    if counted is None:
        return torch.tensor([samples, int(mask.sum()), real, real])
    compared = answers_that_count(inputs, shifted, decoding)
    return torch.tensor([samples, int(mask.sum()), int(counted.sum()), int(compared.sum())])


def total_units(batches: Iterable[Mapping[str, Any]], shifted: bool = False, decoding: bool = False) -> torch.Tensor:
    """Sum of `count_units` over batches."""
    counts = (count_units(batch, shifted, decoding) for batch in batches)
    return sum(counts, torch.zeros(len(UNITS), dtype=torch.long))
