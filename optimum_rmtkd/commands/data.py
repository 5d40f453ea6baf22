"""Rows from the Hub or from local files, checked against the model they are for.

Used by the commands and by the examples. Everything that can be wrong with a file is said before a model is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import RMTKDError
from ..validation import Count, Length, check_fields
from ..validation.wording import brief
from .labels import parse_label_map
from .metrics import METRICS
from .options import option
from .streams import suffix_of
from .tables import KINDS, check_contents, read_dataset, read_table


if TYPE_CHECKING:
    from datasets import Dataset


__all__ = ["DataArguments", "check_files", "divide", "find_columns", "has_images", "load_rows", "read_by", "read_rows"]

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # labels of images in a file of their own
VALIDATION_SPLITS = ("validation", "validation_matched", "dev", "test")
LABEL_COLUMNS = ("label", "labels", "score", "target")
HELD_OUT = 0.1
MOST_COLUMNS = 20  # in a message


@dataclass(frozen=True)
class DataArguments:
    """Where the rows come from and which columns count.

    Raises:
        RMTKDError: neither `dataset` nor `train_file` is given, or both are.
    """

    dataset: str | None = option(None, "Name of a dataset on the Hub. Not together with the files below.")
    dataset_config: str | None = option(None, "Its configuration, for example sst2 for glue.")
    train_file: str | None = option(
        None,
        "Local csv, tsv, json, jsonl or parquet file, or a folder of images by class; for language models also txt.",
    )
    validation_file: str | None = option(
        None,
        "The same for validation. None: the dataset's own validation split, or a tenth of the training rows held out.",
    )
    text_column: Annotated[list[str], Length(1, 2)] | None = option(
        None, "One or two text columns. None: the columns that hold strings."
    )
    label_column: str | None = option(None, f"Column of the labels. None: the first of {', '.join(LABEL_COLUMNS)}.")
    label_map: list[str] | None = option(
        None,
        "Which label of the data is which class of the model, where the names differ: NAME=CLASS ..., a JSON object, "
        "or a .json file of one. CLASS is a name or a number.",
    )
    metric: str | None = option(
        None, "What is measured on the validation rows. None: accuracy, or pearson for regression.", tuple(METRICS)
    )
    max_length: Count = option(
        128, "Longer texts are cut to this many tokens; of language models the tokens of a block, and of a window."
    )
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
        parse_label_map(self.label_map)

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
        if suffix_of(Path(path)) == ".txt":  # of language models, which say what else is wrong with a text
            continue
        if Path(path).suffix.lower() not in KINDS:
            raise RMTKDError(
                f"{path}: unknown kind of file '{Path(path).suffix}'; expected one of {', '.join(KINDS)}."
            )
        check_contents(Path(path))


def read_by(args: Any, data: DataArguments, checkpoints: str | None = None) -> list[tuple[str, str | None]]:
    """What a command reads and keeps, which its output must be apart from (`output.check_place`)."""
    return [
        ("the model", getattr(args, "model", None)),
        ("the data", data.dataset),
        ("the data", data.train_file),
        ("the data", data.validation_file),
        ("--checkpoints", checkpoints),
    ]


def load_rows(data: DataArguments, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Training and validation rows, shortened as `data` says.

    Raises:
        RMTKDError: as `read_rows` and `divide`.
    """
    return divide(*read_rows(data), data, seed)


def read_rows(data: DataArguments) -> tuple[Dataset, Dataset | None]:
    """All training rows, and the validation rows where there are any of their own.

    Raises:
        RMTKDError: a file or dataset that is missing, unreadable, or without a training split.
    """
    check_files(data)
    if data.dataset is not None:
        return _from_hub(data.dataset, data.dataset_config)
    validation = _from_path(data.validation_file, data) if data.validation_file else None
    return _from_path(data.train_file, data), validation


def divide(train: Dataset, validation: Dataset | None, data: DataArguments, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Training and validation rows, shortened as `data` says; where there are none for validation, a tenth of the
    training rows is held out.

    Raises:
        RMTKDError: one of them is empty, or one row is to be split.
    """
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


def _from_hub(name: str, config: str | None) -> tuple[Dataset, Dataset | None]:
    splits = read_dataset(f"dataset {name}", name, config)
    if "train" not in splits:
        raise RMTKDError(f"Dataset {name} has no split 'train'; it has {', '.join(splits)}.")
    validation = next((split for split in VALIDATION_SPLITS if split in splits), None)
    return splits["train"], splits[validation] if validation else None


def _from_path(path: str, data: DataArguments) -> Dataset:
    place = Path(path)
    if place.is_dir():
        return _image_folder(place)
    if suffix_of(place) == ".txt":
        raise RMTKDError(f"{path} is plain text, which has no labels; expected a table, or a language model for it.")
    label = (data.label_column,) if data.label_column else LABEL_COLUMNS
    return read_table(place, data.text_column or (), label)


def _image_folder(place: Path) -> Dataset:
    what = f"image folder {place}"
    if any(next(place.rglob(name), None) for name in METADATA):
        return read_dataset(what, "imagefolder", data_dir=str(place), split="train")
    # folders in folders may be splits; else a class called train or test would be taken for one, all others dropped
    nested = any(path.is_dir() for path in place.glob("[!.]*/[!.]*"))
    files = {} if nested else {"data_files": {"train": "**"}}
    # with one class alone the labels would be left out otherwise
    rows = read_dataset(what, "imagefolder", data_dir=str(place), split="train", drop_labels=False, **files)
    if "image" not in rows.column_names:
        raise RMTKDError(f"{place} is a folder without images; expected one sub-folder of images for each class.")
    return rows


def has_images(rows: Dataset) -> bool:
    """Whether a column of `rows` holds images."""
    return any(_is_image(feature) for feature in rows.features.values())


def _is_image(feature: Any) -> bool:
    from datasets import Image

    return isinstance(feature, Image)


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string") and hasattr(feature, "pa_type")


def _listed(columns: list[str]) -> str:
    return ", ".join(map(brief, columns[:MOST_COLUMNS])) + (", ..." if len(columns) > MOST_COLUMNS else "")


def find_columns(rows: Dataset, data: DataArguments) -> tuple[list[str], str]:
    """Names of the input columns (one image column, or one or two text columns) and of the label column.

    Raises:
        RMTKDError: a column named by the user is missing, or the right ones cannot be told; lists the columns there
            are.
    """
    there = _listed(rows.column_names)
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
        found = f"{len(texts)} columns hold strings ({_listed(texts)})" if texts else "no column holds strings"
        raise RMTKDError(f"Cannot tell the text columns: {found}; the columns are {there}. Pass --text-column A [B].")
    return texts, label
