from __future__ import annotations

import json

import pytest

from optimum_rmtkd.commands.data import DataArguments, find_columns, has_images, load_rows
from optimum_rmtkd.commands.labels import label_values
from optimum_rmtkd.errors import RMTKDError

from .conftest import sentence_rows, write_csv


class Config:
    """The fields of a model config that labels are checked against."""

    def __init__(self, names=("negative", "positive"), problem_type=None):
        self.label2id = {name: i for i, name in enumerate(names)}
        self.num_labels, self.problem_type = len(names), problem_type


def rows_of(columns: dict, **features):
    from datasets import Dataset

    rows = Dataset.from_dict(columns)
    for name, feature in features.items():
        rows = rows.cast_column(name, feature)
    return rows


def class_label(*names):
    from datasets import ClassLabel

    return ClassLabel(names=list(names))


def write_rows(folder, suffix, rows):
    path = folder / f"rows{suffix}"
    if suffix == ".csv":
        return write_csv(path, rows)
    if suffix == ".tsv":
        lines = ["sentence\tlabel"] + [f"{r['sentence']}\t{r['label']}" for r in rows]
        path.write_text("\n".join(lines) + "\n")
    elif suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    rows = sentence_rows(20)
    path = str(write_rows(tmp_path, suffix, rows))
    train, validation = load_rows(DataArguments(train_file=path, validation_file=path))
    assert train.to_list() == rows and validation.to_list() == rows


def test_a_tenth_is_held_out_without_validation_data(table):
    train, validation = load_rows(DataArguments(train_file=str(table)))
    assert (train.num_rows, validation.num_rows) == (86, 10)
    again, _ = load_rows(DataArguments(train_file=str(table)))
    assert again.to_list() == train.to_list()


def test_sample_limits(table, validation_table):
    data = DataArguments(
        train_file=str(table), validation_file=str(validation_table), max_train_samples=10, max_eval_samples=7
    )
    train, validation = load_rows(data)
    assert (train.num_rows, validation.num_rows) == (10, 7)
    assert len(set(train["label"])) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "no such file"),
        ("empty.csv", "", "is empty"),
        ("header.csv", "sentence,label\n", "no row|Cannot read"),
        ("ragged.csv", "sentence,label\na,1\nb,1,2,3,4\n", "Cannot read"),
        ("broken.json", '[{"sentence": "a"', "Cannot read"),
        ("broken.parquet", "not parquet", "Cannot read"),
        ("rows.xlsx", "x", "unknown kind of file '.xlsx'"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(RMTKDError, match=message) as error:
        load_rows(DataArguments(train_file=str(path), validation_file=str(path)))
    assert name in str(error.value) or "no row" in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"dataset": "glue", "train_file": "a.csv"},
        {"train_file": "a.csv", "text_column": ["a", "b", "c"]},
        {"train_file": "a.csv", "max_length": 0},
    ],
)
def test_contradictory_arguments(values):
    with pytest.raises(RMTKDError):
        DataArguments(**values)


def test_columns_are_found():
    single = rows_of({"idx": [1], "sentence": ["a"], "label": [0]})
    assert find_columns(single, DataArguments(train_file="x")) == (["sentence"], "label")
    pair = rows_of({"sentence1": ["a"], "sentence2": ["b"], "score": [0.5]})
    assert find_columns(pair, DataArguments(train_file="x")) == (["sentence1", "sentence2"], "score")
    named = rows_of({"sentence": ["a"], "label": ["positive"]})
    assert find_columns(named, DataArguments(train_file="x")) == (["sentence"], "label")


def test_columns_are_given():
    rows = rows_of({"id": ["1"], "q": ["a"], "s": ["b"], "gold": [0]})
    data = DataArguments(train_file="x", text_column=["q", "s"], label_column="gold")
    assert find_columns(rows, data) == (["q", "s"], "gold")


@pytest.mark.parametrize(
    ("columns", "given", "message"),
    [
        ({"sentence": ["a"]}, {}, "No label column.*sentence"),
        ({"a": ["x"], "b": ["x"], "c": ["x"], "label": [0]}, {}, "3 columns hold strings.*--text-column"),
        ({"a": [1], "label": [0]}, {}, "no column holds strings"),
        ({"a": ["x"], "label": [0]}, {"label_column": "gold"}, "No column 'gold'.*a, label"),
        ({"a": ["x"], "label": [0]}, {"text_column": ["b"]}, "No column 'b'"),
    ],
)
def test_columns_that_cannot_be_told(columns, given, message):
    with pytest.raises(RMTKDError, match=message):
        find_columns(rows_of(columns), DataArguments(train_file="x", **given))


def test_image_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, level in (("cat", 0), ("dog", 200)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            image.new("RGB", (8, 8), (level, i, 0)).save(tmp_path / "pictures" / name / f"{i}.png")
    folder = str(tmp_path / "pictures")
    data = DataArguments(train_file=folder, validation_file=folder)
    train, _ = load_rows(data)
    assert has_images(train) and train.num_rows == 6
    assert find_columns(train, data) == (["image"], "label")
    assert label_values(train, "label", Config(("dog", "cat"))) == [1, 1, 1, 0, 0, 0]


def dataset_folder(tmp_path, **splits):
    for name, rows in splits.items():
        write_csv(tmp_path / f"{name}.csv", rows)
    return DataArguments(dataset=str(tmp_path))


def test_splits_of_a_dataset(tmp_path):
    train, held_out, unlabelled = sentence_rows(12), sentence_rows(4, seed=1), sentence_rows(5, seed=2)
    unlabelled = [row | {"label": -1} for row in unlabelled]
    found = load_rows(dataset_folder(tmp_path, train=train, validation=held_out, test=unlabelled))
    assert [rows.to_list() for rows in found] == [train, held_out]


def test_a_dataset_without_a_validation_split(tmp_path, capsys):
    for name in ("tested", "alone"):
        (tmp_path / name).mkdir()
    train, test = sentence_rows(20), sentence_rows(4, seed=1)
    assert load_rows(dataset_folder(tmp_path / "tested", train=train, test=test))[1].to_list() == test
    kept, held_out = load_rows(dataset_folder(tmp_path / "alone", train=train))
    assert (len(kept), len(held_out)) == (18, 2) and "2 of the training rows are held out" in capsys.readouterr().out


def test_datasets_that_cannot_be_used(tmp_path):
    for name in ("untrained", "unlabelled"):
        (tmp_path / name).mkdir()
    with pytest.raises(RMTKDError, match="no split 'train'; it has test"):
        load_rows(dataset_folder(tmp_path / "untrained", test=sentence_rows(4)))
    hidden = [row | {"label": -1} for row in sentence_rows(4)]
    train, test = load_rows(dataset_folder(tmp_path / "unlabelled", train=sentence_rows(12), test=hidden))
    with pytest.raises(RMTKDError, match="-1 marks rows without a label"):
        label_values(test, "label", Config())
    with pytest.raises(RMTKDError, match="Cannot read dataset nowhere/at-all"):
        load_rows(DataArguments(dataset="nowhere/at-all"))
