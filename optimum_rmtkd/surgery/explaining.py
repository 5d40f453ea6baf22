"""Why a model cannot run on a batch, in words about the batch: what it holds, what does not fit, what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..batches import LABELS, accepted_names, described, main_input
from ..errors import CalibrationError, RMTKDError
from .batches import POSITION_TABLES, cure_of_lists, rows_before, too_long


__all__ = ["explained", "guarded_tables", "position_limit"]

# what a forward raises where its input is wrong; errors of ours (ValueErrors, too) pass as they are
RAW = (RuntimeError, IndexError, KeyError, TypeError, ValueError, AttributeError, AssertionError)


@contextlib.contextmanager
def explained(model: nn.Module, batch: Mapping[str, Any], number: int) -> Iterator[None]:
    """Turn what a forward pass over a batch raises into an error about that batch.

    Args:
        number: of the batch, from 0.

    Raises:
        CalibrationError: in place of any other error, but for memory that does not suffice.
    """
    try:
        yield
    except (RMTKDError, torch.OutOfMemoryError):
        raise
    except RAW as error:
        holds = ", ".join(f"{name} {described(value)}" for name, value in batch.items())
        hints = " ".join(_hints(model, batch)) or (
            f"Expected what {type(model).__name__} takes as model(**batch): try that first."
        )
        text = " ".join(str(error).split())
        raise CalibrationError(
            f"{type(model).__name__} cannot run on calibration batch {number}, which holds {holds}. {hints} "
            f"({type(error).__name__}: {text[:400]})"
        ) from error


def position_limit(model: nn.Module) -> int | None:
    """Tokens that the longest text may have, by the tables of absolute positions inside a model; None without one."""
    rows = [
        module.num_embeddings - rows_before(module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in POSITION_TABLES and isinstance(module, nn.Embedding)
    ]
    return min(rows, default=None)


@contextlib.contextmanager
def guarded_tables(model: nn.Module) -> Iterator[None]:
    """Check what every table is asked for before it is looked up: on a GPU a row that does not exist ends the
    process's use of the device, and names nothing.

    Raises:
        CalibrationError: inside this context; names the table, the row and how many there are.
    """
    handles = []
    for name, module in model.named_modules():
        if type(module).forward is not nn.Embedding.forward:
            continue

        def check(module, args, kwargs, name=name):
            rows = args[0] if args else kwargs.get("input")
            if isinstance(rows, torch.Tensor) and rows.numel() and not rows.is_floating_point():
                _check_rows(model, name, module, rows)

        handles.append(module.register_forward_pre_hook(check, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_rows(model: nn.Module, name: str, table: nn.Embedding, rows: torch.Tensor) -> None:
    lowest, highest = int(rows.min()), int(rows.max())
    if 0 <= lowest and highest < table.num_embeddings:
        return
    wrong = highest if highest >= table.num_embeddings else lowest
    if name.rpartition(".")[2] in POSITION_TABLES and wrong > 0:
        raise CalibrationError(
            too_long(model, wrong + 1 - rows_before(table), table.num_embeddings - rows_before(table))
        )
    raise CalibrationError(
        f"The calibration data asks {name} of {type(model).__name__} for row {wrong}, it has {table.num_embeddings}: "
        "expected ids of the model's own tokenizer or processor."
    )


def _hints(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[str]:
    """What is visibly wrong with a batch."""
    config, accepted = model.config, accepted_names(model)
    for name, value in batch.items():
        if isinstance(value, (list, tuple)) and name in accepted and name not in LABELS:
            yield cure_of_lists(name, value)
    first, expected = main_input(batch), model.main_input_name
    if expected not in batch and "inputs_embeds" not in batch:
        yield f"It has no {expected}, the model's main input."
    if getattr(config, "is_encoder_decoder", False) and not _has_decoder_inputs(batch):
        yield (
            "This is an encoder-decoder, and the batch has neither labels (one a token) nor decoder_input_ids: add "
            "labels, as DataCollatorForSeq2Seq does, and the model shifts them as in training."
        )
    yield from _length_hints(model, batch)
    limit, places = position_limit(model), batch.get("position_ids")
    if limit is not None and isinstance(places, torch.Tensor) and places.numel() and int(places.max()) >= limit:
        yield f"position_ids go up to {int(places.max())}, {type(model).__name__} has {limit} positions."
    dtype = getattr(model, "dtype", torch.float32)
    if isinstance(first, torch.Tensor) and first.is_floating_point() and first.dtype != dtype:
        yield f"The data is {first.dtype}, the weights are {dtype}: cast one to the other."
    if isinstance(batch.get("pixel_values"), torch.Tensor):
        yield from _image_hints(config, batch["pixel_values"])


def _length_hints(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[str]:
    """Sequences beyond the positions of the stack that reads them."""
    both = getattr(model.config, "is_encoder_decoder", False)
    encoder, decoder = (model.get_encoder(), model.get_decoder()) if both else (model, model)
    for stack, names in ((encoder, ("input_ids", "inputs_embeds")), (decoder, ("decoder_input_ids", "labels"))):
        limit = position_limit(stack)
        given = [batch[name] for name in names if isinstance(batch.get(name), torch.Tensor) and batch[name].dim() > 1]
        longest = max((tensor.shape[1] for tensor in given), default=0)
        if limit is not None and longest > limit:
            yield too_long(model, longest, limit)
            return


def _has_decoder_inputs(batch: Mapping[str, Any]) -> bool:
    labels = batch.get("labels")
    sequences = isinstance(labels, torch.Tensor) and labels.dim() > 1
    return sequences or any(k.startswith("decoder_input") and v is not None for k, v in batch.items())


def _image_hints(config: Any, pixels: torch.Tensor) -> Iterator[str]:
    channels, size = getattr(config, "num_channels", None), getattr(config, "image_size", None)
    if pixels.dim() == 3:
        yield (
            "pixel_values has three axes: expected (batch, channels, height, width). If this is one row, pass a "
            "DataLoader(dataset, batch_size=32) in place of the dataset."
        )
    if pixels.dim() != 4:
        return
    if not pixels.is_floating_point():
        yield "pixel_values are whole numbers: expected floats, as the model's image processor makes them."
    if isinstance(channels, int) and pixels.shape[1] != channels:
        last = " (they seem to be last)" if pixels.shape[3] == channels else ""
        yield (
            f"The images have {pixels.shape[1]} channels on the second axis{last}, the model takes {channels}: "
            "process them with the model's image processor."
        )
    expected = (size, size) if isinstance(size, int) else size
    if isinstance(expected, (list, tuple)) and tuple(pixels.shape[2:]) != tuple(expected):
        yield (
            f"The images are {pixels.shape[2]} x {pixels.shape[3]}, the model takes {expected[0]} x {expected[1]}: "
            "resize them, or add interpolate_pos_encoding=True to the batch if its forward takes that."
        )
