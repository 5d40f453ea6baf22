from __future__ import annotations

import json
import subprocess
import sys

from tests.conftest import ROOT


def run(*args):
    script = ROOT / "examples" / "text_classification.py"
    return subprocess.run([sys.executable, script, *map(str, args)], capture_output=True, text=True)


def test_help_shows_arguments_and_recipe():
    done = run("--help")
    assert done.returncode == 0, done.stderr
    for option in ("--target-reduction", "--train_file", "--num_train_epochs", "--model"):
        assert option in done.stdout


def test_two_steps(bert, table, validation_table, tmp_path):
    data = ("--train_file", table, "--validation_file", validation_table)
    size = ("--target-reduction", 0.5, "--round-to", 1, "--min-width", 4)
    steps = ("--max_steps", 2, "--per_device_train_batch_size", 8, "--report_to", "none", "--save_strategy", "no")
    done = run("--model", bert, *data, *size, *steps, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert abs(results["reduction"] - 0.5) < 0.02
    assert 0 <= results["before_accuracy"] <= 1 and 0 <= results["after_accuracy"] <= 1
    assert {"config.json", "model.safetensors", "rmtkd_stages.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
