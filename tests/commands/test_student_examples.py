"""The scripts for a given teacher and a given student."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from .conftest import save_bert


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("small"), hidden_size=16)


@pytest.fixture
def call(monkeypatch, capsys, bert, table, validation_table, tmp_path):
    """Run one of the scripts in this process; returns (exit code, stdout, stderr)."""

    def run(script: str, *options) -> tuple[int, str, str]:
        shared = {
            "teacher": bert,
            "train_file": table,
            "validation_file": validation_table,
            "output_dir": tmp_path / "out",
        }
        shared |= {"max_steps": 3, "per_device_train_batch_size": 16, "report_to": "none", "use_cpu": True}
        words = [str(word) for name, value in shared.items() for word in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", [script, *words, *map(str, options)])
        code = 0
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("rdimkd_student.py", ("--student", "small", "--layers", "uniform")),
        ("rdimkd_student.py", ("--student", "small", "--projection", "none")),
        ("opdf_student.py", ("--student", "small", "--num_tensors", "5")),
        ("opdf_student.py", ("--keep_layers", "1", "--alignment", "1e3")),
        ("opdf_student.py", ("--keep_layers", "1", "--num_tensors", "0")),
    ],
)
def test_a_plain_student_comes_out(call, small, tmp_path, script, options):
    from transformers import BertForSequenceClassification

    code, out, err = call(script, *(small if word == "small" else word for word in options))
    assert code == 0, err
    assert "before_accuracy" in out and "after_accuracy" in out
    saved, found = BertForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert saved.config.hidden_size == (32 if "--keep_layers" in options else 16)
    assert saved.config.num_hidden_layers == len(saved.bert.encoder.layer) == (1 if "--keep_layers" in options else 2)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "give either --student or --keep_layers"),
        (("--keep_layers", "3"), "the teacher has 2 blocks"),
        (("--keep_layers", "-1"), "the teacher has 2 blocks"),
    ],
)
def test_which_student_has_to_be_said(call, options, reason):
    code, _, err = call("opdf_student.py", *options)
    assert code == 2 and reason in err


@pytest.mark.parametrize("script", ["rdimkd_student.py", "opdf_student.py"])
@pytest.mark.parametrize("option", ["--text_column", "--label_column"])
def test_a_column_that_is_not_there_is_named(call, small, script, option):
    code, _, _ = call(script, "--student", small, option, "sentense")
    assert "no column 'sentense'; it has sentence, label" in code
