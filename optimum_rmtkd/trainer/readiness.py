"""Whether a model can teach its task, or has to be fine-tuned first: tensors, a model and batches in, a verdict out.
Knows no trainer."""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..batches import batch_size, evaluating, explained, first_samples, run
from ..distillation.objectives.answers import Answers
from ..distillation.signatures import unwrapped
from ..surgery.processes import several
from .chance import KINDS, Tally, tally


__all__ = ["Readiness", "new_head", "readiness"]

GAIN = 0.01  # of the loss of knowing nothing, that a teacher's must lie below it
GAIN_OF_A_NEW_HEAD = 0.10  # the same for one whose head may be new: what a random one gains by luck stays below

KNOWN_AS = {
    "classes": "of the label frequencies",
    "labels": "of the label frequencies",
    "numbers": "of the mean of the labels",
    "spans": "of uniform spans",
}
LOADED = "_is_hf_initialized"  # transformers sets it on every parameter that it reads from a checkpoint


@dataclass(frozen=True)
class Readiness:
    """Whether a model can teach.

    Attributes:
        can_teach: also where it could not be checked.
        loss: mean task loss on the calibration labels, in nats (regression: squared error); None where not known.
        chance: the same for an answer that knows the labels' frequencies (or their mean) and no input.
        why: one line for the log.
    """

    can_teach: bool
    loss: float | None
    chance: float | None
    why: str

    @property
    def checked(self) -> bool:
        """Whether its loss could be held against that of knowing nothing."""
        return self.loss is not None and self.chance is not None


@torch.no_grad()
def readiness(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    label_names: Sequence[str] = ("labels",),
    own_loss: bool = False,
    accelerator: Any = None,
    samples: int = 256,
) -> Readiness:
    """Can this model teach the labels of these batches?

    Not if its head was newly initialised, nor if its loss is no better than that of the labels' frequencies (of their
    mean, for regression; of uniform spans). Where there are no labels that are known here, a head that was not in the
    checkpoint and shows no traces of training counts as new. Cross-entropy, that of each label, or the squared error
    is computed from the logits, over the labels that count; label smoothing and the like do not enter. The model stays
    as it is.

    Args:
        batches: collated, on the model's device, labels included; those of this process.
        label_names: columns of the labels, as `Trainer.label_names`.
        own_loss: the task's loss is one of the user's own (class weights, for example): a model that loses against the
            frequencies may be all that it should be.
        accelerator: of several processes, which sum up what they have seen and decide alike: each has to call.
        samples: of this process, that are looked at.

    Raises:
        CalibrationError: the model cannot run on a batch.
    """

    def summed(values: torch.Tensor) -> torch.Tensor:
        if not several(accelerator):
            return values
        return accelerator.reduce(values.to(accelerator.device), reduction="sum").cpu()

    tallies = list(_tallies(model, batches, label_names, samples))
    total, new, absent = _of_all_processes(tallies, new_head(model), bool(_unloaded(model)), summed)
    return _judged(total, new, absent, own_loss)


def _tallies(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], label_names: Sequence[str], samples: int
) -> Iterator[Tally | None]:
    """Of each batch, up to the first that cannot be read."""
    answers, seen = Answers.of(model), 0
    with evaluating(model):
        for number, batch in enumerate(batches):
            batch = first_samples(batch, samples - seen)
            seen += batch_size(batch)
            if len(label_names) == 1 and label_names[0] in batch:
                batch["labels"] = batch[label_names[0]]
            found = None
            if any(isinstance(batch.get(name), torch.Tensor) for name in (*label_names, "labels")):
                with explained(model, batch, number):
                    found = tally(answers, run(model, batch), batch)
            yield found
            if found is None or seen >= samples:
                return


def _of_all_processes(
    tallies: Sequence[Tally | None], new: bool | None, absent: bool, summed: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[Tally | None, bool | None, bool]:
    """The sum over all batches of all processes, None if any could not be read; whether the head is new; and whether
    it was not in the checkpoint."""
    kinds = list(KINDS)
    alike = len({None if t is None else (t.kind, t.table.shape) for t in tallies}) == 1 and tallies[0] is not None
    own = functools.reduce(operator.add, tallies) if alike else None
    told = [0.0] * len(kinds)
    if own is not None:
        told[kinds.index(own.kind)] = 1.0
    size, sums = (own.table.numel(), (own.loss, own.count)) if own is not None else (0, (0.0, 0))
    unread = bool(tallies) and own is None
    header = torch.tensor([new is True, new is None, absent, unread, size, *sums, *told], dtype=torch.float64)
    certain, doubtful, absent, unread, size, loss, count, *told = summed(header).tolist()
    state = True if certain else None if doubtful else False
    if unread or sum(number > 0 for number in told) != 1:
        return None, state, bool(absent)
    table = torch.zeros(round(size / sum(told)), dtype=torch.float64) if own is None else own.table.flatten()
    kind = next(name for name, number in zip(kinds, told, strict=True) if number)
    table = summed(table)
    total = Tally(kind, loss, round(count), table.reshape(2, -1) if kind == "numbers" else table)
    return total, state, bool(absent)


def _judged(total: Tally | None, new: bool | None, absent: bool, own_loss: bool) -> Readiness:
    known = total is not None and total.count > 0
    loss, chance = (total.mean_loss, total.chance) if known else (None, None)
    if chance is not None and not (math.isfinite(chance) and chance > 0):
        chance = None  # one label, or the same everywhere: nothing to be better than
    if new:
        return Readiness(False, loss, chance, "its head is newly initialised")
    if loss is None and new is None and absent:
        why = "its head was not in the checkpoint, and no labels that are known here show that it has learnt since"
        return Readiness(False, None, None, why)
    if loss is None:
        return Readiness(True, None, None, "whether it can teach could not be checked: no labels that are known here")
    if chance is None:
        why = f"whether it can teach could not be checked: {total.count} calibration label(s), all the same"
        return Readiness(True, loss, None, why)
    gain = GAIN if new is False else GAIN_OF_A_NEW_HEAD
    figures = f"its loss on {total.count:,} calibration labels is {loss:.4g}, that {KNOWN_AS[total.kind]} {chance:.4g}"
    if loss <= (1 - gain) * chance:
        return Readiness(True, loss, chance, figures)
    if own_loss and new is False:
        return Readiness(True, loss, chance, f"{figures}; the task's loss is another one, so that says little")
    unsure = f", as its head may be new; of one that is known to be trained {GAIN:.0%} would do"
    expected = f"; expected at least {gain:.0%} less" + ("" if new is False else unsure)
    return Readiness(False, loss, chance, figures + expected)


def new_head(model: nn.Module) -> bool | None:
    """Whether what lies outside the backbone was newly initialised; None: it may be.

    transformers marks the parameters that it loads. One of a head that is not marked was new when the model was
    loaded, and still is if its biases are what they are at first, zero: any training moves them. Copies of a model
    have no marks; zero biases are then all there is to see.
    """
    inner = unwrapped(model)
    within = {id(p) for p in getattr(inner, "base_model", inner).parameters()}
    fresh = _unloaded(model)
    looked_at = fresh or {id(p) for p in inner.parameters() if id(p) not in within}
    owners = [m for m in inner.modules() if id(getattr(m, "bias", None)) in looked_at]
    zero = bool(owners) and not any(bool(m.bias.any()) for m in owners)
    if not fresh:
        return None if zero else False
    if zero:
        return True
    return False if owners and _starts_at_zero(inner, owners) else None


def _unloaded(model: nn.Module) -> set[int]:
    """The parameters outside the backbone, by id, that were not in the checkpoint which gave the others; none for a
    copy, which has no marks."""
    inner = unwrapped(model)
    within = {id(p) for p in getattr(inner, "base_model", inner).parameters()}
    if not any(getattr(p, LOADED, False) for p in inner.parameters()):
        return set()
    return {id(p) for p in inner.parameters() if id(p) not in within and not getattr(p, LOADED, False)}


def _starts_at_zero(model: nn.Module, modules: Sequence[nn.Module]) -> bool:
    """Whether the biases of these modules are zero when the model initialises them."""
    if not hasattr(model, "_init_weights"):
        return False
    with torch.random.fork_rng(devices=[]):
        for module in modules:
            again = copy.deepcopy(module).cpu()
            model._init_weights(again)
            if bool(again.bias.any()):
                return False
    return True
