"""How far a cut model's answers lie from those of the model that it was cut from, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..batches import Store, evaluating, run
from .likelihood import Answers, answers


__all__ = ["LOOKED_AT", "Remembered", "answers_per_sample", "looked_at", "mean_divergence"]

LOOKED_AT = 4  # batches: a warning needs no more, and a cut costs a multiple of so few passes
MOST_KEPT = 2**30  # bytes of answers: writing those of a long text over many words takes longer than a pass


class Remembered:
    """What a model answered where it ran over the batches anyway: a pass over a large one costs many seconds.

    Args:
        count: of the batches.
        device: of the model.
        most: bytes of answers that are kept; those beyond are to be computed again.

    Attributes:
        per_sample: answers a sample, by the number of the batch.
    """

    def __init__(self, count: int, device: torch.device | str, most: int = MOST_KEPT):
        self._wanted, self._places, self._left = set(looked_at(count)), {}, most
        self._logits, self._rest = Store(device), []  # of a language model they are large
        self.per_sample: dict[int, float] = {}

    def keep(self, index: int, given: Answers) -> None:
        """The answers to batch `index`; those that `mean_divergence` looks at are kept whole, as far as they fit."""
        self.per_sample[index] = answers_per_sample(given)
        size = given.logits.numel() * given.logits.element_size()
        if index in self._wanted and size <= self._left:
            self._left -= size
            self._places[index] = len(self._rest)
            self._logits.append(given.logits)
            self._rest.append((given.kind, given.mask))

    def of(self, index: int) -> Answers | None:
        """The answers to batch `index`; None where they were not kept."""
        if index not in self._places:
            return None
        place = self._places[index]
        kind, mask = self._rest[place]
        return Answers(kind, self._logits[place], mask)


@torch.no_grad()
def mean_divergence(
    teacher: nn.Module,
    student: nn.Module,
    batches: Sequence[dict[str, Any]],
    remembered: Remembered | None = None,
) -> float | None:
    """Mean Kullback-Leibler divergence of the student's answers from the teacher's, in nats an answer, over a few
    batches spread over all of them.

    An answer is a sample of a classifier, a real token of a language model or tagger (labelled ones, where the batch
    has labels), the begin or the end of a span. Independent labels of one sample are summed. Numbers count as Gaussian
    with the variance of the teacher's own numbers: half the share of it that the student misses.

    Args:
        remembered: the teacher's answers to these batches, as far as they are known.

    Returns:
        fp64, >= 0 up to rounding; NaN where a model's answers are not finite; None for models without answers.
    """
    total, count, numbers = 0.0, 0, []
    with evaluating(teacher), evaluating(student):
        for index in looked_at(len(batches)):
            batch = batches[index]
            true = remembered.of(index) if remembered is not None else None
            if true is None:
                true = answers(teacher, run(teacher, batch), batch)
            if true is None:
                return None
            found = answers(student, run(student, batch), batch)
            if true.kind == "numbers":
                numbers.append((true.logits.double().flatten(), found.logits.double().flatten()))
            else:
                total += float(_divergences(true, found).sum())
                count += true.count
    return _gaussian(numbers) if numbers else total / max(count, 1)


def answers_per_sample(given: Answers) -> float:
    """How many answers a model gives to one sample of a batch, on average."""
    return given.count / len(given.logits)


def looked_at(count: int) -> list[int]:
    """Numbers of at most LOOKED_AT of so many batches, evenly spaced: they may be sorted by length."""
    taken = min(LOOKED_AT, count)
    return [(2 * i + 1) * count // (2 * taken) for i in range(taken)]


def _divergences(true: Answers, found: Answers) -> torch.Tensor:
    """(batch, ...) divergence of each answer, 0 where it does not count."""
    if true.kind == "labels":
        p, log = true.logits.sigmoid(), nn.functional.logsigmoid
        yes, no = log(true.logits) - log(found.logits), log(-true.logits) - log(-found.logits)
        return (p * yes + (1 - p) * no).sum(-1)
    # sample by sample: the logits of a language model are the largest tensors there are
    nats = torch.stack([_between(p, q) for p, q in zip(true.logits, found.logits, strict=True)])
    return nats if true.mask is None else nats.masked_fill(~true.mask, 0.0)


def _between(true: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """(..., classes) logits each -> (...) KL divergence."""
    log_p, log_q = true.log_softmax(-1), found.log_softmax(-1)
    return nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _gaussian(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    true, found = (torch.cat(side) for side in zip(*pairs, strict=True))
    error, variance = (true - found).square().mean(), true.var(correction=0)
    return float(0.5 * error / variance.clamp_min(torch.finfo(variance.dtype).tiny))
