"""The example with a loop of its own, as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import torch
from safetensors.torch import load_file

from tests.conftest import ROOT


SCRIPT = ROOT / "examples" / "text_classification_no_trainer.py"


def run(*args):
    done = subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_at_most_eight_lines_are_not_those_of_a_plain_script():
    assert len(re.findall(r"# \([+~]\)", SCRIPT.read_text(encoding="utf8"))) <= 8


def test_it_narrows_saves_and_resumes(bert, table, validation_table, tmp_path):
    data = ("--train_file", table, "--validation_file", validation_table, "--cpu", "True")
    steps = ("--max_train_steps", 4, "--batch_size", 4, "--gradient_accumulation_steps", 2)
    common = ("--model", bert, *data, *steps, "--target_reduction", 0.3)
    told = run(*common, "--output_dir", tmp_path / "whole", "--checkpointing_steps", 2)
    assert "metric before" in told
    results = json.loads((tmp_path / "whole" / "all_results.json").read_text())
    assert results["reduction"] >= 0.3 and 0 <= results["accuracy"] <= 1
    run(*common, "--output_dir", tmp_path / "again", "--resume_from_checkpoint", tmp_path / "whole" / "step_2")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
