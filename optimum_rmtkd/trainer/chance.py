"""What a model's answers lose on labels, and what knowing nothing but the labels themselves would lose: sums over
batches, from which both losses follow. Knows outputs and batches, no model's training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..batches import padding_mask
from ..distillation.counts import IGNORED, answers_that_count
from ..distillation.objectives.answers import Answers


__all__ = ["KINDS", "Tally", "frequency_loss", "tally"]


@dataclass(frozen=True)
class Tally:
    """Sums over some labels.

    Attributes:
        kind: one of `KINDS`: how the labels are read.
        loss: sum of the losses, in nats (regression: squared errors).
        count: how many labels that is a sum over.
        table: fp64, on the CPU; what the loss of knowing nothing is computed from, see `KINDS`.
    """

    kind: str
    loss: float
    count: int
    table: torch.Tensor

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.kind, self.loss + other.loss, self.count + other.count, self.table + other.table)

    @property
    def mean_loss(self) -> float:
        """Of the model."""
        return self.loss / self.count

    @property
    def chance(self) -> float:
        """Mean loss of an answer that knows the labels' statistics and no input; NaN where nothing can be told."""
        return KINDS[self.kind](self.table, self.count)


def frequency_loss(counts: torch.Tensor) -> float:
    """Entropy, in nats, of the distribution that labels were drawn from: the mean loss of knowing no more than it.

    That of the counts' own frequencies is too small by about (classes - 1) / (2 n) (Miller 1955), much for a
    vocabulary; the mean loss of answering each label with the frequencies of the others (leave one out) is too large
    by as much. It is half-way between them. In the latter, the share of labels that were seen once is kept for what
    was not seen yet (Good 1953) and spread evenly; it is at most the logarithm of the number of classes.

    Args:
        counts: (classes,), how often each was seen.
    """
    classes, total = len(counts), float(counts.sum())
    if total < 2 or classes < 2:
        return math.nan
    seen = counts[counts > 0]
    unseen = float((seen == 1).sum()) / total
    from_others = (1 - unseen) * (seen - 1).clamp_min(0.0) / (total - 1) + unseen / classes
    from_all, left_out = (float(-(seen * p.log()).sum()) / total for p in (seen / total, from_others))
    return 0.5 * (from_all + min(left_out, math.log(classes)))


def _of_each_label(positives: torch.Tensor, count: int) -> float:
    """`positives` (labels,) of `count` / labels samples each."""
    samples = count / len(positives)
    tables = torch.stack((samples - positives, positives), dim=-1)
    return sum(frequency_loss(table) for table in tables) / len(tables)


def _of_the_mean(moments: torch.Tensor, count: int) -> float:
    """`moments` (2, outputs), sums of the labels and of their squares: the variance, the squared error of the mean."""
    samples = count / moments.shape[1]
    if samples < 2:
        return math.nan
    within = moments[1] - moments[0].square() / samples
    return float(within.clamp_min(0.0).mean()) / (samples - 1)


KINDS: dict[str, Callable[[torch.Tensor, int], float]] = {
    "classes": lambda counts, _: frequency_loss(counts),  # (classes,)
    "labels": _of_each_label,
    "numbers": _of_the_mean,
    "spans": lambda logs, count: float(logs) / count,  # sum of log(positions that are no padding)
}


def tally(answers: Answers, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> Tally | None:
    """The sums over one batch; None where labels and answers do not fit together in a way that is known here.

    Args:
        answers: how the model means its logits.
        batch: `labels`, or `start_positions` and `end_positions`.
    """
    if "start_logits" in outputs:
        return _spans(outputs, batch)
    logits, labels = outputs.get("logits"), batch.get("labels")
    if not isinstance(logits, torch.Tensor) or not isinstance(labels, torch.Tensor) or not logits.dim():
        return None
    if logits.dim() == 3 and labels.dim() == 2 and not labels.is_floating_point():
        return _tokens(answers, logits, batch)
    problem = answers.problem or _implied(logits, labels)
    if problem == "regression":
        return _numbers(logits, labels)
    if problem == "multi_label_classification":
        return _each_label(logits, labels)
    if logits.dim() == 2 and labels.numel() == len(logits) and not labels.is_floating_point():
        return _classes(logits, labels.reshape(-1))
    return None


def _implied(logits: torch.Tensor, labels: torch.Tensor) -> str | None:
    """The problem that transformers infers where a config names none."""
    if logits.shape[-1] == 1:
        return "regression"
    several = labels.is_floating_point() and labels.dim() == 2
    return "multi_label_classification" if several else None


def _tokens(answers: Answers, logits: torch.Tensor, batch: Mapping[str, Any]) -> Tally | None:
    labels = batch["labels"]
    if logits.shape[:2] != labels.shape:
        return None
    counted = answers_that_count(batch, answers.shifted, answers.decoding)
    if answers.shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    if counted is None or counted.shape != labels.shape:
        counted = labels != IGNORED
    return _classes(logits[counted], labels[counted])


def _classes(logits: torch.Tensor, labels: torch.Tensor) -> Tally | None:
    """Logits (n, classes), labels (n,)."""
    known = labels != IGNORED
    logits, labels = logits[known].float(), labels[known].long()
    classes = logits.shape[-1]
    if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < classes):
        return None
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return Tally("classes", float(loss), len(labels), torch.bincount(labels.cpu(), minlength=classes).double())


def _each_label(logits: torch.Tensor, labels: torch.Tensor) -> Tally | None:
    """Logits and labels (n, labels)."""
    if logits.dim() != 2 or logits.shape != labels.shape:
        return None
    labels = labels.float()
    loss = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum")
    return Tally("labels", float(loss), labels.numel(), labels.double().sum(0).cpu())


def _numbers(logits: torch.Tensor, labels: torch.Tensor) -> Tally | None:
    """Logits and labels (n, outputs), of one output also (n,)."""
    if logits.dim() != 2 or labels.numel() != logits.numel():
        return None
    labels = labels.reshape(logits.shape).double().cpu()
    loss = (logits.double().cpu() - labels).square().sum()
    return Tally("numbers", float(loss), labels.numel(), torch.stack((labels.sum(0), labels.square().sum(0))))


def _spans(outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> Tally | None:
    """Start and end, each a distribution over positions; positions outside the text are ignored, as by the models."""
    given = [(outputs[f"{end}_logits"], batch.get(f"{end}_positions")) for end in ("start", "end")]
    if not all(isinstance(labels, torch.Tensor) and labels.dim() in (1, 2) for _, labels in given):
        return None
    loss, count, logs, mask = 0.0, 0, 0.0, padding_mask(batch)
    for logits, labels in given:
        labels, positions = labels.reshape(len(logits)), logits.shape[-1]
        inside = (labels >= 0) & (labels < positions)
        if mask is None or mask.shape != logits.shape:
            real = torch.full_like(labels, positions)
        else:
            real = mask.sum(-1)
        loss += float(F.cross_entropy(logits[inside].float(), labels[inside].long(), reduction="sum"))
        logs += float(real[inside].double().log().sum())
        count += int(inside.sum())
    return Tally("spans", loss, count, torch.tensor([logs], dtype=torch.float64))
