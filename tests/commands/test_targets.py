"""`compress` with a time or a tolerance in place of a size."""

from __future__ import annotations

import json

import pytest

from ..surgery.timing import machine  # noqa: F401


SMALL = ("--round-to", 4, "--min-width", 4, "--calibration-samples", 32)


@pytest.fixture
def compress(cli, bert, table, validation_table, tmp_path):
    def call(*args):
        files = ("--model", bert, "--train-file", table, "--validation-file", validation_table)
        return cli("compress", *files, *SMALL, "-o", tmp_path / "out", *args)

    return call


def journal(folder):
    return json.loads((folder / "rmtkd_stages.json").read_text())


def test_the_smallest_model_without_training(compress, tmp_path, cli):
    code, out, err = compress("--no-train", "--tolerance", 99, "--overwrite")  # any metric is kept
    assert code == 0, err
    stages = journal(tmp_path / "out")["stages"]
    assert len(stages) > 2 and [s["status"] for s in stages].count("accepted") == 1
    taken = next(s for s in stages if s["status"] == "accepted")
    assert taken["parameters_after"] == min(s["parameters_after"] for s in stages) and taken["sites"]
    assert journal(tmp_path / "out")["parameters_after"] == taken["parameters_after"]
    assert all(s["metrics_after"]["eval_accuracy"] == s["metric_after"] for s in stages)
    assert {s["reason"] for s in stages} == {
        "keeps the tolerance, as a smaller size does",
        "the smallest that keeps the tolerance, without training",
    }
    for stage in stages:  # the path is printed, and is in the card
        assert f"{stage['parameters_after']:,}" in out
        assert f"{stage['parameters_after']:,}" in (tmp_path / "out" / "README.md").read_text()
    assert "may lose 0.99" in out and out.index("taken") < out.index("bytes on disk")
    pytest.importorskip("matplotlib")
    assert cli("report", tmp_path / "out")[0] == 0


def test_a_tolerance_that_nothing_keeps_writes_nothing(compress, tmp_path, monkeypatch):
    values = iter([0.9, 0.9, *[0.1] * 50])  # uncut, for the table and for the search; then what is tried
    monkeypatch.setattr(
        "optimum_rmtkd.commands.task.measure", lambda *a: {"eval_accuracy": next(values), "eval_loss": 1.0}
    )
    monkeypatch.setattr("optimum_rmtkd.surgery.surgeon.refit", lambda *a: None)
    code, _, err = compress("--no-train", "--tolerance", 0.5)
    assert code == 2 and "keeps tolerance=0.5" in err and "lost too much" in err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_rounds_with_training(compress, tmp_path):
    options = ("--max-steps", 4, "--batch-size", 8, "--rounds", 2, "--round-share", 0.2)
    code, out, err = compress("--tolerance", 99, *options)
    assert code == 0, err
    record = journal(tmp_path / "out")
    assert [s["status"] for s in record["stages"]] == ["accepted"] * 2
    assert record["reduction"] == pytest.approx(0.36, abs=0.02)


def test_a_share_of_the_time(compress, tmp_path, machine):  # noqa: F811
    machine()
    code, out, err = compress("--no-train", "--target-latency", 0.9, "--latency-length", 16)
    assert code == 0, err
    line = next(line for line in out.splitlines() if line.startswith("latency "))
    assert "batch 1, length 16, cpu" in line
    assert journal(tmp_path / "out")["stages"][0]["note"] == line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target-latency", "5"), "Did you mean '5ms'?"),
        (("--target-latency", "0.01ms"), "the model takes"),
        (("--target-latency", "0.5", "--tolerance", "1"), "a budget has one target"),
        (("--tolerance", "1", "--target-reduction", "0.5"), "a budget has one target"),
        (("--round-share", "0.5", "--target-reduction", "0.5"), "without tolerance"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_evaluated(
    compress,
    tmp_path,
    machine,  # noqa: F811
    options,
    message,
    monkeypatch,  # noqa: F811
):
    machine()
    monkeypatch.setattr("optimum_rmtkd.commands.task.measure", lambda *a: pytest.fail("it was evaluated"))
    code, _, err = compress(*options)
    assert code == 2 and message in err and not (tmp_path / "out").exists()
