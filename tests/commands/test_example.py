from __future__ import annotations

import json
import subprocess
import sys

import pytest

from optimum_rmtkd import RMTKDConfig
from tests.conftest import ROOT

from .conftest import sentence_rows, write_csv


def run(*args):
    script = ROOT / "examples" / "text_classification.py"
    return subprocess.run([sys.executable, script, *map(str, args)], capture_output=True, text=True)


def test_help_shows_arguments_and_recipe():
    done = run("--help")
    assert done.returncode == 0, done.stderr
    for option in ("--target_reduction", "--target-reduction", "--train_file", "--num_train_epochs", "--model"):
        assert option in done.stdout


def test_two_steps(bert, table, validation_table, tmp_path):
    data = ("--train_file", table, "--validation_file", validation_table)
    RMTKDConfig(round_to=1, min_width=4, fit_share=0.0).to_json_file(tmp_path / "recipe.json")
    size = ("--target-reduction", 0.5, "--recipe", tmp_path / "recipe.json")
    steps = ("--max_steps", 2, "--per_device_train_batch_size", 8, "--report_to", "none", "--save_strategy", "no")
    done = run("--model", bert, *data, *size, *steps, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert abs(results["reduction"] - 0.5) < 0.02
    assert 0 <= results["before_accuracy"] <= 1 and 0 <= results["after_accuracy"] <= 1
    assert {"config.json", "model.safetensors", "rmtkd_stages.json"} <= {p.name for p in (tmp_path / "out").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("named", [False, True])
def test_from_a_raw_checkpoint(bert, tmp_path, named):
    """A backbone gets a head for the classes of the data, by number or by name, and learns them before it is cut."""
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    AutoModel.from_pretrained(bert).save_pretrained(tmp_path / "raw")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "raw")
    for split, seed in (("train", 0), ("validation", 1)):
        rows = sentence_rows(256, seed=seed)
        names = ("bad", "good") if named else (0, 1)
        write_csv(tmp_path / f"{split}.csv", [row | {"label": names[row["label"]]} for row in rows])
    data = ("--train_file", tmp_path / "train.csv", "--validation_file", tmp_path / "validation.csv")
    RMTKDConfig(round_to=1, min_width=4).to_json_file(tmp_path / "recipe.json")
    size = ("--target_reduction", 0.4, "--recipe", tmp_path / "recipe.json")
    steps = ("--num_train_epochs", 8, "--learning_rate", 3e-3, "--report_to", "none", "--save_strategy", "no")
    done = run("--model", tmp_path / "raw", *data, *size, *steps, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["before_accuracy"] < 0.8 and results["after_accuracy"] > 0.95
    assert abs(results["reduction"] - 0.4) < 0.02
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config
    assert config.label2id == ({"bad": 0, "good": 1} if named else {"negative": 0, "positive": 1})
