"""The commands without a target, on a model whose spectra do not say how far to cut."""

from __future__ import annotations

import pytest


SMALL = ("--round-to", 4, "--min-width", 4)


@pytest.fixture
def files(bert, table, validation_table):
    return ("--model", bert, "--train-file", table), ("--validation-file", validation_table)


@pytest.mark.parametrize("options", [(), ("--no-train",), ("--form", "factored")])
def test_compress_asks_for_a_size_before_it_evaluates(cli, files, options, tmp_path, monkeypatch):
    def measure(*_):
        raise AssertionError("the model was evaluated first")

    monkeypatch.setattr("optimum_rmtkd.commands.task.measure", measure)
    code, out, err = cli("compress", *files[0], *files[1], *SMALL, *options, "-o", tmp_path / "out")
    assert code == 2 and not (tmp_path / "out").exists()
    lines = [line for line in err.splitlines() if line.strip()]
    start = next(i for i, line in enumerate(lines) if "error: No target was given" in line)
    assert "--target-reduction 0.5" in lines[start]
    assert [line.split()[0] for line in lines[start + 2 : start + 6]] == ["0.3", "0.5", "0.63", "0.8"]
    assert "Traceback" not in err


def test_compress_takes_a_named_edge_at_its_word(cli, files, tmp_path):
    named = ("--edge-estimator", "mp_quantile", "--no-train")
    code, out, err = cli("compress", *files[0], *files[1], *SMALL, *named, "-o", tmp_path / "out")
    assert code == 0, err
    assert (tmp_path / "out" / "config.json").is_file()


def test_analyze_works_without_a_target(cli, files, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, err = cli("analyze", *files[0], *SMALL, "--html", tmp_path / "report.html")
    assert code == 0, err
    assert "No target was given" in out and "predicted loss" in out and "(-0.0%)" in out
    assert "No target was given" in (tmp_path / "report.html").read_text(encoding="utf8")
