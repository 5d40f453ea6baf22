"""No command deletes or changes a file that it, or an earlier run of it, did not write."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from ..test_checkpoints import fill
from .conftest import sentence_rows, write_csv


def snapshot(*roots: Path) -> dict[Path, bytes | str]:
    """Content of every file, target of every link."""
    found: dict[Path, bytes | str] = {}
    for root in roots:
        for path in (root, *root.rglob("*")):
            if path.is_symlink():
                found[path] = os.readlink(path)
            elif path.is_file():
                found[path] = path.read_bytes()
    return found


def assert_untouched(before: dict[Path, bytes | str]) -> None:
    for path, content in before.items():
        assert os.path.lexists(path), f"{path} is gone"
        now = os.readlink(path) if path.is_symlink() else path.read_bytes()
        assert now == content, f"{path} was changed"


CUT = ("--no-train", "--target-reduction", 0.4, "--round-to", 4, "--min-width", 4)
BRIEF = ("--max-steps", 2, "--batch-size", 8, "--target-reduction", 0.4, "--round-to", 4, "--min-width", 4)


@pytest.fixture
def project(tmp_path, bert, monkeypatch):
    """A working directory as users have one: model, tables, notes, all in one place."""
    room = tmp_path / "project"
    shutil.copytree(bert, room / "model")
    write_csv(room / "train.csv", sentence_rows(64))
    write_csv(room / "dev.csv", sentence_rows(16, seed=1))
    (room / "notes").mkdir()
    for name in ("thesis.tex", "notes/a.md", ".secret", "model/mine.txt", "config.json", "report.html"):
        (room / name).write_text(f"mine: {name}")
    (room / "link").symlink_to(room / "notes")
    monkeypatch.chdir(room)
    return room


DATA = ("--model", "./model", "--train-file", "train.csv", "--validation-file", "dev.csv")


@pytest.mark.parametrize(
    "place", [".", "./", "../project", "model", "model/new", "link/..", "train.csv", "", "~", "~/x", "x" * 300]
)
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_compress_keeps_out_of_the_users_folders(cli, project, place, overwrite):
    before = snapshot(project)
    code, out, err = cli("compress", *DATA, *CUT, "-o", place, *overwrite)
    assert (
        code == 2 and "Traceback" not in err and err.strip().splitlines()[-1].startswith("optimum-cli rmtkd compress")
    )
    assert_untouched(before)
    assert set(snapshot(project)) == set(before)


@pytest.mark.parametrize("command", ["compress", "ternary", "export", "demo"])
def test_a_filled_folder_without_a_record_is_never_replaced(cli, project, command):
    words = {
        "compress": (*DATA, *CUT),
        "ternary": (*DATA, "--module", "classifier"),
        "export": ("model", "--format", "onnx"),
        "demo": (),
    }[command]
    before = snapshot(project)
    code, _, err = cli(command, *words, "-o", "notes", "--overwrite")
    assert code == 2 and "holds a.md, and no rmtkd_files.json" in err
    assert_untouched(before)


def test_compress_over_its_own_output(cli, project):
    assert cli("compress", *DATA, *CUT, "-o", "out")[0] == 0
    first = (project / "out" / "model.safetensors").read_bytes()
    for name in ("mine.txt", "figures/mine.png", "sub/x"):
        (project / "out" / name).parent.mkdir(exist_ok=True)
        (project / "out" / name).write_text("mine")
    mine = {path: content for path, content in snapshot(project).items() if content == b"mine"}
    kept = snapshot(project / "model", project / "notes", project / "train.csv", project / "thesis.tex")
    code, out, err = cli("compress", *DATA, *CUT, "-o", "out/", "--target-reduction", 0.3, "--overwrite")
    assert code == 0, err
    assert (project / "out" / "model.safetensors").read_bytes() != first and "mine.txt" in out
    assert len(mine) == 3
    assert_untouched(mine | kept)
    assert not [path.name for path in project.iterdir() if path.name.startswith(".out")]

    whole = snapshot(project)
    code, _, err = cli("compress", *DATA, *CUT, "-o", "out", "--target-reduction", 0.999, "--overwrite")
    assert code == 2  # a failure in the middle
    assert_untouched(whole)
    assert set(snapshot(project)) == set(whole)

    (project / "out" / "README.md").write_text("my own card")
    whole = snapshot(project)
    code, _, err = cli("compress", *DATA, *CUT, "-o", "out", "--overwrite")
    assert code == 2 and "README.md in" in err and "changed since" in err
    assert_untouched(whole)


def test_export_over_its_own_output(cli, project):
    sites = ("--sites", "intermediate", "attention_qk", "attention_vo")
    assert cli("compress", *DATA, *CUT, *sites, "-o", "small")[0] == 0
    native = ("export", "small", "--format", "native", "--pad", "-o")
    assert cli(*native, "plain")[0] == 0
    (project / "plain" / "mine").write_text("mine")
    before = snapshot(project / "small", project / "plain" / "mine", project / "notes")
    assert cli(*native, "plain")[0] == 2
    assert cli(*native, "plain", "--overwrite")[0] == 0
    for place in ("small", "small/plain", "."):
        assert cli(*native, place, "--overwrite")[0] == 2
    assert_untouched(before)


def test_reports_of_a_run_and_files_of_the_user(cli, project):
    pytest.importorskip("matplotlib")
    assert cli("compress", *DATA, *CUT, "-o", "out")[0] == 0
    before = snapshot(project)
    for place in ("thesis.tex", "report.html", "train.csv", "model/config.json", "out/config.json", "out", "notes"):
        code, _, err = cli("report", "out", "-o", place)
        assert code == 2 and place.split("/")[-1] in err
    assert_untouched(before)
    for _ in range(2):  # our own page may be written again
        assert cli("report", "out")[0] == 0 and cli("report", "out", "-o", "page.html")[0] == 0
    assert cli("compress", *DATA, *CUT, "-o", "out", "--overwrite")[0] == 0  # the page is in the record
    assert not (project / "out" / "report.html").exists()
    page = project / "page.html"
    page.write_text(page.read_text() + "<p>my remark</p>")
    (project / "out" / "report.html").write_text("<p>mine</p>")
    before = snapshot(page, project / "out", project / "notes")
    for more in ((), ("-o", "page.html")):
        code, _, err = cli("report", "out", *more)
        assert code == 2 and "not replaced" in err
    assert_untouched(before)


def test_analyze_and_files_of_the_user(cli, project):
    pytest.importorskip("matplotlib")
    (project / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n mine")
    (project / "dangling.json").symlink_to(project / "nowhere" / "x.json")
    before = snapshot(project)
    data = ("--model", "model", "--train-file", "train.csv", "--calibration-samples", 32)
    for option, place in (
        ("--json", "train.csv"),
        ("--json", "model/config.json"),
        ("--json", "config.json"),
        ("--html", "report.html"),
        ("--html", "thesis.tex"),
        ("--plot", "picture.png"),
        ("--json", "model"),
        ("--json", "link"),
        ("--json", "/proc/x.json"),
    ):
        code, out, err = cli("analyze", *data, option, place)
        assert code == 2 and ("annot write" in err or "not replaced" in err), err
    code, _, err = cli("analyze", *data, "--json", "one", "--html", "./one")
    assert code == 2 and "replace each other" in err
    assert cli("analyze", *data, "--json", "dangling.json")[0] == 2
    assert_untouched(before)
    ours = ("--json", "spectra.json", "--html", "spectra.html", "--plot", "spectra.png")
    for _ in range(2):
        code, _, err = cli("analyze", *data, *ours)
        assert code == 0, err
    assert_untouched(before)
    assert json.loads((project / "spectra.json").read_text())["sites"]


@pytest.mark.slow
def test_bench_and_files_of_the_user(cli, project):
    assert cli("compress", *DATA, *CUT, "-o", "out")[0] == 0
    shape = ("--batch-sizes", 1, "--lengths", 4, "--repeats", 1)
    before = snapshot(project / "model", project / "thesis.tex", project / "notes", project / "train.csv")
    for place in ("thesis.tex", "model/config.json", "out/config.json", "train.csv"):
        code, _, err = cli("bench", "out", "--against", "model", *shape, "--json", place)
        assert code == 2 and "not replaced" in err
    for _ in range(2):
        code, _, err = cli("bench", "out", "--against", "model", *shape)
        assert code == 0, err
    assert cli("compress", *DATA, *CUT, "-o", "out", "--overwrite")[0] == 0  # figures and card are in the record
    (project / "out" / "rmtkd_bench.json").write_text("{}")
    code, _, err = cli("bench", "out", "--against", "model", *shape)
    assert code == 2 and (project / "out" / "rmtkd_bench.json").read_text() == "{}"
    assert_untouched(before)


def test_checkpoints_beside_those_of_others(cli, project):
    """Old checkpoints of ours are cleared away, but nothing that somebody else wrote, there or in them."""
    runs = project / "runs"
    (runs / "checkpoint-0").mkdir(parents=True)
    (runs / "checkpoint-0" / "model.safetensors").write_text("of another training")
    (runs / "notes.txt").write_text("mine")
    words = (*DATA, *BRIEF, "--save-steps", 1, "--checkpoints", "runs")
    before = snapshot(project)
    code, _, err = cli("compress", *words, "-o", "out")
    assert code == 2 and "checkpoint-0 in it is another trainer's" in err
    assert_untouched(before)

    (runs / "checkpoint-0").rename(runs / "checkpoint-old")
    assert cli("compress", *words, "-o", "out")[0] == 0
    (runs / "checkpoint-1" / "mine.txt").write_text("mine")
    (runs / "checkpoint-0").mkdir()
    (runs / "checkpoint-0" / "model.safetensors").write_text("of another training")
    kept = snapshot(
        runs / "checkpoint-old", runs / "checkpoint-0", runs / "checkpoint-1" / "mine.txt", runs / "notes.txt"
    )
    assert cli("compress", *words, "-o", "again", "--max-steps", 5)[0] == 0
    assert_untouched(kept)
    assert sorted(path.name for path in runs.glob("checkpoint-*")) == [
        "checkpoint-0",
        "checkpoint-1",
        "checkpoint-4",
        "checkpoint-5",
        "checkpoint-old",
    ]
    assert [path.name for path in (runs / "checkpoint-1").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("place", ["model", "model/runs", ".", "..", "~/runs", "earlier", "taken", "x" * 300])
def test_checkpoints_lie_in_a_folder_of_their_own(cli, project, monkeypatch, place):
    from optimum_rmtkd.commands import task

    monkeypatch.setattr(task, "load_task", lambda *_: pytest.fail("work was started"))
    for name in ("earlier/rmtkd_files.json", "earlier/rmtkd_stages.json", "taken/checkpoint-1"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text('{"version": 1, "files": {}}')
    before = snapshot(project)
    code, _, err = cli("compress", *DATA, *BRIEF, "-o", "out", "--checkpoints", place)
    assert code == 2 and "Traceback" not in err
    assert_untouched(before)
    assert set(snapshot(project)) == set(before)


@pytest.mark.parametrize("fault", ["state", "last", "weights", "changed"])
def test_a_checkpoint_that_is_not_whole_is_named_before_any_work(tmp_path, capsys, fault):
    from optimum_rmtkd.commands.training import check_checkpoints
    from optimum_rmtkd.errors import RMTKDError
    from optimum_rmtkd.folders import write_record

    place = fill(tmp_path / "runs" / "checkpoint-4")
    check_checkpoints(str(tmp_path / "runs"))  # of a script, without a record
    write_record(place)
    check_checkpoints(str(tmp_path / "runs"))
    name = {"state": "rmtkd_state.json", "last": "trainer_state.json"}.get(fault, "model.safetensors")
    (place / name).write_text("{") if fault == "changed" else (place / name).unlink()
    before = snapshot(tmp_path)
    with pytest.raises(RMTKDError, match=f"checkpoint-4 in it is another trainer's or is not whole .*{name}"):
        check_checkpoints(str(tmp_path / "runs"))
    assert_untouched(before)
    fill(tmp_path / "runs" / "checkpoint-2")  # the run can go on from there
    check_checkpoints(str(tmp_path / "runs"))
    told = capsys.readouterr().err
    assert "checkpoint-4 is passed over" in told and "continues from checkpoint-2" in told


@pytest.mark.parametrize("out", ["runs", "runs/out", "runs/checkpoint-1", "."])
def test_output_and_checkpoints_are_apart(cli, project, out):
    (project / "runs" / "checkpoint-1").mkdir(parents=True)
    (project / "runs" / "checkpoint-1" / "mine").write_text("mine")
    before = snapshot(project)
    code, _, err = cli("compress", *DATA, *BRIEF, "-o", out, "--checkpoints", "runs", "--overwrite")
    assert code == 2
    assert_untouched(before)


@pytest.mark.parametrize("place", ["/proc/runs", "thesis.tex", "thesis.tex/runs"])
@pytest.mark.parametrize("command", ["compress", "ternary"])
def test_checkpoints_that_cannot_be_written_are_refused_before_any_work(cli, project, monkeypatch, place, command):
    from optimum_rmtkd.commands import task

    monkeypatch.setattr(task, "load_task", lambda *_: pytest.fail("work was started"))
    more = ("--module", "classifier", "--weights", "trained") if command == "ternary" else BRIEF
    before = snapshot(project)
    code, _, err = cli(command, *DATA, *more, "-o", "out", "--checkpoints", place)
    assert code == 2 and "Cannot write to" in err
    assert_untouched(before)
    assert not (project / "out").exists()


def test_ternary_keeps_out_of_the_features(cli, project):
    import numpy as np

    (project / "arrays").mkdir()
    np.savez(project / "arrays" / "train.npz", x=np.zeros((4, 2)), y=np.zeros(4))
    before = snapshot(project)
    for place in ("arrays", "arrays/train.npz", ".", "notes"):
        code, _, err = cli("ternary", "--features", "arrays/train.npz", "-o", place, "--overwrite")
        assert code == 2
    assert_untouched(before)


def test_a_trainer_keeps_what_lies_in_its_folder(project, bert):
    """`save_model`, checkpoints, the record and the card write beside what is there."""
    from transformers import BertForSequenceClassification, BertTokenizer

    from optimum_rmtkd import RMTKDConfig, RMTKDTrainer, RMTKDTrainingArguments

    tokenizer = BertTokenizer.from_pretrained(bert)
    rows = [tokenizer(row["sentence"]) | {"label": row["label"]} for row in sentence_rows(32)]
    room = project / "run"
    (room / "figures").mkdir(parents=True)
    for name in (
        "README.md",
        "mine.txt",
        "rmtkd_stages.json.tmp",
        "figures/widths.png",
        "final/notes",
        "final/x.json",
    ):
        (room / name).parent.mkdir(exist_ok=True)
        (room / name).write_text("mine")
    before = snapshot(project)
    trainer = RMTKDTrainer(
        model=BertForSequenceClassification.from_pretrained(bert),
        args=RMTKDTrainingArguments(
            str(room), max_steps=2, per_device_train_batch_size=8, save_steps=1, report_to="none", use_cpu=True
        ),
        rmtkd_config=RMTKDConfig(target_reduction=0.4, round_to=4, min_width=4),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(room / "final"))
    trainer.create_model_card()
    assert (room / "README.md").read_text() == "mine"
    (room / "README.md").unlink()
    before.pop(room / "README.md")
    trainer.create_model_card()
    assert "narrowed by the spectra" in (room / "README.md").read_text()
    trainer.model.save_pretrained(room / "final")
    assert (room / "rmtkd_stages.json").is_file() and (room / "final" / "model.safetensors").is_file()
    assert_untouched(before)


def test_functions_replace_only_their_own_files(project, bert):
    pytest.importorskip("matplotlib")
    from transformers import BertForSequenceClassification, BertTokenizer

    from optimum_rmtkd import RMTKDConfig, RMTKDError, analyze
    from optimum_rmtkd.files import write_text

    tokenizer = BertTokenizer.from_pretrained(bert)
    batch = tokenizer([row["sentence"] for row in sentence_rows(32)], padding=True, return_tensors="pt")
    report = analyze(BertForSequenceClassification.from_pretrained(bert), [dict(batch)], RMTKDConfig())
    for name in ("mine.json", "mine.html", "mine.png", "ours.json.tmp", ".ours.json.partial"):
        (project / name).write_text("mine")
    before = snapshot(project)
    for write, suffix in ((report.to_json, "json"), (report.to_html, "html"), (report.plot, "png")):
        with pytest.raises(RMTKDError, match=f"mine.{suffix} exists"):
            write(project / f"mine.{suffix}")
        write(project / f"ours.{suffix}")
        write(project / f"ours.{suffix}")
        assert (project / f"ours.{suffix}").stat().st_size > 100
    write_text(project / "ours.json", "{}")
    assert_untouched(before)
