"""A new head for a model that has none for the data: its classes are those of the training rows, in a fixed order.

A model straight from pretraining says nothing of the task, so the labels do. Whole numbers and words are classes
(those of a `ClassLabel` in its own order, numbers by size, words by alphabet); numbers with a fraction, or a
`--metric` for numbers, make a regressor. `--label-map NAME=CLASS` renames or joins labels.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

from ..errors import RMTKDError
from .labels import SHOWN, WHOLE, distinct, find, shortest
from .metrics import REGRESSION


if TYPE_CHECKING:
    from collections.abc import Collection

    from datasets import Dataset
    from transformers import PreTrainedConfig


__all__ = ["with_new_head"]


def with_new_head(
    config: PreTrainedConfig, rows: Dataset, column: str, metric: str | None, label_map: dict[str, str]
) -> PreTrainedConfig:
    """A copy of `config` whose head has the classes of the training rows, or one output.

    Args:
        metric: what `--metric` says; None: nothing.
        label_map: what `parse_label_map` returns.

    Raises:
        RMTKDError: fewer than two classes, or so many that the column can hold none.
    """
    classes = _classes(rows, column, metric, label_map)
    config = copy.deepcopy(config)
    names = ["LABEL_0"] if classes is None else classes
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = "regression" if classes is None else None
    return config


def _classes(rows: Dataset, column: str, metric: str | None, label_map: dict[str, str]) -> list[str] | None:
    """Names of the classes; None where the labels are numbers."""
    names = getattr(rows.features[column], "names", None)
    values = distinct(rows, column)
    if metric in REGRESSION or not (names or label_map or metric) and any(map(_has_a_fraction, values)):
        return None
    keys = list(names) if names else _in_order({shortest(value) for value in values})
    mapped = list(label_map)
    targets = [label_map[mapped[i]] if (i := find(key, mapped)) is not None else key for key in keys]
    classes = list(dict.fromkeys(targets))
    if len(classes) < 2:
        raise RMTKDError(
            f"Column '{column}' holds {', '.join(map(repr, classes)) or 'no label'} alone; expected two classes or "
            "more to fine-tune on. Name the right column with --label-column, or take more rows."
        )
    if names is None and len(classes) > max(len(rows) // 2, 2):
        raise RMTKDError(
            f"Column '{column}' holds {len(classes)} different labels in {len(rows)} rows "
            f"({', '.join(classes[:SHOWN])}, ...): expected classes. Name the right column with --label-column; for "
            "numbers, ask for a regressor with --metric pearson."
        )
    if classes == [str(i) for i in range(len(classes))]:
        return [f"LABEL_{i}" for i in range(len(classes))]  # numbers are no names
    return classes


def _has_a_fraction(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value != int(value)


def _in_order(keys: Collection[str]) -> list[str]:
    return sorted(keys, key=int if all(map(WHOLE.fullmatch, keys)) else None)
