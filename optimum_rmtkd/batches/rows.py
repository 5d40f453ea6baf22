"""Why the rows of a dataset make no batch: which column, and what to do with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import RMTKDError
from ..validation.wording import shown
from .explaining import RAW
from .reading import INPUTS, LABELS


__all__ = ["unfit_columns"]

LOOKED_AT = 64  # rows
UNKNOWN = (
    "Rows of different sizes need a collator that pads them (DataCollatorWithPadding(tokenizer)), columns of text "
    "have to be left out."
)
TOKENIZE = (
    "dataset.map(lambda row: tokenizer(row[{name!r}], truncation=True), remove_columns=[{name!r}]), and a collator "
    "that pads: DataCollatorWithPadding(tokenizer)"
)


def unfit_columns(loader: Any) -> str:
    """What is wrong with the columns of the rows that a loader could not collate, in sentences; general advice where
    the rows cannot be read or show nothing.

    Args:
        loader: a DataLoader, or another iterable of batches with its rows as `dataset`.
    """
    rows = list(_first_rows(getattr(loader, "dataset", None)))
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        return UNKNOWN
    columns = {name: [row.get(name) for row in rows] for name in rows[0]}
    found = [text for name, values in columns.items() if (text := _unfit(name, values, columns))]
    if not found and not any(name in INPUTS for name in columns):
        found = [
            f"The rows hold {', '.join(map(str, columns)) or 'nothing'}, none of what a model reads "
            f"({', '.join(INPUTS)}): tokenize texts and process images first, and name the columns as the model's "
            "forward does."
        ]
    return " ".join(found) or UNKNOWN


def _first_rows(dataset: Any) -> Iterator[Any]:
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return
    for place in range(min(LOOKED_AT, len(dataset))):
        try:
            yield dataset[place]
        except (RMTKDError, *RAW, OSError):  # the very row may be what fails
            return


def _unfit(name: str, values: list[Any], columns: Mapping[str, Any]) -> str | None:
    """A sentence about a column that makes no tensor; None where it does."""
    empty = [row for row, value in enumerate(values) if value is None]
    if empty:
        return f"Column {name!r} is None in row {empty[0]}: fill it, or leave such rows out."
    words = next((value for value in values if _is_text(value)), None)
    if words is not None and name in LABELS or name == "label" and isinstance(words, str):
        return (
            f"Column {name!r} holds words ({shown(words)}): expected class numbers. Map them as the model counts its "
            "classes: model.config.label2id[...]."
        )
    if words is not None and any(column in INPUTS for column in columns):
        return f"Column {name!r} holds text ({shown(words)}): leave it out, dataset.remove_columns([{name!r}])."
    if words is not None:
        return f"Column {name!r} holds text that is not tokenized ({shown(words)}): {TOKENIZE.format(name=name)}."
    sizes = sorted({_size(value) for value in values if _size(value) is not None})
    if len(sizes) > 1:
        return (
            f"Column {name!r} has rows of {sizes[0]} to {sizes[-1]} values: give the loader a collator that pads them "
            "(DataCollatorWithPadding(tokenizer))."
        )
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or isinstance(value, (list, tuple)) and any(isinstance(item, str) for item in value)


def _size(value: Any) -> int | None:
    """Length of a list or array; None of a single value."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return int(shape[0]) if len(shape) else None
    return len(value) if isinstance(value, (list, tuple)) else None
