"""Calibration data that a model cannot be cut by, refused in words about the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..batches import POSITION_TABLES, decoder_mask, described, main_input, padding_mask, rows_before, too_long
from ..errors import CalibrationError, UnsupportedArchitectureError
from .decoders import DecoderLayout
from .families import family_of
from .sites import Anatomy, Site, get_module, has_module, linear_layers


__all__ = ["check_batches", "check_cross_attention"]


def check_batches(model: nn.Module, batches: Sequence[dict[str, Any]]) -> None:
    """What can be said of the data without running it.

    Raises:
        CalibrationError: all padding; token ids, or types of tokens, outside their tables; texts beyond the positions
            of a declared family; a mask shorter than its tokens, or of other values than marks; texts without a token.
    """
    for batch in batches:
        _check_marks(batch)
    masks = [padding_mask(batch) for batch in batches]
    if all(mask is not None and not bool(mask.any()) for mask in masks):
        raise CalibrationError(
            f"All tokens of the {len(batches)} calibration batches are padding (attention_mask is 0 everywhere): "
            "expected real tokens. Check the tokenizer and the collator."
        )
    decoded = [decoder_mask(model, batch) for batch in batches]
    if all(mask is not None and not bool(mask.any()) for mask in decoded):
        raise CalibrationError(
            f"The decoder of {type(model).__name__} gets nothing but padding in {len(batches)} calibration batches "
            "(labels are -100, or decoder_attention_mask is 0, everywhere): expected real tokens. Check the collator."
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


def _check_marks(batch: Mapping[str, Any]) -> None:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if isinstance(ids, torch.Tensor) and ids.dim() and len(ids) and not ids.numel():
        raise CalibrationError(
            f"input_ids of a calibration batch is {described(ids)}, texts without a single token: expected one at "
            "least. Look for empty texts, and for a tokenizer that is told to add no special tokens."
        )
    if not isinstance(mask, torch.Tensor) or mask.dim() > 3 or not mask.numel():  # four axes: added to the scores
        return
    finite = not mask.is_floating_point() or bool(mask.isfinite().all())
    if mask.is_complex() or not finite or (mask.dtype != torch.bool and float(mask.min()) < 0):
        found = "complex numbers" if mask.is_complex() else float(mask.min()) if finite else "NaN or infinite values"
        raise CalibrationError(
            f"attention_mask of a calibration batch holds {found}: expected 1 for each real token and 0 for padding, "
            "as a tokenizer gives it."
        )


def _check_length(model: nn.Module, batch: Mapping[str, Any], mask: torch.Tensor | None) -> None:
    """Where the positions are counted by real tokens, a GPU would not survive the look-up."""
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or batch.get("position_ids") is not None:
        return
    longest = ids.shape[1] if mask is None else int(mask.sum(-1).max())
    limits = [table.num_embeddings - rows_before(table) for table in _declared_positions(model)]
    # rotary positions go on for ever, but nothing was trained beyond; dynamic ones are made to follow the text
    dynamic = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type") == "dynamic"
    if not limits and not dynamic and _is_decoder(model):
        limits = [limit] if isinstance(limit := getattr(model.config, "max_position_embeddings", None), int) else []
    for limit in limits:
        if longest > limit:
            raise CalibrationError(too_long(model, longest, limit))


def _is_decoder(model: nn.Module) -> bool:
    try:
        return isinstance(family_of(model).layout, DecoderLayout)
    except UnsupportedArchitectureError:
        return False


def _declared_positions(model: nn.Module) -> list[nn.Embedding]:
    """Tables of absolute positions that the model's family declares."""
    try:
        paths = getattr(family_of(model).layout, "stream", ())
    except UnsupportedArchitectureError:
        return []
    named = [path for path in paths if path.rpartition(".")[2] in POSITION_TABLES and has_module(model, path)]
    return [table for path in named if isinstance(table := get_module(model, path), nn.Embedding)]


def _check_labels(model: nn.Module, found: list[torch.Tensor]) -> None:
    wrong = [int(labels.min()) for labels in map(_counted, found) if labels.numel() and int(labels.min()) < 0]
    if wrong:
        raise CalibrationError(
            f"The labels of the calibration data hold {wrong[0]}: expected ids of at least 0, and -100 where there is "
            "nothing to predict. The decoder reads them, shifted."
        )
    head = model.get_output_embeddings()
    highest = max((int(labels.max()) for labels in found if labels.numel()), default=0)
    if isinstance(head, nn.Linear) and highest >= head.out_features:
        raise CalibrationError(
            f"The labels of the calibration data go up to {highest}, {type(model).__name__} has {head.out_features} "
            "outputs: the data was made with the tokenizer of another model. Tokenize it with the one the model was "
            "trained with."
        )


def _counted(labels: torch.Tensor) -> torch.Tensor:
    return labels[labels != -100]


def _falls_short(mask: torch.Tensor, ids: torch.Tensor) -> bool:
    return len(mask) != len(ids) or mask.shape[1] < ids.shape[1]


def _table_rows(model: nn.Module) -> int | None:
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (NotImplementedError, AttributeError):  # models of several inputs do not always name one
        return None


def _check_ids(model: nn.Module, name: str, rows: int | None, found: list[torch.Tensor]) -> None:
    """A tokenizer of another model shows in its ids, which would otherwise fail deep inside an embedding."""
    wrong = next((ids for ids in found if ids.dtype not in (torch.int32, torch.int64)), None)
    if wrong is not None:
        raise CalibrationError(
            f"{name} of a calibration batch is {described(wrong)}: expected whole numbers (torch.long). Look for a "
            "conversion in the dataset or the collator."
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
    model: nn.Module, batches: Sequence[dict[str, Any]], anatomy: Anatomy, sites: Iterable[Site]
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
