from __future__ import annotations

import json
import re
import shutil

import pytest

from optimum_rmtkd.commands.data import DataArguments
from optimum_rmtkd.commands.task import evaluate, load_task, stored_dtype
from optimum_rmtkd.errors import RMTKDError

from .conftest import WORDS, save_bert, sentence_rows, write_csv


def text_data(table, validation_table, **more):
    return DataArguments(train_file=str(table), validation_file=str(validation_table), **more)


def test_text_task(bert, table, validation_table):
    import torch

    task = load_task(str(bert), text_data(table, validation_table, max_length=5))
    assert task.metric == "accuracy" and (len(task.train), len(task.validation)) == (96, 40)
    assert {p.dtype for p in task.model.parameters()} == {torch.float32}
    batch = next(iter(task.calibration_loader(32, seed=0)))
    assert batch["input_ids"].shape == (32, 5) and batch["labels"].shape == (32,)
    again = next(iter(task.calibration_loader(32, seed=0)))
    assert torch.equal(batch["input_ids"], again["input_ids"])
    assert 0 < batch["labels"].sum() < 32


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attention_kernel_is_the_one_asked_for(bert, table, validation_table, kernel):
    task = load_task(str(bert), text_data(table, validation_table), attn_implementation=kernel)
    assert task.model.config._attn_implementation == kernel
    assert {module.config._attn_implementation for module in task.model.modules() if hasattr(module, "config")} == {
        kernel
    }


def test_attention_kernel_that_the_model_has_not(bert, table, validation_table):
    with pytest.raises(RMTKDError, match="attn_implementation 'nonsense': .* not supported"):
        load_task(str(bert), text_data(table, validation_table), attn_implementation="nonsense")


def test_evaluate_counts_right_answers(bert, table, validation_table):
    import torch

    task = load_task(str(bert), text_data(table, validation_table))
    with torch.no_grad():
        task.model.classifier.weight.zero_()
        task.model.classifier.bias.copy_(torch.tensor([0.0, 1.0]))
    assert evaluate(task, task.model) == 0.5  # always "positive"; half of the rows are
    positives = [i for i, label in enumerate(task.validation["labels"]) if label == 1]
    only = task.validation.select(positives)
    object.__setattr__(task, "validation", only)
    assert evaluate(task, task.model) == 1.0


def test_labels_given_by_name_count_as_the_model_counts(bert, tmp_path):
    rows = [row | {"label": ("Negative", "Positive")[row["label"]]} for row in sentence_rows(8)]
    path = write_csv(tmp_path / "named.csv", rows)
    task = load_task(str(bert), text_data(path, path))
    assert task.train["labels"][:] == [0, 1] * 4


def test_regression_task(tmp_path):
    import numpy as np
    from transformers import EvalPrediction

    folder = save_bert(tmp_path / "bert", label2id={"LABEL_0": 0}, id2label={0: "LABEL_0"})
    rows = [row | {"label": i / 4} for i, row in enumerate(sentence_rows(9))]
    path = write_csv(tmp_path / "rows.csv", rows)
    task = load_task(str(folder), text_data(path, path))
    assert task.metric == "pearson" and task.train["labels"][3] == 0.75
    assert task.collator([task.train[0], task.train[1]])["labels"].is_floating_point()
    got = task.compute_metrics(EvalPrediction(np.array([[1.0], [2.0], [4.0]]), np.array([-1.0, -2.0, -4.0])))
    assert got == {"pearson": pytest.approx(-1.0)}
    assert -1 <= evaluate(task, task.model) <= 1


def test_image_task(tmp_path):
    image = pytest.importorskip("PIL.Image")
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    for name, level in (("cat", 0), ("dog", 255)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            image.new("L", (12, 12), level).save(tmp_path / "pictures" / name / f"{i}.png")
    labels = {"label2id": {"dog": 0, "cat": 1}, "id2label": {0: "dog", 1: "cat"}}
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        **labels,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    pictures = str(tmp_path / "pictures")
    task = load_task(str(tmp_path / "vit"), DataArguments(train_file=pictures, validation_file=pictures))
    batch = next(iter(task.calibration_loader(6, seed=0)))
    assert batch["pixel_values"].shape == (6, 3, 8, 8)
    bright = batch["pixel_values"].amax(dim=(1, 2, 3)) > 0
    assert (bright == (batch["labels"] == 0)).all()  # dogs are white, and the model counts dogs as 0
    assert 0 <= evaluate(task, task.model) <= 1


def refusal(model, table, **more) -> str:
    """What `load_task` says."""
    with pytest.raises(RMTKDError) as caught:
        load_task(str(model), text_data(table, table, **more))
    return str(caught.value)


def test_model_that_is_not_there(tmp_path, table):
    assert re.search("Cannot load model", refusal(tmp_path / "nowhere", table))


def test_model_without_a_head(tmp_path, table):
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        tmp_path / "bert"
    )
    assert re.search("BertModel.*Fine-tune", refusal(tmp_path / "bert", table))


def test_model_without_tokenizer(bert, tmp_path, table):
    folder = tmp_path / "bert"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(bert / name, folder / name)
    assert re.search("no tokenizer", refusal(folder, table))


def test_model_without_weights(bert, tmp_path, table):
    shutil.copytree(bert, tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").unlink()
    assert re.search("Cannot load the weights", refusal(tmp_path / "bert", table))


def test_tokenizer_of_another_model(tmp_path, table):
    folder = save_bert(tmp_path / "bert", vocabulary=len(WORDS) - 10)
    assert re.search(r"gives token \d+, its embedding table has 28 rows", refusal(folder, table))


def test_rows_without_text(bert, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(json.dumps(row) for row in [{"sentence": "the film", "label": 0}, {"sentence": None, "label": 1}])
    )
    assert re.search("Column 'sentence' holds nothing in 1 of 2 rows, the first of them row 2", refusal(bert, path))


def test_labels_the_model_does_not_have(bert, tmp_path):
    path = write_csv(tmp_path / "rows.csv", [row | {"label": i % 3} for i, row in enumerate(sentence_rows(9))])
    assert re.search("the model has 2 classes", refusal(bert, path))


def test_validation_data_with_other_columns(bert, table, tmp_path):
    other = write_csv(tmp_path / "other.csv", [{"text": "the film", "label": 0}])
    with pytest.raises(RMTKDError, match="validation data has no column 'sentence'; it has text, label"):
        load_task(str(bert), text_data(table, other))


def test_stored_dtype(bert, tmp_path):
    import torch
    from transformers import BertForSequenceClassification

    assert stored_dtype(str(bert)) == "float32"
    BertForSequenceClassification.from_pretrained(bert).half().save_pretrained(tmp_path)
    assert stored_dtype(str(tmp_path)) == "float16"
    assert torch.float16 == BertForSequenceClassification.from_pretrained(tmp_path).dtype


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "big"},
        {"id2label": ["a", "b"]},
        {"label2id": {"negative": "x", "positive": "y"}},
        {"dtype": "floaty"},
        {"num_attention_heads": 5},
        {"hidden_act": "swoosh"},
        {"vocab_size": 7},
        None,
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_ends_in_a_named_error(bert, table, tmp_path, changes):
    shutil.copytree(bert, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text("null" if changes is None else json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(RMTKDError):
        load_task(str(tmp_path / "model"), DataArguments(train_file=str(table)))


def test_a_config_with_more_layers_than_the_weights(bert, table, tmp_path):
    folder = tmp_path / "deeper"
    shutil.copytree(bert, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    said = refusal(folder, table)
    assert "that its config.json describes" in said and f"encoder.layer.{config['num_hidden_layers']}." in said
