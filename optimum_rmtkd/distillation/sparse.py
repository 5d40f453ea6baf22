"""Answers over a vocabulary of which only the largest logits are known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


__all__ = ["SparseLogits", "sparse_kl"]


@dataclass(frozen=True)
class SparseLogits:
    """The k largest logits of each position; each other class has the logit `rest`.

    Attributes:
        values: (n, k) fp32, logits.
        indices: (n, k) int64, their classes.
        rest: (n,) fp32.
        classes: of the vocabulary, at least k.
    """

    values: torch.Tensor
    indices: torch.Tensor
    rest: torch.Tensor
    classes: int

    def __getitem__(self, chosen: slice | torch.Tensor) -> SparseLogits:
        """Of some positions."""
        return SparseLogits(self.values[chosen], self.indices[chosen], self.rest[chosen], self.classes)

    def dense(self) -> torch.Tensor:
        """(n, classes) logits."""
        return self.rest[:, None].repeat(1, self.classes).scatter_(-1, self.indices, self.values)

    def log_probabilities(self, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, k) of the kept classes, and (n,) of each other one (-inf where there is none)."""
        values, rest, others = self.values / temperature, self.rest / temperature, self.classes - self.values.shape[-1]
        if not others:
            return F.log_softmax(values, -1), torch.full_like(rest, -math.inf)
        total = torch.cat((values, (rest + math.log(others))[:, None]), -1).logsumexp(-1)
        return values - total[:, None], rest - total


def sparse_kl(teacher: SparseLogits, log_q: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(p || q), (n,): a sum over the k kept classes, and one term for the rest.

    The others have one probability r each, so their part is r ((V - k) log r - sum of log q over them), and that sum
    is the one over all classes less the one over the kept: p is never written out.

    Args:
        log_q: (n, V) finite log-probabilities of the student.
    """
    log_p, log_r = teacher.log_probabilities(temperature)
    kept, others = log_q.gather(-1, teacher.indices), teacher.classes - teacher.values.shape[-1]
    value = (log_p.exp() * (log_p - kept)).sum(-1)
    if others:
        value = value + log_r.exp() * (others * log_r - (log_q.sum(-1) - kept.sum(-1)))
    return value
