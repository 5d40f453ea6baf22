"""The labels of the data as the model counts them: by name, by number, or as the user says.

A label is first looked up in `--label-map`, then among the names of the model's classes (as they are written, else
without regard to case and surrounding blanks). Whole numbers are class indices where no label is a name of the model.
The classes of a `ClassLabel` are taken by their numbers only where the model has no names of its own (LABEL_0, ...),
and a line says so. Whatever leaves a label without a class, or with two, is refused.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RMTKDError
from ..files import read_text
from ..recipe import parse_json
from ..validation.wording import brief
from ..validation.wording import shown as written
from .tables import check_utf8


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig


__all__ = [
    "check_label_map",
    "class_names",
    "distinct",
    "find",
    "is_regression",
    "label_values",
    "parse_label_map",
    "shortest",
    "shown",
]

GENERIC = re.compile(r"LABEL_\d+")
WHOLE = re.compile(r"-?(0|[1-9]\d{0,17})")  # 007 is a name, and so is what no 64 bits hold
SHOWN = 5  # names in a message


def parse_label_map(words: Sequence[str] | None) -> dict[str, str]:
    """`--label-map` as {label of the data: class of the model}: NAME=CLASS pairs, a JSON object, or a file of one.

    Raises:
        RMTKDError: it is none of them, or says two things about one label.
    """
    if not words:
        return {}
    if len(words) == 1 and words[0].lstrip().startswith("{"):
        return _from_json(words[0], "--label-map")
    if len(words) == 1 and (words[0].lower().endswith(".json") or ("=" not in words[0] and Path(words[0]).is_file())):
        if not Path(words[0]).is_file():
            raise RMTKDError(
                f"--label-map {words[0]}: no such file; expected a JSON object of names, or NAME=CLASS ..."
            )
        return _from_json(read_text(words[0]), f"--label-map {words[0]}")
    pairs = [word.rpartition("=") for word in words]
    wrong = next((word for word, (name, _, target) in zip(words, pairs, strict=True) if not name or not target), None)
    if wrong is not None:
        raise RMTKDError(
            f"--label-map {wrong!r}: expected NAME=CLASS for each label of the data, for example cat=LABEL_0 "
            "dog=LABEL_1, or a JSON object, or a .json file of one."
        )
    return _unique((name, target) for name, _, target in pairs)


def _from_json(text: str, what: str) -> dict[str, str]:
    values = parse_json(text, what, 'expected an object such as {"cat": "LABEL_0"}')
    plain = isinstance(values, dict) and all(
        isinstance(target, (str, int)) and not isinstance(target, bool) for target in values.values()
    )
    if not plain:
        raise RMTKDError(f'{what}: expected an object of names or class indices, such as {{"cat": "LABEL_0"}}.')
    return {name: str(target) for name, target in values.items()}


def _unique(pairs: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, target in pairs:
        if found.setdefault(name, target) != target:
            raise RMTKDError(
                f"--label-map gives {name!r} both to {found[name]!r} and to {target!r}: drop one of them."
            )
    return found


def check_label_map(label_map: dict[str, str], data: Sequence[Dataset], column: str) -> None:
    """Refuse names that are no label of the data: they are misspelt, and something else is left over.

    Raises:
        RMTKDError: names them, and the labels there are.
    """
    labels: dict[str, None] = {}
    for rows in data:
        names = getattr(rows.features[column], "names", None)
        labels |= dict.fromkeys(names or map(shortest, distinct(rows, column)))
    unknown = [name for name in label_map if find(name, list(labels)) is None]
    if unknown:
        raise RMTKDError(
            f"--label-map names {_quoted(unknown)}, which is no label in column '{column}'; it "
            f"holds {shown(sorted(labels))}."
        )


def distinct(rows: Dataset, column: str) -> list[Any]:
    """The different labels of a column, in the order of their first rows; none that is missing.

    Raises:
        RMTKDError: they are lists or objects, or no UTF-8 text; names the first such row.
    """
    check_utf8(rows, column)
    found: dict[Any, None] = {}
    for row, value in enumerate(rows[column][:], 1):
        if isinstance(value, (list, dict)):
            raise RMTKDError(
                f"Column '{column}' holds {written(value)} in row {row}; expected one label a row, a class index or a "
                "name. Name the right column with --label-column."
            )
        if value is not None:
            found[value] = None
    return list(found)


def is_regression(config: PreTrainedConfig) -> bool:
    """Whether the model gives one number."""
    return config.num_labels == 1 or config.problem_type == "regression"


def class_names(config: PreTrainedConfig) -> list[str]:
    """Names of the model's classes, in order.

    Raises:
        RMTKDError: the config's two tables, id2label and label2id, contradict each other.
    """
    size = config.num_labels
    try:
        forwards = {int(i): str(n) for i, n in (getattr(config, "id2label", None) or {}).items()}
        backwards = {int(i): str(n) for n, i in (getattr(config, "label2id", None) or {}).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise RMTKDError(
            f"The model's config has tables of classes that are none ({error}); expected id2label of numbers to names "
            "and label2id of names to numbers. Correct its config.json."
        ) from error
    tables = [[table.get(i, f"LABEL_{i}") for i in range(size)] for table in (forwards, backwards)]
    named = [table for table in tables if not all(map(GENERIC.fullmatch, table))]
    if len(named) == 2 and named[0] != named[1]:
        raise RMTKDError(
            f"The model's config contradicts itself: id2label says {shown(tables[0])}, label2id {shown(tables[1])}. "
            "Correct its config.json."
        )
    return named[0] if named else tables[0]


def label_values(
    rows: Dataset,
    column: str,
    config: PreTrainedConfig,
    label_map: dict[str, str] | None = None,
    like: Dataset | None = None,
) -> list[int] | list[float]:
    """The labels of `rows` as the model with `config` counts them: class indices, or numbers for a regression model.

    Args:
        label_map: what `parse_label_map` returns.
        like: the training rows, where `rows` are those of validation: names are read as they are there.

    Raises:
        RMTKDError: labels are missing, are no numbers, or do not fit the classes of the model; names the row.
    """
    check_utf8(rows, column)
    values, feature = rows[column][:], rows.features[column]
    missing = [number for number, value in enumerate(values, 1) if value is None]
    if missing:
        raise RMTKDError(
            f"Column '{column}': {len(missing)} of {len(values)} rows have no label, the first of them row "
            f"{missing[0]}; expected one in each. Remove or fill them."
        )
    if is_regression(config):
        if label_map:
            raise RMTKDError("--label-map is for classes; the model gives one number (regression).")
        return _numbers(values, feature, column)
    if config.problem_type == "multi_label_classification":
        raise RMTKDError("The model is a multi-label classifier; only one label per row is supported.")
    names = getattr(feature, "names", None)
    keys = _keys(values, names, column, config.num_labels)
    numbered = names if like is None else getattr(like.features[column], "names", None)
    rows_of = {key: row for row, key in reversed([*enumerate(keys, 1)])}
    table = _classes(rows_of, column, config, label_map or {}, numbered)
    return [table[key] for key in keys]


# -- numbers ----------------------------------------------------------------------------------------------------------


def _numbers(values: list, feature: Any, column: str) -> list[float]:
    names = getattr(feature, "names", None)
    if names:
        raise RMTKDError(
            f"Column '{column}' holds {len(names)} classes ({shown(names)}), but the model has one output "
            "(regression): pass a classifier, or scores."
        )
    return [_number(value, row, column) for row, value in enumerate(values, 1)]


def _number(value: Any, row: int, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RMTKDError(
            f"Column '{column}' holds {written(value)} in row {row}; the model has one output (regression): expected "
            "a finite number. Remove or fill such rows."
        )
    return number


# -- classes ----------------------------------------------------------------------------------------------------------


def _keys(values: list, names: list[str] | None, column: str, classes: int) -> list[str]:
    """Each label as a word: its name, or its number."""
    if names is None:
        return [_word(value, row, column, classes) for row, value in enumerate(values, 1)]
    wrong = next(((row, v) for row, v in enumerate(values, 1) if not 0 <= v < len(names)), None)
    if wrong is not None:
        hint = " (-1 marks rows without a label)" if wrong[1] == -1 else ""
        raise RMTKDError(f"Column '{column}' holds {wrong[1]} in row {wrong[0]}{hint}: expected a class in each row.")
    return [names[value] for value in values]


def shortest(value: Any) -> str:
    """A label as a word; whole numbers without a point."""
    whole = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return str(int(value)) if whole and value == int(value) else str(value)


def _word(value: Any, row: int, column: str, classes: int) -> str:
    if isinstance(value, (str, bool)) or (isinstance(value, (int, float)) and WHOLE.fullmatch(shortest(value))):
        return shortest(value)
    raise RMTKDError(
        f"Column '{column}' holds {written(value)} in row {row}; the model has {classes} classes: expected class "
        "indices or names."
    )


def _fold(name: str) -> str:
    return name.strip().casefold()


def find(key: str, names: Sequence[str]) -> int | None:
    """Position of `key` among `names`: as it is written, else as the only one that differs in case or blanks alone."""
    if key in names:
        return list(names).index(key)
    alike = [i for i, name in enumerate(names) if _fold(name) == _fold(key)]
    return alike[0] if len(alike) == 1 else None


def _classes(
    keys: dict[str, int],
    column: str,
    config: PreTrainedConfig,
    label_map: dict[str, str],
    numbered: Sequence[str] | None,
) -> dict[str, int]:
    """{label: class index} of `keys`, {label: first row of it}."""
    names, mapped = class_names(config), list(label_map)
    given = {key: _target(label_map[mapped[i]], names) for key in keys if (i := find(key, mapped)) is not None}
    named = {key: i for key in keys if key not in given and (i := find(key, names)) is not None}
    known = named | given
    if given and not named:
        known |= _left_by_number([key for key in keys if key not in given], given, column, names, numbered)
    if not known:
        by_number = _by_number(keys, column, names, numbered)
        if by_number is not None:
            return by_number
    if len(known) < len(keys):
        raise RMTKDError(_unknown(keys, known, column, names, numbered))
    double = [key for key in named if WHOLE.fullmatch(key) and int(key) != named[key]]
    if double and all(WHOLE.fullmatch(key) and 0 <= int(key) < len(names) for key in keys):
        raise RMTKDError(
            f"Column '{column}' holds numbers, and the model's classes are called {shown(names)}: {double[0]} is "
            f"class {named[double[0]]} by name and class {double[0]} by number. Say which: {_hint(keys, names)}"
        )
    return known


def _left_by_number(
    left: Sequence[str],
    given: dict[str, int],
    column: str,
    names: Sequence[str],
    numbered: Sequence[str] | None,
) -> dict[str, int]:
    """The labels that `--label-map` says nothing of, as class indices, as they would be without it; none of them where
    one is no class index.

    Raises:
        RMTKDError: one falls on a class that the map gives to another label: are they to be joined, or was its
            counterpart forgotten?
    """
    if numbered is not None or not all(WHOLE.fullmatch(key) and 0 <= int(key) < len(names) for key in left):
        return {}
    for key in left:
        if mapped := [other for other, target in given.items() if target == int(key)]:
            both = {**{brief(other): names[given[other]] for other in mapped}, key: "CLASS"}
            raise RMTKDError(
                f"--label-map gives {_quoted(mapped)} of column '{column}' to class {key} ({brief(names[int(key)])}), "
                f"and says nothing of the label {key}, which would be that class by its number: say which class it "
                f"is, that one to join them: --label-map {' '.join(shlex.quote(f'{k}={v}') for k, v in both.items())}"
            )
    if left:
        print(f"labels that --label-map does not name are class indices: {shown(sorted(left))}")
    return {key: int(key) for key in left}


def _target(wanted: str, names: Sequence[str]) -> int:
    found = find(wanted, names)
    if found is None and WHOLE.fullmatch(wanted) and 0 <= int(wanted) < len(names):
        found = int(wanted)
    if found is None:
        raise RMTKDError(
            f"--label-map names the class {wanted!r}, which the model does not have; it has {shown(names)}, or 0 to "
            f"{len(names) - 1}."
        )
    return found


def _by_number(
    keys: Collection[str], column: str, names: Sequence[str], numbered: Sequence[str] | None
) -> dict[str, int] | None:
    """The table of labels that are numbers, or whose order is one; None where they are names."""
    if numbered is not None:
        if not all(map(GENERIC.fullmatch, names)) or not set(keys) <= set(numbered):
            return None
        if len(numbered) != len(names):
            raise RMTKDError(
                f"Column '{column}' has {len(numbered)} classes ({shown(numbered)}), the model has "
                f"{len(names)} without names ({shown(names)}): pass the data the model was fine-tuned on."
            )
        print(
            f"the model's classes have no names: {shown(numbered)} are taken as 0 to {len(names) - 1}, in this order"
        )
        return {name: i for i, name in enumerate(numbered)}
    if {_fold(key) for key in keys} <= {"true", "false"} and len(names) == 2:  # spreadsheets write TRUE
        return {key: int(_fold(key) == "true") for key in keys}
    if not all(map(WHOLE.fullmatch, keys)):
        return None
    numbers = [int(key) for key in keys]
    low, high = min(numbers), max(numbers)
    if low < 0 or high >= len(names):
        hint = " (-1 marks rows without a label)" if low == -1 else ""
        raise RMTKDError(
            f"Column '{column}' holds labels from {low} to {high}{hint}; the model has {len(names)} classes: expected "
            f"0 to {len(names) - 1}, or say which number is which class: {_hint(keys, names)}"
        )
    return {key: int(key) for key in keys}


def _unknown(
    keys: dict[str, int],
    known: dict[str, int],
    column: str,
    names: Sequence[str],
    numbered: Sequence[str] | None,
) -> str:
    """What is said of labels that the model does not know."""
    unknown = sorted(key for key in keys if key not in known)
    words = [key for key in unknown if not WHOLE.fullmatch(key)]
    if not known and 0 < len(words) < len(unknown):
        row = min(keys[key] for key in words)
        return (
            f"Column '{column}' holds {_quoted(words)} (first in row {row}) among class indices: "
            "remove or correct such rows, or say of every label which class it is (--label-map LABEL=CLASS ...)."
        )
    has = shown(numbered if numbered is not None else sorted(keys))
    row = min(keys[key] for key in unknown)
    text = (
        f"Column '{column}' holds label(s) {_quoted(unknown)} (first in row {row}) that the "
        f"model does not know; it knows {shown(names)}, the data has {has}."
    )
    moved = [
        key for key in known if numbered is not None and key in numbered and list(numbered).index(key) != known[key]
    ]
    if moved:
        text += (
            f" {moved[0]!r} is class {list(numbered).index(moved[0])} of the data and class {known[moved[0]]} of the"
        )
        text += " model, so their numbers do not go together either."
    if known:
        text += " Some names match and some do not: is it the data the model was fine-tuned on?"
    free = [name for i, name in enumerate(names) if i not in known.values()]
    return f"{text} Say which is which: {_hint(unknown, free or names)}"


def _hint(keys: Collection[str], names: Sequence[str]) -> str:
    """An example of `--label-map` for these labels."""
    pairs = {brief(key): brief(name) for key, name in zip(sorted(keys)[:3], names)}
    if any(key.startswith("-") or "=" in name for key, name in pairs.items()):  # which would be read as an option
        words = shlex.quote(json.dumps(pairs, ensure_ascii=False))
    else:
        words = " ".join(shlex.quote(f"{key}={name}") for key, name in pairs.items())
    return f"--label-map {words}{' ...' if len(keys) > 3 else ''} (or the way round that is right)."


def shown(names: Sequence[str]) -> str:
    return ", ".join(map(brief, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(brief(name)) for name in names[:SHOWN])
