"""Answers of language models as a stream: logits of a few positions at a time, those of a whole batch never exist.

A position of 128,256 words is half a megabyte in fp32, and a plain divergence holds five such matrices. Here the terms
of a chunk of positions are computed under activation checkpointing: forward keeps hidden states and sums, backward
makes the logits of one chunk again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch.utils.checkpoint import checkpoint

from .sparse import SparseLogits


__all__ = ["CHUNK_NUMBERS", "AnswerStream", "Term", "chunk_of"]

CHUNK_NUMBERS = 2**25  # logits that exist at a time: 128 MiB in fp32, of which a term keeps three to five

Logits = Callable[[slice], "torch.Tensor | SparseLogits"]


class Term(Protocol):
    """What a stream asks of an objective.

    Attributes:
        needs_labels: it counts the positions that have a label, not those that are compared.
    """

    needs_labels: bool

    def by_position(
        self,
        ours: torch.Tensor,
        theirs: torch.Tensor | SparseLogits | None,
        labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """(m, vocabulary) logits of both, (m,) int64 labels -> (m,) fp32."""


def chunk_of(vocabulary: int, asked: int | None = None) -> int:
    """Positions whose logits are made at a time."""
    return asked or max(1, CHUNK_NUMBERS // vocabulary)


@dataclass(frozen=True)
class AnswerStream:
    """What student and teacher answer at the positions that count, made chunk by chunk.

    Attributes:
        ours: positions -> the student's logits (m, vocabulary), with their history.
        theirs: the same of the teacher, without one; None where nobody is asked.
        count: positions, n.
        labels: (n,) int64, the word to be predicted, -100 where there is none; None without labels.
        compared: (n,) bool, those that a divergence is a mean over.
        terms: the objectives that read each chunk; all at once, or the output layer would run once for each.
        chunk: positions at a time.
    """

    ours: Logits
    theirs: Logits | None
    count: int
    labels: torch.Tensor | None
    compared: torch.Tensor
    terms: Sequence[Term]
    chunk: int

    def mean(self, objective: Term) -> torch.Tensor:
        """Of one of `terms`, over the positions that it counts: a scalar; zero, with a history, over none."""
        return self._means[[id(term) for term in self.terms].index(id(objective))]

    @cached_property
    def _means(self) -> torch.Tensor:
        """(terms,): of all of them, in one pass."""
        chosen = [self._counted(term) for term in self.terms]
        total = None
        for start in range(0, max(self.count, 1), self.chunk):  # of no position there is one chunk, of zero terms
            part = slice(start, min(start + self.chunk, self.count))
            masks = [None if mask is None else mask[part] for mask in chosen]
            sums = checkpoint(self._sums, part, masks, use_reentrant=False, preserve_rng_state=False)
            total = sums if total is None else total + sums
        counts = [self.count if mask is None else int(mask.sum()) for mask in chosen]
        return total / total.new_tensor(counts).clamp_min(1)

    def _counted(self, term: Term) -> torch.Tensor | None:
        """(n,) bool; None: all positions."""
        mask = self.labels != -100 if term.needs_labels else self.compared
        return None if bool(mask.all()) else mask

    def _sums(self, part: slice, masks: Sequence[torch.Tensor | None]) -> torch.Tensor:
        ours, theirs = self.ours(part), None
        if self.theirs is not None:
            with torch.no_grad():
                theirs = self.theirs(part)
        labels = None if self.labels is None else self.labels[part]
        sums = []
        for term, mask in zip(self.terms, masks, strict=True):
            read = (ours, theirs, labels)
            if mask is not None:  # left out before anything is computed: no value, NaN included, enters
                read = tuple(None if value is None else value[mask] for value in read)
            sums.append(term.by_position(*read).sum())
        return torch.stack(sums)
