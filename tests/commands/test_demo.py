from __future__ import annotations

import importlib.util
import json
import re

import pytest

from tests.conftest import ROOT


pytest.importorskip("sklearn")

SMALL = ("--epochs", 1, "--distil-epochs", 14, "--hidden-size", 32, "--layers", 2, "--train-samples", 192)


def row(out: str, name: str) -> list[str]:
    line = [line for line in out.splitlines() if line.startswith(name)][-1]  # the spectra come first and name some too
    return re.split(r"  +", line)


def test_small_demo_goes_the_whole_way(cli, tmp_path):
    code, out, err = cli("demo", "-o", tmp_path / "out", *SMALL, "--target-reduction", 0.5)
    assert code in (0, 1), err  # so short a training may lose more than a point, and then says so
    before, after = (int(row(out, "parameters")[i].replace(",", "")) for i in (1, 2))
    assert 0.4 < after / before < 0.55
    accuracy = [float(row(out, "accuracy")[i].split()[0]) for i in (1, 2)]
    assert (code == 1) == (accuracy[0] - accuracy[1] > 1) == ("more than the one point" in out)
    assert float(row(out, "latency, batch 256")[3].split(" times")[0]) > 0
    assert float(re.search(r"largest difference of the logits: (\S+)", out)[1]) <= 1e-5
    assert {"config.json", "model.safetensors"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not [p for p in (tmp_path / "out").iterdir() if p.name in ("trainer", "dense", "logits.pt")]
    assert_recorded(cli, tmp_path / "out", accuracy)


def assert_recorded(cli, folder, accuracy):
    """Stages, spectra and results are those of this run, and the report shows all of them."""
    stages, spectra, results = (
        json.loads((folder / f"rmtkd_{name}.json").read_text()) for name in ("stages", "spectra", "results")
    )
    assert stages["stages"][0]["metric_name"] == "eval_accuracy"
    assert stages["stages"][0]["metric_before"] == pytest.approx(accuracy[0] / 100, abs=1e-4)
    assert stages["stages"][-1]["metric_after"] == pytest.approx(accuracy[1] / 100, abs=1e-4)
    assert set(spectra["stages"]) == {str(stage["index"]) for stage in stages["stages"]}
    assert results["metric"]["after"] == pytest.approx(accuracy[1] / 100, abs=1e-4)
    assert any("loss" in line for line in results["log_history"]) and results["dataset"]["rows"] == 599
    if importlib.util.find_spec("matplotlib") is None:
        return
    code, _, err = cli("report", folder)
    assert code == 0, err
    page = (folder / "report.html").read_text()
    titles = ("Size", "Speed", "Accuracy", "Width map", "Budget", "Stages", "Training", "Before and after")
    titles += ("Eigenvalues site by site", "Spectra in numbers", "Recipe")
    assert [title for title in titles if title not in re.findall(r"<h2[^>]*>([^<]*)", page)] == []
    assert "not measured" not in page


def test_the_extra_of_the_demonstration_draws_the_report():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^demo = \["optimum-rmtkd\[vision,report\]"\]$', text, re.MULTILINE)
    assert re.search(r'^report = \["matplotlib', text, re.MULTILINE)


def test_filled_folder_is_refused(cli, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("")
    code, _, err = cli("demo", "-o", tmp_path / "out", *SMALL)
    assert code == 2 and "--overwrite" in err


@pytest.mark.parametrize("wrong", [("--train-samples", 5000), ("--hidden-size", 30), ("--target-reduction", 2)])
def test_wrong_sizes(cli, tmp_path, wrong):
    code, _, err = cli("demo", "-o", tmp_path / "out", *SMALL, *wrong)
    assert code == 2 and "expected" in err
    assert list(tmp_path.iterdir()) == []


def test_split_is_the_same_every_time_and_does_not_overlap():
    from optimum_rmtkd.commands.demo import read_digits

    first, second = read_digits(1198), read_digits(1198)
    assert (len(first.train_labels), len(first.test_labels)) == (1198, 599)
    assert first.train_pixels.equal(second.train_pixels) and first.test_pixels.equal(second.test_pixels)
    assert first.train_pixels.shape == (1198, 1, 8, 8)
    assert first.train_pixels.min() == -1 and first.train_pixels.max() == 1
    seen = {tuple(x.flatten().tolist()) for x in first.train_pixels}
    assert sum(tuple(x.flatten().tolist()) in seen for x in first.test_pixels) == 0


@pytest.mark.slow
def test_demo_keeps_its_promise(cli, tmp_path):
    code, out, err = cli("demo", "-o", tmp_path / "out")
    assert code == 0, out + err
    before, after = (int(row(out, "parameters")[i].replace(",", "")) for i in (1, 2))
    assert after / before <= 0.25
