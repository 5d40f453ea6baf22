"""The one training that all methods get: the same rows in the same order, steps, loss and optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, get_scheduler

from .common import inputs_of


BATCH = 32
WINDOW = 16  # batches whose rows are sorted by length together: less padding
KL, TASK = 0.7, 0.3  # weights of the distillation loss, as in the recipe of this library


def order_of(lengths: Sequence[int], steps: int, seed: int) -> list[list[int]]:
    """`steps` batches of row numbers, a permutation of all rows after the other, similar lengths together."""
    generator, found = torch.Generator().manual_seed(seed), []
    while len(found) < steps:
        rows = torch.randperm(len(lengths), generator=generator).tolist()
        windows = [rows[at : at + BATCH * WINDOW] for at in range(0, len(rows), BATCH * WINDOW)]
        rows = [row for window in windows for row in sorted(window, key=lengths.__getitem__)]
        batches = [rows[at : at + BATCH] for at in range(0, len(rows) - BATCH + 1, BATCH)] or [rows]
        found += [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return found[:steps]


@torch.no_grad()
def logits_of(model: PreTrainedModel, rows: Dataset, collator: Callable, batch_size: int = 64) -> torch.Tensor:
    """(rows, classes) in the order of the rows, computed in that of their lengths."""
    order = sorted(range(len(rows)), key=[len(ids) for ids in rows["input_ids"]].__getitem__)
    parts = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    model.eval()
    found = [model(**inputs_of(batch_of(rows, part, collator))).logits.float() for part in parts]
    return torch.cat(found)[torch.tensor(order).argsort()]


def batch_of(rows: Dataset, numbers: Sequence[int], collator: Callable) -> dict[str, Any]:
    """The collator's batch of these rows."""
    return dict(collator([rows[number] for number in numbers]))


def train(
    student: PreTrainedModel,
    rows: Dataset,
    answers: torch.Tensor,
    collator: Callable,
    *,
    steps: int,
    rate: float,
    seed: int,
    distils: bool = True,
) -> PreTrainedModel:
    """Train the student in place, without dropout, in bfloat16 beside float32 weights.

    Args:
        answers: (rows, classes) the teacher's logits, in the order of the rows.
        distils: 0.7 KL(teacher, student) + 0.3 cross-entropy; False: cross-entropy alone.
    """
    student.train()
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.01)
    schedule = get_scheduler("linear", optimizer, round(0.06 * steps), steps)
    for numbers in order_of([len(ids) for ids in rows["input_ids"]], steps, seed):
        batch = batch_of(rows, numbers, collator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = student(**inputs_of(batch)).logits.float()
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        if distils:
            loss = TASK * loss + KL * divergence(answers[numbers], logits)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return student.eval()


def divergence(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """Mean Kullback-Leibler divergence of answers (rows, classes) from the teacher's, in nats."""
    return nn.functional.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
