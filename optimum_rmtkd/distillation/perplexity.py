"""Perplexity of language models: of causal ones by a sliding window, of masked ones on words that are hidden from
them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..batches import evaluating, run, to_device
from ..errors import RMTKDError
from .counts import IGNORED
from .heads import Heads, Postponed
from .stream import chunk_of


__all__ = ["Perplexity", "masked_perplexity", "perplexity", "windows"]


@dataclass(frozen=True)
class Perplexity:
    """Attributes:
    loss: mean negative log-likelihood of a token, in nats.
    tokens: that were predicted.
    """

    loss: float
    tokens: int

    @property
    def value(self) -> float:
        """exp(loss); infinite where that is no number of a float any more."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def windows(tokens: int, window: int, stride: int) -> list[tuple[int, int]]:
    """(first token, first token that is predicted) of each window: every token but the first is predicted once, and
    after the first window with `window - stride` tokens before it at least. All windows are equally long; the last
    reaches back."""
    if tokens <= window:
        return [(0, 1)]
    found, done = [(0, 1)], window
    while done < tokens:
        start = min(done + stride, tokens) - window
        found.append((start, done))
        done = start + window
    return found


def perplexity(
    model: nn.Module, ids: torch.Tensor, window: int, stride: int | None = None, batch_size: int = 8
) -> Perplexity:
    """Of a causal language model on one running text. Logits of a few positions exist at a time.

    Args:
        ids: (n,) int64, at least two.
        window: tokens that the model sees at once.
        stride: tokens between the beginnings of two windows; None: half a window.

    Raises:
        RMTKDError: a text of fewer than two tokens.

    Reference: "Perplexity of fixed-length models", documentation of transformers.
    """
    if ids.numel() < 2:
        raise RMTKDError(f"A text of {ids.numel()} token(s) has no perplexity; expected two or more.")
    window = min(window, ids.numel())
    spans = windows(ids.numel(), window, stride or max(1, window // 2))

    def batches() -> Iterable[dict[str, torch.Tensor]]:
        for start in range(0, len(spans), batch_size):
            part = spans[start : start + batch_size]
            rows = torch.stack([ids[first : first + window] for first, _ in part])
            labels = torch.full_like(rows, IGNORED)
            for row, (first, predicted) in enumerate(part):
                labels[row, : window - 1] = rows[row, 1:]  # the answer at one position is for the next
                labels[row, : predicted - first - 1] = IGNORED
            labels[:, -1] = IGNORED
            yield {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": labels}

    return _mean_loss(model, batches())


def masked_perplexity(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Perplexity:
    """Of a masked language model, on the words that have a label in batches of a collator: exp of the mean
    cross-entropy. Two models can be compared on the same batches, no other ones."""
    return _mean_loss(model, batches)


@torch.no_grad()
def _mean_loss(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Perplexity:
    """Labels stand at the position whose answer they belong to."""
    heads, device = Heads(), next(model.parameters()).device
    total, count = torch.zeros((), dtype=torch.float64), 0
    with evaluating(model):
        for batch in batches:
            batch = to_device(dict(batch), device)
            labels = batch.pop("labels")
            chosen = labels != IGNORED
            head = heads.of(model, batch)
            if isinstance(head, str):
                hidden, made = run(model, batch)["logits"][chosen], lambda logits: logits
            else:
                with Postponed().around(head.layer) as kept:
                    run(model, batch)
                hidden, made = kept.hidden[chosen], head
            for part, wanted in zip(*(t.split(_chunk(model)) for t in (hidden, labels[chosen])), strict=True):
                total += F.cross_entropy(made(part).float(), wanted, reduction="sum").double().cpu()
            count += int(chosen.sum())
    if not count:
        raise RMTKDError("No token of the text is predicted; expected one at least.")
    return Perplexity(float(total) / count, count)


def _chunk(model: nn.Module) -> int:
    return chunk_of(model.config.get_text_config().vocab_size)
