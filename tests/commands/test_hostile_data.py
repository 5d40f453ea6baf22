"""Data as users have it by accident: one line and exit code 2, before anything is trained; or it works."""

from __future__ import annotations

import json

import pytest

from optimum_rmtkd.commands.data import DataArguments
from optimum_rmtkd.commands.task import load_task
from optimum_rmtkd.errors import RMTKDError

from .conftest import save_bert, save_vit
from .hostile import HOSTILE, HOSTILE_IMAGES, folder_of_images, table


@pytest.mark.parametrize("name", [*HOSTILE, *HOSTILE_IMAGES])
def test_hostile_files_end_in_one_line(cli, bert, vit, tmp_path, monkeypatch, name):
    from optimum_rmtkd.commands import task

    monkeypatch.setattr(task, "_load_model", lambda *_: pytest.fail("the model was loaded first"))
    if name in HOSTILE:
        (content, told), model, file = HOSTILE[name], bert, tmp_path / name
        content(file) if callable(content) else file.write_bytes(content)
    else:
        (make, told), model, file = HOSTILE_IMAGES[name], vit, tmp_path / "pictures"
        folder_of_images(file)
        make(file / "dog" / name)
        told = f"pictures/dog/{name} cannot be read ({told}"
    code, _, err = cli("compress", "--model", model, "--train-file", file, "-o", tmp_path / "out")
    line = err.strip().splitlines()[-1]
    assert code == 2 and line.startswith("optimum-cli rmtkd compress: error: ") and told in line
    assert "Traceback" not in err and len(line) < 1000
    assert not (tmp_path / "out").exists()


def test_there_are_sixty_of_them():
    assert len(HOSTILE) + len(HOSTILE_IMAGES) >= 60


def labels_of(model, path, **more) -> list:
    task = load_task(str(model), DataArguments(train_file=str(path), validation_file=str(path), **more))
    assert next(iter(task.calibration_loader(4, 0)))["labels"].shape == (4,)
    return task.train["labels"][:]


@pytest.mark.parametrize(
    ("name", "content", "labels"),
    [
        ("bom.csv", b"\xef\xbb\xbf" + table("the film,1", "the cast,0"), [1, 0]),
        ("crlf.csv", table("the film,1", "the cast,0").replace(b"\n", b"\r\n"), [1, 0]),
        ("lines.csv", table('"the\nfilm, ""great""",1', "the cast,0"), [1, 0]),
        ("index.csv", b",sentence,label\n" + 5 * b"0,the film,1\n1,the cast,0\n", [1, 0]),
        ("gaps.csv", b"id,sentence,label\n" + 5 * b"7,the film,1\nNA,the cast,0\n", [1, 0]),
        ("words.csv", table("NA,1", "null,0"), [1, 0]),
        ("bools.csv", table("the film,True", "the cast,False"), [1, 0]),
        ("spreadsheet.csv", table("the film,TRUE", "the cast,FALSE"), [1, 0]),
        ("words.tsv", table("the film\ttrue", "the cast\tfalse").replace(b",", b"\t"), [1, 0]),
        ("returns.csv", table("the film,1", "the cast,0").replace(b"\n", b"\r"), [1, 0]),
        ("power.csv", table("the film,1e0", "the cast,0"), [1, 0]),
        ("floats.csv", table("the film,1.0", "the cast,0.0"), [1, 0]),
        ("names.csv", table("the film, POSITIVE", "the cast,Negative "), [1, 0]),
        ("blank_lines.csv", table("the film,1", "", "the cast,0"), [1, 0]),
        ("strings.jsonl", b'{"sentence": "the film", "label": "1"}\n{"sentence": "a", "label": "0"}\n' * 5, [1, 0]),
        ("columns.json", json.dumps({"sentence": ["a", "b"] * 5, "label": [1, 0] * 5}).encode(), [1, 0]),
        ("one_line.jsonl", b'{"sentence": "", "label": 1}\n\n' + 9 * b'{"label": 0, "sentence": "b"}\n', [1, 0]),
    ],
)
def test_unusual_files_that_say_what_they_mean(bert, tmp_path, name, content, labels):
    (tmp_path / name).write_bytes(content)
    assert labels_of(bert, tmp_path / name)[:2] == labels


@pytest.mark.parametrize(
    ("lines", "texts"),
    [
        (['"the film\t1', "said\t0", "a\t1"], ['"the film', "said", "a"]),  # as in GLUE: quotes are text
        (['"the ""best"" film"\t1', "a\t0"], ['the "best" film', "a"]),  # as pandas and Excel write
        (['"the\tbest\nfilm\nis"\t1', "a\t0"], ["the\tbest\nfilm\nis", "a"]),
        (['"the" film\t1', '"a"\t0'], ['"the" film', '"a"']),
    ],
)
def test_quotes_of_a_tsv_never_swallow_a_row(tmp_path, lines, texts):
    from optimum_rmtkd.commands.tables import read_table

    (tmp_path / "rows.tsv").write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    assert read_table(tmp_path / "rows.tsv")["sentence"][:] == texts


@pytest.mark.parametrize("lines", [['"the film\t1', 'said "\t0', "a\t1"], ['"the\tfilm\nis"\t1', "a\t0"]])
def test_a_tsv_that_can_be_read_in_two_ways_is_refused(tmp_path, lines):
    from optimum_rmtkd.commands.tables import read_table

    (tmp_path / "rows.tsv").write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    with pytest.raises(RMTKDError, match="both readings fit"):
        read_table(tmp_path / "rows.tsv")


def test_texts_that_look_like_numbers(bert, tmp_path):
    (tmp_path / "a.csv").write_bytes(table("007,1", "12,0"))
    task = load_task(str(bert), DataArguments(train_file=str(tmp_path / "a.csv"), text_column=["sentence"]))
    assert len(task.train) == 9


@pytest.mark.parametrize("name", ["NA", "None", "null", "nan", "n/a", "NaN", "N/A", "#N/A", "<NA>"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "folder"])
def test_a_class_may_be_called_like_nothing(tmp_path, name, suffix):
    model = save_bert(tmp_path / "bert", label2id={name: 0, "spam": 1}, id2label={0: name, 1: "spam"})
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text(
            "".join(json.dumps({"sentence": s, "label": x}) + "\n" for s, x in (("a", name), ("b", "spam")) * 4)
        )
    elif suffix == "folder":  # a dataset of the Hub is read by datasets
        path.mkdir()
        (path / "train.csv").write_bytes(table(f"{name},{name}", "the film,spam"))
        task = load_task(str(model), DataArguments(dataset=str(path)))
        assert sorted(task.train["labels"][:] + task.validation["labels"][:]) == [0] * 5 + [1] * 5
        return
    else:
        separator = "," if suffix == "csv" else "\t"
        path.write_bytes(table(f"{name},{name}", "the film,spam").replace(b",", separator.encode()))
    assert labels_of(model, path)[:2] == [0, 1]


@pytest.mark.parametrize(("cell", "row"), [("NA", 2), ("null", 2), ("inf", 2), ("", 2), ("1e999", 2), ("two", 2)])
def test_a_number_that_is_missing_is_named(tmp_path, cell, row):
    model = save_bert(tmp_path / "bert", label2id={"LABEL_0": 0}, id2label={0: "LABEL_0"})
    (tmp_path / "rows.csv").write_bytes(table("the film,1.5", f"the cast,{cell}"))
    with pytest.raises(RMTKDError, match=f"row {row}"):
        labels_of(model, tmp_path / "rows.csv")


def test_rows_are_those_of_the_file_though_some_are_held_out(bert, tmp_path):
    lines = ["the film,1", "the cast,0"] * 50
    lines[70] = "the film,maybe"
    (tmp_path / "rows.csv").write_text("sentence,label\n" + "\n".join(lines))
    with pytest.raises(RMTKDError, match="'maybe' .first in row 71"):
        load_task(str(bert), DataArguments(train_file=str(tmp_path / "rows.csv"), max_train_samples=4))


def test_folders_in_the_place_of_tables(cli, bert, tmp_path):
    (tmp_path / "empty.csv").mkdir()
    (tmp_path / "texts.csv").mkdir()
    (tmp_path / "texts.csv" / "a.txt").write_text("x")
    for name in ("empty.csv", "texts.csv"):
        code, _, err = cli("compress", "--model", bert, "--train-file", tmp_path / name, "-o", tmp_path / "out")
        assert code == 2 and name in err and "Traceback" not in err


def test_unknown_classes_of_the_validation_are_refused_and_missing_ones_are_fine(bert, tmp_path):
    files = {"train": ("positive", "negative"), "same": ("positive", "positive"), "other": ("positive", "neutral")}
    for name, labels in files.items():
        (tmp_path / f"{name}.csv").write_bytes(table(*(f"the film,{label}" for label in labels)))
    task = load_task(
        str(bert), DataArguments(train_file=f"{tmp_path}/train.csv", validation_file=f"{tmp_path}/same.csv")
    )
    assert set(task.validation["labels"][:]) == {1}
    with pytest.raises(RMTKDError, match="'neutral'"):
        load_task(
            str(bert), DataArguments(train_file=f"{tmp_path}/train.csv", validation_file=f"{tmp_path}/other.csv")
        )


# -- lengths ----------------------------------------------------------------------------------------------------------


def unlimited(folder):
    """The same model with a tokenizer that knows no limit."""
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values.pop("model_max_length")
    path.write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("max_length", [128, 100_000, 7])
def test_a_tokenizer_without_limit_takes_the_models_positions(tmp_path, capsys, max_length):
    from transformers import AutoTokenizer

    model = unlimited(save_bert(tmp_path / "bert"))
    assert AutoTokenizer.from_pretrained(model).model_max_length > 1e20
    (tmp_path / "rows.csv").write_bytes(table(f"{'the film ' * 40},1", "the cast,0"))
    task = load_task(
        str(model),
        DataArguments(
            train_file=f"{tmp_path}/rows.csv", validation_file=f"{tmp_path}/rows.csv", max_length=max_length
        ),
    )
    length = min(32, max_length)
    assert max(map(len, task.train["input_ids"])) == length == max(map(len, task.train["attention_mask"]))
    assert f"5 of 10 training texts are longer than {length} tokens" in capsys.readouterr().out
    assert task.model(**next(iter(task.calibration_loader(10, 0)))).logits.shape == (10, 2)


def test_position_limits():
    from transformers import (
        BartConfig,
        BartForSequenceClassification,
        RobertaConfig,
        RobertaForSequenceClassification,
        T5Config,
        T5ForSequenceClassification,
    )

    from optimum_rmtkd.batches import position_limit

    small = {
        "vocab_size": 40,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    }
    roberta = RobertaForSequenceClassification(RobertaConfig(max_position_embeddings=34, pad_token_id=1, **small))
    assert position_limit(roberta) == 32  # positions count from padding_idx + 1
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    bart = BartConfig(vocab_size=40, max_position_embeddings=32, pad_token_id=1, eos_token_id=2, **sizes, **heads)
    assert position_limit(BartForSequenceClassification(bart)) == 32
    t5 = T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1, pad_token_id=0, eos_token_id=1)
    assert position_limit(T5ForSequenceClassification(t5)) is None


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """(model of cat, dog and fish; train folder; validation folder without fish)"""
    image = pytest.importorskip("PIL.Image")
    for part, names in (("train", ("cat", "dog", "fish")), ("validation", ("dog",)), ("strange", ("cat", "horse"))):
        for level, name in enumerate(names):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                suffix = ("png", "jpg", "bmp")[i]
                image.new("RGB", (12, 12), (80 * level, 0, 0)).save(tmp_path / part / name / f"{i}.{suffix}")
    save_vit(tmp_path / "vit")
    return tmp_path


def image_task(room, validation="validation"):
    data = DataArguments(train_file=str(room / "train"), validation_file=str(room / validation))
    return load_task(str(room / "vit"), data)


def test_a_validation_folder_without_a_class_is_fine(pictures):
    task = image_task(pictures)
    assert task.train["labels"] == [2] * 3 + [1] * 3 + [0] * 3 and task.validation["labels"] == [1] * 3


def test_a_validation_folder_with_another_class_is_refused(pictures):
    with pytest.raises(RMTKDError, match="'horse'"):
        image_task(pictures, "strange")


@pytest.mark.parametrize("part", ["train", "validation"])
@pytest.mark.parametrize("name", ["1.jpg", "0.png"])
@pytest.mark.parametrize("fault", ["cut", "text", "empty"])
def test_one_unreadable_image_is_named(pictures, part, name, fault):
    path = pictures / part / "dog" / name
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "text": b"no image", "empty": b""}[fault])
    with pytest.raises(RMTKDError, match=f"image .*{part}/dog/{name} cannot be read") as caught:
        image_task(pictures)
    assert "replace or remove it" in str(caught.value)


def test_an_image_of_a_table_is_named_by_its_row(pictures):
    from datasets import ClassLabel, Dataset, Features, Image

    good = (pictures / "train" / "dog" / "0.png").read_bytes()
    cells = [{"bytes": good, "path": None}, {"bytes": good[:30], "path": None}]
    features = Features({"image": Image(), "label": ClassLabel(names=["dog", "cat"])})
    Dataset.from_dict({"image": cells, "label": [0, 1]}, features=features).to_parquet(pictures / "rows.parquet")
    path = str(pictures / "rows.parquet")
    with pytest.raises(RMTKDError, match="image in row 2 cannot be read"):
        load_task(str(pictures / "vit"), DataArguments(train_file=path, validation_file=path))


def test_images_that_are_too_large_to_be_one(pictures, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    with pytest.raises(RMTKDError, match="DecompressionBomb"):
        image_task(pictures)


def test_a_strip_that_would_be_made_huge_is_refused(pictures):
    """Processors that keep proportions enlarge the shorter side."""
    from PIL import Image

    Image.new("RGB", (1, 20_000)).save(pictures / "train" / "dog" / "strip.png")
    assert len(image_task(pictures).train) == 10  # resized to 8 x 8
    path = pictures / "vit" / "preprocessor_config.json"
    values = json.loads(path.read_text())
    path.write_text(
        json.dumps(values | {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}})
    )
    with pytest.raises(
        RMTKDError, match="strip.png cannot be read .its 1 x 20000 pixels would be resized to 224 x 448"
    ):
        image_task(pictures)


@pytest.mark.parametrize("content", [table("the film,1", "the film,0"), table('" ",1', '"  ",0')])
def test_rows_that_are_all_alike_are_refused_before_anything_is_measured(cli, bert, tmp_path, monkeypatch, content):
    from optimum_rmtkd.commands import task

    monkeypatch.setattr(task, "measure", lambda *_: pytest.fail("the model was evaluated first"))
    (tmp_path / "rows.csv").write_bytes(content)
    data = ("--train-file", tmp_path / "rows.csv", "--target-reduction", 0.4, "--round-to", 4, "--min-width", 4)
    code, _, err = cli("compress", "--model", bert, *data, "-o", tmp_path / "out")
    assert code == 2 and "are one sample, alone or again and again" in err and not (tmp_path / "out").exists()


def test_images_of_other_kinds_and_files_that_are_none(pictures):
    from PIL import Image

    dog = pictures / "train" / "dog"
    Image.new("CMYK", (12, 12)).save(dog / "a.jpg")
    Image.new("LA", (12, 12)).save(dog / "b.png")
    Image.new("P", (12, 12)).save(dog / "c.gif", save_all=True, append_images=[Image.new("P", (12, 12), 3)])
    for name in (".DS_Store", "Thumbs.db", "._0.png", "desktop.ini", "x.svg"):
        (dog / name).write_text("no image")
    task = image_task(pictures)
    assert len(task.train) == 12 and task.train[5]["pixel_values"].shape == (3, 8, 8)


def test_a_class_called_like_a_split(pictures):
    """datasets takes folders called train, test or dev for splits, and drops all others."""
    config = json.loads((pictures / "vit" / "config.json").read_text())
    config |= {"id2label": {"0": "train", "1": "dog", "2": "test"}, "label2id": {"train": 0, "dog": 1, "test": 2}}
    (pictures / "vit" / "config.json").write_text(json.dumps(config))
    (pictures / "train" / "fish").rename(pictures / "train" / "train")
    (pictures / "train" / "cat").rename(pictures / "train" / "test")
    assert sorted(image_task(pictures).train["labels"]) == [0] * 3 + [1] * 3 + [2] * 3
