"""Models straight from pretraining: heads from the labels of the data, and `compress --fit`."""

from __future__ import annotations

import json
import shutil

import pytest

from optimum_rmtkd.commands.data import DataArguments
from optimum_rmtkd.commands.heads import with_new_head
from optimum_rmtkd.commands.task import load_task
from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.trainer.rates import fit_pace

from .conftest import sentence_rows, write_csv
from .test_cli import reload_here


SMALL = ("--target-reduction", 0.5, "--round-to", 1, "--min-width", 4, "--batch-size", 8)


@pytest.fixture(scope="module")
def raw(bert, tmp_path_factory):
    """The backbone of `bert` alone, with its tokenizer."""
    from transformers import BertForSequenceClassification

    folder = tmp_path_factory.mktemp("raw") / "bert"
    shutil.copytree(bert, folder)
    (folder / "model.safetensors").unlink()
    BertForSequenceClassification.from_pretrained(bert).bert.save_pretrained(folder)
    return folder


def loaded(model, path, **more):
    return load_task(str(model), DataArguments(train_file=str(path), validation_file=str(path), **more), head="made")


def rows_with(tmp_path, labels):
    rows = [row | {"label": labels[i % len(labels)]} for i, row in enumerate(sentence_rows(24))]
    return write_csv(tmp_path / "rows.csv", rows)


@pytest.mark.parametrize("cells", [[[1], [0]] * 12, [{"a": 1}, {"a": 0}] * 12])
def test_labels_that_are_lists_or_objects(raw, tmp_path, cells):
    """A new head, or a --label-map, asks for the different labels first."""
    path = tmp_path / "rows.jsonl"
    rows = [row | {"label": label} for row, label in zip(sentence_rows(24), cells, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    for more in ({}, {"label_map": ["1=LABEL_0"]}):
        with pytest.raises(RMTKDError, match="Column 'label' holds .* in row 1; expected one label a row"):
            loaded(raw, path, **more)


# -- compress ---------------------------------------------------------------------------------------------------------


def test_a_raw_checkpoint_is_fine_tuned_cut_and_distilled(cli, raw, table, validation_table, tmp_path):
    files = ("--model", raw, "--train-file", table, "--validation-file", validation_table)
    code, out, err = cli("compress", "--fit", *files, *SMALL, "--max-steps", 5, "-o", tmp_path / "out")
    assert code == 0, err
    assert "BertModel has no head for text classification: it gets a new head for 2 classes" in out
    assert "fine-tuned " in out and "loss" in out and "accuracy" in out
    assert reload_here(tmp_path / "out")[0] == "rmtkd_bert"
    journal = json.loads((tmp_path / "out" / "rmtkd_stages.json").read_text())
    share, _ = fit_pace(5)
    assert journal["fit"]["steps"] == round(share * 5) == journal["stages"][0]["step"]
    before, after = journal["metrics"]["before"], journal["metrics"]["after"]
    assert before == journal["stages"][0]["metrics_before"] and set(before) == set(after) >= {"eval_loss"}
    results = json.loads((tmp_path / "out" / "rmtkd_results.json").read_text())
    assert results["metric"]["before"] == pytest.approx(before["eval_accuracy"])
    assert "Fine-tuned first: 3 steps" in (tmp_path / "out" / "README.md").read_text(encoding="utf8")


def test_a_fine_tuned_model_keeps_its_head_and_is_fine_tuned_all_the_same(
    cli, bert, table, validation_table, tmp_path
):
    files = ("--model", bert, "--train-file", table, "--validation-file", validation_table)
    for steps, asked in ((1, ("--fit-share", 0.2)), (3, ("--fit",))):
        out = tmp_path / str(steps)
        code, told, err = cli("compress", *asked, *files, *SMALL, "--max-steps", 5, "-o", out)
        assert code == 0, err
        assert "new head" not in told
        assert json.loads((out / "rmtkd_stages.json").read_text())["fit"]["steps"] == steps


def test_the_same_command_continues_a_run_that_was_fine_tuned(cli, raw, table, validation_table, tmp_path):
    files = ("--model", raw, "--train-file", table, "--validation-file", validation_table)
    steps = ("--max-steps", 5, "--save-steps", 2, "--checkpoints", tmp_path / "runs")
    outputs = [tmp_path / "first", tmp_path / "again"]
    for folder in outputs:
        code, _, err = cli("compress", "--fit", *files, *SMALL, *steps, "-o", folder)
        assert code == 0, err
    for name in ("model.safetensors", "rmtkd_stages.json"):
        assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "BertModel, the data is for text classification: expected a fine-tuned ...ForSequenceClassification."),
        ((), "let compress do so (--fit)."),
        (("--fit", "--no-train"), "--fit and --no-train: a cut alone trains nothing."),
        (("--fit-share", 0.3, "--no-train"), "--no-train and --fit-share 0.3: a cut alone trains nothing."),
        (("--fit", "--fit-share", 0), "--fit and --fit-share 0: the one fine-tunes first, the other never does."),
    ],
)
def test_what_does_not_go_together_is_refused(cli, raw, table, tmp_path, options, message):
    code, _, err = cli("compress", "--model", raw, "--train-file", table, *SMALL, *options, "-o", tmp_path / "out")
    assert code == 2 and message in err and not (tmp_path / "out").exists()


# -- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ((0, 1), ["LABEL_0", "LABEL_1"]),
        ((10, 2, 1), ["1", "2", "10"]),
        (("pos", "neg", "neutral"), ["neg", "neutral", "pos"]),
        (("True", "False"), ["False", "True"]),
    ],
)
def test_classes_are_those_of_the_data_in_a_fixed_order(raw, tmp_path, labels, names, capsys):
    task = loaded(raw, rows_with(tmp_path, labels))
    config = task.model.config
    assert [config.id2label[i] for i in range(config.num_labels)] == names and task.new_head
    assert task.metric == "accuracy" and task.model.classifier.out_features == len(names)
    expected = [f"LABEL_{label}" if "LABEL_0" in names else str(label) for label in labels]
    assert task.train["labels"][:] == [names.index(expected[i % len(labels)]) for i in range(24)]
    assert f"new head for {len(names)} classes" in capsys.readouterr().out


def test_numbers_with_a_fraction_or_a_metric_for_numbers_make_a_regressor(raw, tmp_path):
    task = loaded(raw, rows_with(tmp_path, (0.5, 1.0, 2.0)))
    assert task.metric == "pearson" and task.model.config.num_labels == 1 and task.train["labels"][0] == 0.5
    assert loaded(raw, rows_with(tmp_path, (1, 2, 3)), metric="spearman").model.config.problem_type == "regression"


def test_a_label_map_names_the_classes(raw, tmp_path):
    words = ("bad=negative", "awful=negative", "good=positive")
    task = loaded(raw, rows_with(tmp_path, ("bad", "awful", "good")), label_map=words)
    assert task.model.config.id2label == {0: "negative", 1: "positive"} and task.train["labels"][:3] == [0, 0, 1]


def test_a_head_that_fits_is_kept_and_one_that_does_not_is_replaced(bert, table, tmp_path, capsys):
    import torch
    from transformers import BertForSequenceClassification

    task = loaded(bert, table)
    own = BertForSequenceClassification.from_pretrained(bert)
    assert not task.new_head and torch.equal(task.model.classifier.weight, own.classifier.weight)
    task = loaded(bert, rows_with(tmp_path, ("red", "green", "blue")))
    assert task.new_head and task.model.config.num_labels == 3
    assert "the head of BertForSequenceClassification does not fit the data (Column 'label'" in capsys.readouterr().out
    assert torch.equal(task.model.bert.pooler.dense.weight, own.bert.pooler.dense.weight)


def test_a_new_head_is_the_same_for_the_same_seed(raw, table):
    import torch

    random = torch.get_rng_state()
    heads = [loaded(raw, table).model.classifier.weight for _ in range(2)]
    assert torch.equal(*heads) and torch.equal(torch.get_rng_state(), random)


def test_a_checkpoint_that_lacks_a_part_of_the_backbone_is_refused(raw, table, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(raw, tmp_path / "raw")
    tensors = load_file(raw / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"], tensors["pooler.dense.weight"]
    save_file(tensors, tmp_path / "raw" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RMTKDError, match=r"lack 1 tensor.*encoder\.layer\.1\.output\.dense\.weight: expected a whole ch"
    ):
        loaded(tmp_path / "raw", table)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("same",) * 8, "holds 'same' alone; expected two classes or more"),
        (tuple(range(8)), "holds 8 different labels in 8 rows"),
    ],
)
def test_columns_that_hold_no_classes_are_refused(labels, message):
    from datasets import Dataset
    from transformers import BertConfig

    rows = Dataset.from_dict({"label": list(labels)})
    with pytest.raises(RMTKDError, match=message):
        with_new_head(BertConfig(), rows, "label", None, {})
