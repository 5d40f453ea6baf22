"""The commands that look at, and give away, a finished reduction."""

from __future__ import annotations

import json
import sys

import pytest


@pytest.fixture
def small(cli, bert, table, validation_table, tmp_path):
    """A cut of the tiny BERT by `compress`."""
    data = ["--train-file", table, "--validation-file", validation_table]
    size = ["--target-reduction", 0.4, "--round-to", 4, "--min-width", 4, "--no-train"]
    code, _, err = cli("compress", "--model", bert, *data, *size, "-o", tmp_path / "small")
    assert code == 0, err
    return tmp_path / "small"


def test_report(cli, small, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, err = cli("report", small)
    assert code == 0, err
    html = (small / "report.html").read_text(encoding="utf8")
    assert str(small / "report.html") in out
    assert "accuracy before" in html and "Line: the metric of the uncut model" in html
    stage = json.loads((small / "rmtkd_stages.json").read_text())["stages"][0]
    assert stage["metric_name"] == "eval_accuracy" and stage["metric_cut"] == stage["metric_after"] is not None
    for part in ("Before and after", "Stages", "Width map", "Budget", "layer.1.intermediate", "accuracy"):
        assert part in html
    assert cli("report", small, "-o", tmp_path / "elsewhere.html")[0] == 0
    assert (tmp_path / "elsewhere.html").read_text(encoding="utf8") == html


def test_report_of_something_else(cli, bert, tmp_path):
    code, _, err = cli("report", bert)
    assert code == 2 and "no record of a reduction" in err and not (bert / "report.html").exists()
    code, _, err = cli("report", tmp_path / "nothing")
    assert code == 2 and "no such folder" in err


def test_report_to_a_place_that_is_none(cli, small, tmp_path):
    for place, message in ((tmp_path, "it is a folder"), (tmp_path / "missing" / "x.html", "does not exist")):
        code, _, err = cli("report", small, "-o", place)
        assert code == 2 and message in err


def test_analyze_writes_a_page(cli, bert, table, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, err = cli("analyze", "--model", bert, "--train-file", table, "--html", tmp_path / "spectra.html")
    assert code == 0, err
    assert "Spectra and plan" in (tmp_path / "spectra.html").read_text(encoding="utf8")


@pytest.fixture
def whole_stream(cli, bert, table, validation_table, tmp_path):
    """A cut that leaves the stream: its heads always fit."""
    data = ["--train-file", table, "--validation-file", validation_table, "--no-train"]
    size = ["--target-reduction", 0.3, "--round-to", 4, "--min-width", 4]
    sites = ["--sites", "intermediate", "attention_qk", "attention_vo"]
    code, _, err = cli("compress", "--model", bert, *data, *size, *sites, "-o", tmp_path / "whole")
    assert code == 0, err
    return tmp_path / "whole"


def test_export_native_says_what_padding_costs(cli, whole_stream, tmp_path):
    small = whole_stream
    code, _, err = cli("export", small, "--format", "native", "-o", tmp_path / "plain")
    assert code == 2 and "With --pad" in err and not (tmp_path / "plain").exists()
    code, out, err = cli("export", small, "--format", "native", "--pad", "-o", tmp_path / "plain")
    assert code == 0, err
    assert "BertForSequenceClassification" in out and "filled up" in out
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names and "modeling_rmtkd.py" not in names


@pytest.mark.parametrize("option", ["--html", "--plot"])
def test_without_matplotlib_the_extra_is_named_before_any_work(cli, bert, table, tmp_path, monkeypatch, option):
    from optimum_rmtkd.commands import task

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(task, "load_task", lambda *_: pytest.fail("work was started"))
    code, _, err = cli("analyze", "--model", bert, "--train-file", table, option, tmp_path / "x")
    assert code == 2 and "optimum-rmtkd[report]" in err


def test_extras_that_are_missing_are_named(cli, small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = cli("report", small)
    assert code == 2 and "optimum-rmtkd[report]" in err and not (small / "report.html").exists()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, _, err = cli("export", small, "--format", "onnx", "-o", tmp_path / "onnx")
    assert code == 2 and "optimum-rmtkd[onnx]" in err and not (tmp_path / "onnx").exists()


def test_export_of_a_folder_that_is_none(cli, tmp_path):
    code, _, err = cli("export", tmp_path / "none", "--format", "onnx", "-o", tmp_path / "out")
    assert code == 2 and f"There is no folder {tmp_path / 'none'} here" in err and not (tmp_path / "out").exists()


def test_a_tokenizer_that_cannot_be_read_is_no_silent_loss(cli, small, tmp_path):
    (small / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    (small / "tokenizer.json").write_text("{")
    code, _, err = cli("export", small, "--format", "native", "--pad", "-o", tmp_path / "out")
    assert code == 2 and not (tmp_path / "out").exists()


def test_export_refuses_dense_models_and_wrong_options(cli, bert, small, tmp_path):
    code, _, err = cli("export", bert, "--format", "native", "-o", tmp_path / "plain")
    assert code == 2 and "not reduced" in err
    code, _, err = cli("export", small, "--format", "onnx", "--pad", "-o", tmp_path / "onnx")
    assert code == 2 and "--pad belongs to" in err
    assert not (tmp_path / "plain").exists() and not (tmp_path / "onnx").exists()
