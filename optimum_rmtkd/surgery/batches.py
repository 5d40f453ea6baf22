"""Calibration data: the batches of a dataloader as its collator made them, or a refusal that names what is wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..batches import (
    LABELS,
    accepted_names,
    batch_size,
    described,
    first_samples,
    main_input,
    padding_mask,
    to_device,
    with_tensors,
)
from ..errors import CalibrationError, UnsupportedArchitectureError
from .families import family_of
from .sites import Anatomy, Site, get_module, has_module, linear_layers


__all__ = [
    "POSITION_TABLES",
    "check_batches",
    "check_cross_attention",
    "collect_batches",
    "cure_of_lists",
    "rows_before",
    "too_long",
]

logger = logging.getLogger(__name__)

ROW_AXES = {"input_ids": 1, "inputs_embeds": 2, "input_values": 1}  # of one sample; a batch has one more
POSITION_TABLES = ("position_embeddings", "embed_positions", "position_embedding", "wpe")
CACHES = ("past_key_values", "cache", "cache_params", "mems")
TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "decoder_input_ids")


def collect_batches(model: nn.Module, dataloader: Iterable, samples: int) -> list[dict[str, Any]]:
    """The first batches of a dataloader that hold `samples` samples together, on the device of `model`.

    They are kept, because surgery goes over the same data more than once and a dataloader may shuffle, or give its
    data once only. Arrays of numpy become tensors, columns that the forward does not take are left out (as the Trainer
    does) and named in the log; everything else stays what the collator made it.

    Raises:
        CalibrationError: nothing to iterate over, no batch, a batch that is no mapping of names to tensors, a row in
            place of a batch, a cache.
    """
    accepted = accepted_names(model) | set(LABELS)
    batches: list[dict[str, Any]] = []
    dropped: dict[str, None] = {}
    seen = 0
    for batch in _iterated(dataloader):
        if not isinstance(batch, Mapping):
            raise CalibrationError(_no_mapping(batch))
        dropped.update(dict.fromkeys(k for k in batch if k not in accepted))
        kept = {k: with_tensors(v) for k, v in batch.items() if k in accepted}
        _check_columns(model, batch, kept)
        size = batch_size(kept)
        if not size:
            continue
        kept = to_device(first_samples(kept, samples - seen), model.device)
        batches.append(kept)
        seen += batch_size(kept)
        if seen >= samples:
            break
    if dropped:
        logger.warning(
            "%s does not take %s: left out of the calibration batches.", type(model).__name__, ", ".join(dropped)
        )
    if not batches:
        raise CalibrationError(
            "The calibration data is empty: expected at least one batch with samples. Check the dataset and its "
            "filters; a generator gives its batches once only."
        )
    return batches


def _iterated(dataloader: Iterable) -> Iterable:
    if isinstance(dataloader, (Mapping, str, bytes)):
        what = f"a {type(dataloader).__name__}" + (
            f" with {', '.join(map(str, list(dataloader)[:6]))}" if isinstance(dataloader, Mapping) else ""
        )
        raise CalibrationError(
            f"The calibration data is {what}; expected an iterable of batches, such as a DataLoader. Pass a single "
            "batch as [batch], and one split of a dataset through a DataLoader."
        )
    try:
        return iter(dataloader)
    except TypeError as error:
        raise CalibrationError(
            f"The calibration data is a {type(dataloader).__name__}, which cannot be iterated over: expected batches, "
            "such as a DataLoader gives."
        ) from error


def _no_mapping(batch: Any) -> str:
    inside = f" Got {described(batch)}." if isinstance(batch, (list, tuple)) or hasattr(batch, "shape") else ""
    return (
        f"A calibration batch is a {type(batch).__name__}; expected a mapping of model inputs, as a transformers data "
        f"collator returns.{inside} A DataLoader over tuples, or over tensors, needs a collate_fn that names them, "
        'for example {"input_ids": ..., "attention_mask": ...}.'
    )


def cure_of_lists(name: str, value: Any) -> str:
    """What is wrong with a column of lists, and what to do."""
    return (
        f"Column {name!r} of a calibration batch is {described(value)}: expected a tensor with one row a sample. Let "
        'the dataset give tensors (dataset.set_format("torch")), or give the DataLoader a collator that pads and '
        "stacks (DataCollatorWithPadding(tokenizer), default_data_collator)."
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


def check_batches(model: nn.Module, batches: list[dict[str, Any]]) -> None:
    """What can be said of the data without running it.

    Raises:
        CalibrationError: all padding; token ids, or types of tokens, outside their tables; texts beyond the positions
            of a declared family; a mask shorter than its tokens.
    """
    masks = [padding_mask(batch) for batch in batches]
    if all(mask is not None and not bool(mask.any()) for mask in masks):
        raise CalibrationError(
            f"All tokens of the {len(batches)} calibration batches are padding (attention_mask is 0 everywhere): "
            "expected real tokens. Check the tokenizer and the collator."
        )
    rows = {
        "input_ids": _table_rows(model),
        "decoder_input_ids": None,
        "token_type_ids": getattr(model.config, "type_vocab_size", None) or None,
    }
    for name, count in rows.items():
        _check_ids(model, name, count, [b[name] for b in batches if isinstance(b.get(name), torch.Tensor)])
    if getattr(model.config, "is_encoder_decoder", False):
        answers = [
            b["labels"] for b in batches if isinstance(b.get("labels"), torch.Tensor) and b["labels"].dim() == 2
        ]
        _check_labels(model, [labels for labels in answers if not labels.is_floating_point()])
    for batch, mask in zip(batches, masks, strict=True):
        _check_length(model, batch, mask)
        ids = main_input(batch)
        if mask is not None and batch.get("input_ids") is ids and ids.dim() == 2 and _falls_short(mask, ids):
            raise CalibrationError(
                f"attention_mask has the shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}: expected a mask for "
                "every token. Pad both alike."
            )


def _check_length(model: nn.Module, batch: Mapping[str, Any], mask: torch.Tensor | None) -> None:
    """Where the positions are counted by real tokens, a GPU would not survive the look-up."""
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or batch.get("position_ids") is not None:
        return
    longest = ids.shape[1] if mask is None else int(mask.sum(-1).max())
    for table in _declared_positions(model):
        limit = table.num_embeddings - rows_before(table)
        if longest > limit:
            raise CalibrationError(too_long(model, longest, limit))


def _declared_positions(model: nn.Module) -> list[nn.Embedding]:
    """Tables of absolute positions that the model's family declares."""
    try:
        paths = getattr(family_of(model).layout, "stream", ())
    except UnsupportedArchitectureError:
        return []
    named = [path for path in paths if path.rpartition(".")[2] in POSITION_TABLES and has_module(model, path)]
    return [table for path in named if isinstance(table := get_module(model, path), nn.Embedding)]


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


def _check_labels(model: nn.Module, found: list[torch.Tensor]) -> None:
    head = model.get_output_embeddings()
    highest = max((int(labels.max()) for labels in found if labels.numel()), default=0)
    if isinstance(head, nn.Linear) and highest >= head.out_features:
        raise CalibrationError(
            f"The labels of the calibration data go up to {highest}, {type(model).__name__} has {head.out_features} "
            "outputs: the data was made with the tokenizer of another model. Tokenize it with the one the model was "
            "trained with."
        )


def _falls_short(mask: torch.Tensor, ids: torch.Tensor) -> bool:
    return len(mask) != len(ids) or mask.shape[1] < ids.shape[1]


def _table_rows(model: nn.Module) -> int | None:
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (NotImplementedError, AttributeError):  # models of several inputs do not always name one
        return None


def _check_ids(model: nn.Module, name: str, rows: int | None, found: list[torch.Tensor]) -> None:
    """A tokenizer of another model shows in its ids, which would otherwise fail deep inside an embedding."""
    wrong = next((ids for ids in found if ids.is_floating_point() or ids.dtype == torch.bool), None)
    if wrong is not None:
        raise CalibrationError(
            f"{name} of a calibration batch is {described(wrong)}: expected whole numbers (torch.long). Look for a "
            "conversion to float in the dataset or the collator."
        )
    filled = [ids for ids in found if ids.numel()]
    lowest, highest = (
        min((int(i.min()) for i in filled), default=0),
        max((int(i.max()) for i in filled), default=0),
    )
    if lowest < 0:
        raise CalibrationError(
            f"{name} of the calibration data holds {lowest}: expected ids of at least 0. -100 marks ignored labels, "
            "never inputs."
        )
    if rows is None or highest < rows:
        return
    if name == "token_type_ids":
        raise CalibrationError(
            f"The calibration data holds token_type_ids up to {highest}, {type(model).__name__} has {rows} types: "
            "leave the column out (return_token_type_ids=False), or use the tokenizer the model was trained with."
        )
    raise CalibrationError(
        f"The calibration data holds token id {highest}, the embedding table of {type(model).__name__} has {rows} "
        "rows: the data was made with the tokenizer of another model. Tokenize it with the one the model was trained "
        "with."
    )


def check_cross_attention(
    model: nn.Module, batches: list[dict[str, Any]], anatomy: Anatomy, sites: Iterable[Site]
) -> None:
    """A decoder with cross attention reads a second stream, which data and declaration have to know of.

    Raises:
        CalibrationError: batches without the states that it attends to.
        UnsupportedArchitectureError: one of `sites` is the stream, and a layer of a block is not declared.
    """
    config = model.config
    if not getattr(config, "add_cross_attention", False) or getattr(config, "is_encoder_decoder", False):
        return
    if any(batch.get("encoder_hidden_states") is None for batch in batches):
        raise CalibrationError(
            f"{type(model).__name__} has cross attention (config.add_cross_attention), the calibration batches have "
            "no encoder_hidden_states for it to attend to: expected (batch, length, features) in every batch. Add "
            "them, or set add_cross_attention=False if the model is used without an encoder."
        )
    known = {unit.path for unit in anatomy.units}
    inside = [path for path in linear_layers(model) if path.startswith(tuple(f"{b}." for b in anatomy.blocks))]
    unknown = [path for path in inside if path not in known]
    if unknown and any(site.kind == "hidden" for site in sites):
        raise UnsupportedArchitectureError(
            f"The cross attention of {type(model).__name__} reads the residual stream, and its family does not "
            f"declare it ({unknown[0]}): cutting the stream would leave it behind. Restrict `sites` to others (for "
            "example intermediate, attention_qk, attention_vo), or use form='factored'."
        )
