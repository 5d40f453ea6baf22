"""Why a model cannot run on a batch, in words about the batch: what it holds, what does not fit, what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import CalibrationError, RMTKDError
from .reading import LABELS, accepted_names, described, main_input


__all__ = [
    "POSITION_TABLES",
    "cure_of_lists",
    "explained",
    "guarded_tables",
    "in_one_line",
    "position_limit",
    "rows_before",
    "too_long",
]

POSITION_TABLES = ("position_embeddings", "embed_positions", "position_embedding", "wpe")

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
        hints = " ".join(_hints(model, batch, str(error))) or (
            f"Expected what {type(model).__name__} takes as model(**batch): try that first."
        )
        raise CalibrationError(
            f"{type(model).__name__} cannot run on calibration batch {number}, which holds {holds}. {hints} "
            f"({type(error).__name__}: {in_one_line(error)})"
        ) from error


def in_one_line(error: Exception) -> str:
    """What an error says, at most 400 characters; of one that comes with the traceback of another process, its end."""
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1]
    return " ".join(text.split())[:400]


def position_limit(model: nn.Module) -> int | None:
    """Tokens that the longest text may have, by the tables of absolute positions inside a model; None without one."""
    rows = [
        module.num_embeddings - rows_before(module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in POSITION_TABLES and isinstance(module, nn.Embedding)
    ]
    return min(rows, default=None)


def cure_of_lists(name: str, value: Any) -> str:
    """What is wrong with a column of lists, and what to do."""
    return (
        f"Column {name!r} of a calibration batch is {described(value)}: expected a tensor with one row a sample. Let "
        'the dataset give tensors (dataset.set_format("torch")), or give the DataLoader a collator that pads and '
        "stacks (DataCollatorWithPadding(tokenizer), default_data_collator)."
    )


def rows_before(table: nn.Embedding) -> int:
    """Rows of a table of positions before that of the first token: RoBERTa starts behind the padding token, BART at
    2."""
    return getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1)


def too_long(model: nn.Module, length: int, limit: int) -> str:
    """The refusal of texts beyond the positions."""
    return (
        f"A text of the calibration data has {length} tokens, {type(model).__name__} has positions for {limit}: "
        f"tokenize with truncation=True, max_length={limit}."
    )


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


def _hints(model: nn.Module, batch: Mapping[str, Any], error: str) -> Iterator[str]:
    """What is visibly wrong with a batch."""
    config, accepted = model.config, accepted_names(model)
    both, labels = getattr(config, "is_encoder_decoder", False), batch.get("labels")
    for name, value in batch.items():
        read = name in accepted and (name not in LABELS or (both and name == "labels"))
        if read and isinstance(value, (list, tuple)):
            yield cure_of_lists(name, value)
    first, expected = main_input(batch), model.main_input_name
    if expected not in batch and "inputs_embeds" not in batch:
        yield f"It has no {expected}, the model's main input."
    if both and isinstance(labels, torch.Tensor) and labels.dim() > 1 and labels.is_floating_point():
        yield f"labels is {described(labels)}, and the decoder reads them: expected whole numbers (torch.long)."
    silent = not isinstance(labels, (list, tuple)) and not _has_decoder_inputs(batch)
    if both and silent and "inputs_embeds" in error:  # some make decoder inputs of input_ids, and miss something else
        yield (
            "This is an encoder-decoder, and the batch has neither labels (one a token) nor decoder_input_ids: add "
            "labels, as DataCollatorForSeq2Seq does, and the model shifts them as in training."
        )
    yield from list(_length_hints(model, batch)) or _shape_hints(model, batch)
    if "padding token" in error:  # classifiers look for the last token that is none
        yield (
            f"{type(model).__name__} reads the last token of each text, and config.pad_token_id is not set: set it to "
            "that of the tokenizer (which may be its eos), before anything is padded."
        )
    limit, places = position_limit(model), batch.get("position_ids")
    if isinstance(places, torch.Tensor) and places.numel() and int(places.min()) < 0:
        yield f"position_ids hold {int(places.min())}: expected numbers of at least 0."
    if limit is not None and isinstance(places, torch.Tensor) and places.numel() and int(places.max()) >= limit:
        yield f"position_ids go up to {int(places.max())}, {type(model).__name__} has {limit} positions."
    dtype = getattr(model, "dtype", torch.float32)
    if isinstance(first, torch.Tensor) and first.is_floating_point() and first.dtype != dtype:
        yield f"The data is {first.dtype}, the weights are {dtype}: cast one to the other."
    if isinstance(batch.get("pixel_values"), torch.Tensor):
        yield from _image_hints(config, batch["pixel_values"])


def _shape_hints(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[str]:
    """Columns whose shapes do not go with the tokens."""
    ids, embeds = batch.get("input_ids"), batch.get("inputs_embeds")
    if isinstance(ids, torch.Tensor) and ids.dim() == 3:
        yield "input_ids has three axes, (batch, choices, length), which only models of multiple choice take."
    width = getattr(model.config, "embedding_size", getattr(model.config, "hidden_size", None))
    if isinstance(embeds, torch.Tensor) and isinstance(width, int) and embeds.shape[-1] != width:
        yield f"inputs_embeds has {embeds.shape[-1]} features, the model's tokens have {width}."
    text = ids if isinstance(ids, torch.Tensor) else embeds[..., 0] if isinstance(embeds, torch.Tensor) else None
    if text is None or text.dim() != 2:
        return
    rows, length = text.shape
    for name in ("attention_mask", "token_type_ids", "position_ids"):
        value = batch.get(name)
        one = name == "position_ids" and isinstance(value, torch.Tensor) and value.shape == (1, length)
        if isinstance(value, torch.Tensor) and value.shape != text.shape and value.dim() != 4 and not one:
            yield f"{name} has the shape {tuple(value.shape)}: expected ({rows}, {length}), one value a token."


def _length_hints(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[str]:
    """Sequences beyond the positions of the stack that reads them."""
    both = getattr(model.config, "is_encoder_decoder", False)
    encoder, decoder = (model.get_encoder(), model.get_decoder()) if both else (model, model)
    for stack, names in ((encoder, ("input_ids", "inputs_embeds")), (decoder, ("decoder_input_ids", "labels"))):
        limit = position_limit(stack)
        given = {k: batch[k] for k in names if isinstance(batch.get(k), torch.Tensor) and batch[k].dim() > 1}
        longest = max((v.shape[-2 if k == "inputs_embeds" else -1] for k, v in given.items()), default=0)
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
