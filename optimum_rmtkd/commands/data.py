"""Rows from the Hub or from local files, checked against the model they are for.

Used by the commands and by the examples. Everything that can be wrong with a file is said before a model is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import RMTKDError
from ..validation import Count, Length, check_fields
from .metrics import METRICS
from .options import option


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig


__all__ = ["DataArguments", "check_files", "find_columns", "has_images", "label_values", "load_rows"]

BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
VALIDATION_SPLITS = ("validation", "validation_matched", "dev", "test")
LABEL_COLUMNS = ("label", "labels", "score", "target")
HELD_OUT = 0.1


@dataclass(frozen=True)
class DataArguments:
    """Where the rows come from and which columns count.

    Raises:
        RMTKDError: neither `dataset` nor `train_file` is given, or both are.
    """

    dataset: str | None = option(None, "Name of a dataset on the Hub. Not together with the files below.")
    dataset_config: str | None = option(None, "Its configuration, for example sst2 for glue.")
    train_file: str | None = option(
        None, "Local csv, tsv, json, jsonl or parquet file, or a folder of images by class."
    )
    validation_file: str | None = option(
        None,
        "The same for validation. None: the dataset's own validation split, or a tenth of the training rows held out.",
    )
    text_column: Annotated[list[str], Length(1, 2)] | None = option(
        None, "One or two text columns. None: the columns that hold strings."
    )
    label_column: str | None = option(None, f"Column of the labels. None: the first of {', '.join(LABEL_COLUMNS)}.")
    metric: str | None = option(
        None, "What is measured on the validation rows. None: accuracy, or pearson for regression.", tuple(METRICS)
    )
    max_length: Count = option(128, "Longer texts are cut to this many tokens.")
    max_train_samples: Count | None = option(
        None, "Use only so many training rows, drawn at random with a fixed seed."
    )
    max_eval_samples: Count | None = option(None, "Use only so many validation rows, the first ones.")

    def __post_init__(self):
        check_fields(self, as_options=True)
        if self.dataset is None and self.train_file is None:
            raise RMTKDError("No data: pass --train-file FILE (csv, json, parquet, image folder) or --dataset NAME.")
        if self.dataset is not None and (self.train_file or self.validation_file):
            raise RMTKDError(f"Both --dataset {self.dataset} and a local file were given: drop one of them.")

    def described(self) -> dict[str, Any]:
        """What a model card says about the data; names of files without their paths."""
        if self.dataset is not None:
            return {"id": self.dataset, "name": self.dataset, "config": self.dataset_config, "on_hub": True}
        name = Path(self.validation_file or self.train_file).stem
        return {"id": name, "name": name, "split": "validation" if self.validation_file else "held out"}


def check_files(data: DataArguments) -> None:
    """Tell a missing or unreadable path in the first moment, before anything slow is imported.

    Raises:
        RMTKDError: a path that does not exist, is empty, or is of a kind that cannot be read.
    """
    for path in filter(None, (data.train_file, data.validation_file)):
        if Path(path).is_dir():
            continue
        if not Path(path).is_file():
            raise RMTKDError(f"{path}: no such file or folder.")
        if Path(path).suffix.lower() not in BUILDERS:
            raise RMTKDError(
                f"{path}: unknown kind of file '{Path(path).suffix}'; expected one of {', '.join(BUILDERS)}."
            )
        if Path(path).stat().st_size == 0:
            raise RMTKDError(f"{path} is empty.")


def load_rows(data: DataArguments, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Training and validation rows, shortened as `data` says.

    Raises:
        RMTKDError: a file or dataset that is missing, unreadable, empty, or without a training split.
    """
    check_files(data)
    if data.dataset is not None:
        train, validation = _from_hub(data.dataset, data.dataset_config)
    else:
        train = _from_path(data.train_file)
        validation = _from_path(data.validation_file) if data.validation_file else None
    if validation is None:
        if train.num_rows < 2:
            raise RMTKDError("One training row cannot be split: pass --validation-file.")
        parts = train.train_test_split(test_size=max(1, round(HELD_OUT * train.num_rows)), seed=seed)
        train, validation = parts["train"], parts["test"]
        print(f"no validation data given: {validation.num_rows} of the training rows are held out")
    for name, rows in (("training", train), ("validation", validation)):
        if rows.num_rows == 0:
            raise RMTKDError(f"The {name} data holds no row.")
    if data.max_train_samples is not None and data.max_train_samples < train.num_rows:
        train = train.shuffle(seed=seed).select(range(data.max_train_samples))
    if data.max_eval_samples is not None:
        validation = validation.select(range(min(data.max_eval_samples, validation.num_rows)))
    return train, validation


def _load(what: str, *args: Any, **kwargs: Any):
    """`datasets.load_dataset` with its many ways to fail turned into one."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(*args, **kwargs)
    except (OSError, ValueError, TypeError, DatasetsError) as error:
        # The useful sentence is the innermost one: datasets wraps the parser's error twice.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        told = "it holds no rows" if "corresponds to no data" in str(cause) else f"{type(cause).__name__}: {cause}"
        raise RMTKDError(f"Cannot read {what}: {told}") from error


def _from_hub(name: str, config: str | None) -> tuple[Dataset, Dataset | None]:
    splits = _load(f"dataset {name}", name, config)
    if "train" not in splits:
        raise RMTKDError(f"Dataset {name} has no split 'train'; it has {', '.join(splits)}.")
    validation = next((split for split in VALIDATION_SPLITS if split in splits), None)
    return splits["train"], splits[validation] if validation else None


def _from_path(path: str) -> Dataset:
    place = Path(path)
    if place.is_dir():
        return _load(f"image folder {path}", "imagefolder", data_dir=str(place), split="train")
    extra = {"sep": "\t"} if place.suffix.lower() == ".tsv" else {}
    return _load(path, BUILDERS[place.suffix.lower()], data_files=str(place), split="train", **extra)


def has_images(rows: Dataset) -> bool:
    """Whether a column of `rows` holds images."""
    return any(_is_image(feature) for feature in rows.features.values())


def _is_image(feature: Any) -> bool:
    from datasets import Image

    return isinstance(feature, Image)


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string") and hasattr(feature, "pa_type")


def find_columns(rows: Dataset, data: DataArguments) -> tuple[list[str], str]:
    """Names of the input columns (one image column, or one or two text columns) and of the label column.

    Raises:
        RMTKDError: a column named by the user is missing, or the right ones cannot be told; lists the columns there
            are.
    """
    there = ", ".join(rows.column_names)
    for name in (*(data.text_column or ()), *([data.label_column] if data.label_column else ())):
        if name not in rows.column_names:
            raise RMTKDError(f"No column '{name}' in the data; its columns are {there}.")
    label = data.label_column or next((name for name in LABEL_COLUMNS if name in rows.column_names), None)
    if label is None:
        raise RMTKDError(f"No label column: none of {', '.join(LABEL_COLUMNS)} is among {there}. Pass --label-column.")
    images = [name for name, feature in rows.features.items() if _is_image(feature)]
    if images:
        return images[:1], label
    texts = data.text_column or [name for name, f in rows.features.items() if _is_text(f) and name != label]
    if len(texts) not in (1, 2):
        found = f"{len(texts)} columns hold strings ({', '.join(texts)})" if texts else "no column holds strings"
        raise RMTKDError(f"Cannot tell the text columns: {found}; the columns are {there}. Pass --text-column A [B].")
    return texts, label


def label_values(rows: Dataset, column: str, config: PreTrainedConfig) -> list[int] | list[float]:
    """The labels of `rows` as the model with `config` counts them: class indices, or numbers for a regression model.

    Names (strings, or the names of a `ClassLabel`) are matched with `config.label2id`, letter case ignored.

    Raises:
        RMTKDError: labels are missing, are no numbers, or do not fit the classes of the model.
    """
    from datasets import ClassLabel

    values, feature = rows[column][:], rows.features[column]
    if any(value is None for value in values):
        raise RMTKDError(
            f"Column '{column}': {values.count(None)} of {len(values)} rows have no label; expected one in each. "
            "Remove them."
        )
    if config.num_labels == 1 or config.problem_type == "regression":
        return _numbers(values, feature, column)
    if config.problem_type == "multi_label_classification":
        raise RMTKDError("The model is a multi-label classifier; only one label per row is supported.")
    if isinstance(feature, ClassLabel):
        return _by_class_label(values, feature, column, config)
    if isinstance(values[0], str):
        return _by_name(values, column, config)
    return _by_index(values, column, config)


def _numbers(values: list, feature: Any, column: str) -> list[float]:
    names = getattr(feature, "names", None)
    if names:
        raise RMTKDError(
            f"Column '{column}' holds {len(names)} classes ({', '.join(names[:5])}), but the model has one output "
            "(regression): pass a classifier, or scores."
        )
    if isinstance(values[0], (str, list)):
        raise RMTKDError(
            f"Column '{column}' holds {values[0]!r}; the model has one output (regression): expected numbers."
        )
    return [float(value) for value in values]


def _index_of(config: PreTrainedConfig) -> dict[str, int]:
    return {str(name).casefold(): int(index) for name, index in config.label2id.items()}


def _by_class_label(values: list[int], feature: Any, column: str, config: PreTrainedConfig) -> list[int]:
    index_of = _index_of(config)
    if all(name.casefold() in index_of for name in feature.names):
        order = [index_of[name.casefold()] for name in feature.names]
        return _by_index([order[value] if value >= 0 else value for value in values], column, config)
    if len(feature.names) != config.num_labels:
        raise RMTKDError(
            f"Column '{column}' has {len(feature.names)} classes ({', '.join(feature.names[:5])}), the model has "
            f"{config.num_labels} ({', '.join(list(config.label2id)[:5])}): pass the data the model was fine-tuned on."
        )
    return _by_index(values, column, config)


def _by_name(values: list[str], column: str, config: PreTrainedConfig) -> list[int]:
    index_of = _index_of(config)
    unknown = sorted({value for value in values if value.casefold() not in index_of})
    if unknown:
        raise RMTKDError(
            f"Column '{column}' holds label(s) {', '.join(map(repr, unknown[:5]))} that the model does not know; it "
            f"knows {', '.join(list(config.label2id)[:5])}. Write its names, or the class indices 0 to "
            f"{config.num_labels - 1}."
        )
    return [index_of[value.casefold()] for value in values]


def _by_index(values: list, column: str, config: PreTrainedConfig) -> list[int]:
    wrong = next((v for v in values if not isinstance(v, (int, float)) or v != int(v)), None)
    if wrong is not None:
        raise RMTKDError(
            f"Column '{column}' holds {wrong!r}; the model has {config.num_labels} classes: expected class indices or "
            "names."
        )
    low, high = int(min(values)), int(max(values))
    if low < 0 or high >= config.num_labels:
        hint = " (-1 marks rows without a label)" if low == -1 else ""
        raise RMTKDError(
            f"Column '{column}' holds labels from {low} to {high}{hint}; the model has {config.num_labels} classes: "
            f"expected 0 to {config.num_labels - 1}."
        )
    return [int(value) for value in values]
