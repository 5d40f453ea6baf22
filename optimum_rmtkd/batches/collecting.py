"""The batches of a dataloader as its collator made them, or a refusal that names what is wrong with them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import CalibrationError, RMTKDError
from .explaining import RAW, cure_of_lists, in_one_line
from .reading import INPUTS, LABELS, accepted_names, batch_size, described, first_samples, with_tensors
from .rows import unfit_columns
from .storing import Store


__all__ = ["collect_batches", "collected", "from_loader", "no_mapping"]

logger = logging.getLogger(__name__)

# of one sample; a batch has one more
ROW_AXES = {"input_ids": 1, "inputs_embeds": 2, "input_values": 1, "input_features": 2}
CACHES = ("past_key_values", "cache", "cache_params", "mems")
TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "decoder_input_ids")


def collect_batches(model: nn.Module, dataloader: Iterable, samples: int) -> Sequence[dict[str, Any]]:
    """The first batches of a dataloader that hold `samples` samples together, each on the device of `model` when it is
    read.

    They are kept, because surgery goes over the same data more than once and a dataloader may shuffle, or give its
    data once only; in a `Store`, which holds few of them in memory.

    Raises:
        CalibrationError: as `collected`; or no batch with samples.
    """
    batches = Store(model.device)
    seen = 0
    for batch in collected(model, dataloader):
        part = first_samples(batch, samples - seen)
        batches.append(part)
        seen += batch_size(part)
        if seen >= samples:
            break
    if not batches:
        raise CalibrationError(
            "The calibration data is empty: expected at least one batch with samples. Check the dataset and its "
            "filters; a generator gives its batches once only."
        )
    return batches


def collected(model: nn.Module, dataloader: Iterable) -> Iterator[dict[str, Any]]:
    """The batches of a dataloader that hold samples, one after the other.

    Arrays of numpy become tensors, columns that the forward does not take are left out (as the Trainer does) and
    named in the log, once; everything else stays what the collator made it, labels included.

    Raises:
        CalibrationError: nothing to iterate over, a loader that fails, a batch that is no mapping of names to tensors,
            a row in place of a batch, a cache, inputs that are not finite.
    """
    accepted = accepted_names(model) | set(LABELS)
    dropped: set[Any] = set()
    for number, batch in enumerate(from_loader(dataloader)):
        if not isinstance(batch, Mapping):
            raise CalibrationError(no_mapping(batch))
        foreign = [k for k in batch if k not in accepted and k not in dropped]
        kept = {k: with_tensors(v) for k, v in batch.items() if k in accepted}
        _check_columns(model, batch, kept)
        if foreign:
            dropped.update(foreign)
            logger.warning(
                "%s does not take %s: left out of the calibration batches.",
                type(model).__name__,
                ", ".join(map(str, foreign)),
            )
        if batch_size(kept):
            _check_finite(kept, number)
            yield kept


def from_loader(dataloader: Iterable) -> Iterator[Any]:
    """What a dataloader gives, whatever it is.

    Raises:
        CalibrationError: nothing to iterate over; or the dataset or collator fails: names the batch and the error.
    """
    if isinstance(dataloader, (Mapping, str, bytes)):
        what = f"a {type(dataloader).__name__}" + (
            f" with {', '.join(map(str, list(dataloader)[:6]))}" if isinstance(dataloader, Mapping) else ""
        )
        raise CalibrationError(
            f"The calibration data is {what}; expected an iterable of batches, such as a DataLoader. Pass a single "
            "batch as [batch], and one split of a dataset through a DataLoader."
        )
    try:
        batches = iter(dataloader)
    except TypeError as error:
        raise CalibrationError(
            f"The calibration data is a {type(dataloader).__name__}, which cannot be iterated over: expected batches, "
            "such as a DataLoader gives."
        ) from error
    for number in itertools.count():
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RMTKDError, torch.OutOfMemoryError):
            raise
        except (*RAW, OSError) as error:
            what = " (DataLoader)" if isinstance(dataloader, torch.utils.data.DataLoader) else ""
            raise CalibrationError(
                f"The calibration data{what} fails at batch {number}, in its dataset or its collator. "
                f"{unfit_columns(dataloader)} ({type(error).__name__}: {in_one_line(error)})"
            ) from error
        yield batch


def no_mapping(batch: Any) -> str:
    """The refusal of a batch that does not name its tensors."""
    inside = f" Got {described(batch)}." if isinstance(batch, (list, tuple)) or hasattr(batch, "shape") else ""
    return (
        f"A calibration batch is a {type(batch).__name__}; expected a mapping of model inputs, as a transformers data "
        f"collator returns.{inside} A DataLoader over tuples, or over tensors, needs a collate_fn that names them, "
        'for example {"input_ids": ..., "attention_mask": ...}.'
    )


def _check_columns(model: nn.Module, given: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    cache = next((name for name in CACHES if given.get(name) is not None), None)
    if cache is not None:
        raise CalibrationError(
            f"A calibration batch holds {cache}: every pass of the surgery would find another state of it. Leave it "
            "out; texts are calibrated whole."
        )
    if not any(name not in LABELS for name in kept):
        raise CalibrationError(
            f"A calibration batch holds {', '.join(map(str, given)) or 'nothing'}, of which {type(model).__name__} "
            f"takes nothing: expected {model.main_input_name} and what goes with it. Tokenize texts and process "
            "images first, and name the columns as the model's forward does."
        )
    for name in TOKENS:
        if not isinstance(kept.get(name), (torch.Tensor, type(None))):
            raise CalibrationError(cure_of_lists(name, kept[name]))
    for name, value in kept.items():
        if isinstance(value, torch.Tensor) and (value.is_meta or value.is_nested or value.layout != torch.strided):
            kind = "on the meta device" if value.is_meta else "nested" if value.is_nested else str(value.layout)
            raise CalibrationError(
                f"{name} of a calibration batch is {kind.removeprefix('torch.')}: expected a dense tensor with values "
                "(to_dense(), to_padded_tensor(0), or the collator's own)."
            )
    for name, axes in ROW_AXES.items():
        if isinstance(kept.get(name), torch.Tensor) and kept[name].dim() <= axes:
            raise CalibrationError(
                f"{name} of a calibration batch has the shape {tuple(kept[name].shape)}, that of one row: expected a "
                "batch of rows. Pass a DataLoader(dataset, batch_size=32, collate_fn=...) in place of the dataset or "
                "a list of rows."
            )
    if not any(isinstance(v, torch.Tensor) and v.dim() for k, v in kept.items() if k not in LABELS):
        lists = next((k for k, v in kept.items() if isinstance(v, (list, tuple))), None)
        if lists is not None:
            raise CalibrationError(cure_of_lists(lists, kept[lists]))


def _check_finite(batch: Mapping[str, Any], number: int) -> None:
    """NaN in what a model reads would be found layers later, in the words of a layer."""
    for name in INPUTS:
        value = batch.get(name)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
            raise CalibrationError(
                f"{name} of calibration batch {number} is {described(value)}, of which "
                f"{int((~value.isfinite()).sum())} values are NaN or infinite: expected finite numbers. Look for a "
                "division by zero in the preprocessing, or an overflow in half precision."
            )
