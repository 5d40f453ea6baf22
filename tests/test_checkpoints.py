"""Folders of checkpoints: whole or not, and the newest whole one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from optimum_rmtkd import newest_checkpoint
from optimum_rmtkd.checkpoints import (
    MANIFEST,
    STATE,
    begin,
    check_whole,
    discard,
    fault_of,
    newest_whole,
    pending_place,
    put_in_place,
    step_of,
    tidy,
)
from optimum_rmtkd.errors import IncompleteCheckpointError, RMTKDError
from optimum_rmtkd.locks import let_go

from .conftest import ROOT


def fill(folder, of_loop=False):
    """What a checkpoint consists of."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "rmtkd_state.safetensors"):
        save_file({"a": torch.zeros(50), "b": torch.ones(3, 4)}, folder / name)
    for name in ("rmtkd_state.json", "config.json") + (() if of_loop else ("trainer_state.json",)):
        (folder / name).write_text('{"version": 2}')
    archives = ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl")
    for name in archives if of_loop else ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.zeros(20)}, folder / name)
    return folder


def made(target, step=1, **options):
    """A checkpoint that was written as they are."""
    lock = begin(target)
    fill(pending_place(target), **options)
    put_in_place(target, step)
    let_go(lock)
    return target


def test_a_replaced_checkpoint_of_weights_alone_keeps_none_of_the_old(tmp_path):
    """As of `save_only_model=True`: whatever shards there were."""
    target = tmp_path / "checkpoint-1"
    for names in (("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), ("model.safetensors",)):
        lock = begin(target)
        pending_place(target).mkdir(parents=True, exist_ok=True)
        for name in names:
            (pending_place(target) / name).write_bytes(b"x")
        put_in_place(target, 1)
        let_go(lock)
        assert sorted(path.name for path in target.glob("*.safetensors")) == sorted(names)


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


KINDS = [(True, False), (False, False), (True, True), (False, True)]  # with a manifest, of a loop


@pytest.mark.parametrize(("manifest", "of_loop"), KINDS)
def test_each_missing_or_half_file_is_a_fault_that_names_it(tmp_path, manifest, of_loop):
    whole = (made if manifest else fill)(tmp_path / "checkpoint-1", of_loop=of_loop)
    assert fault_of(whole) is None and (whole / MANIFEST).is_file() == manifest
    needed = [
        path.name for path in whole.iterdir() if path.name not in (MANIFEST, *(() if manifest else ["config.json"]))
    ]
    for number, name in enumerate(sorted(needed)):
        for how in (os.unlink, cut):
            half = (made if manifest else fill)(tmp_path / f"{how.__name__}{number}", of_loop=of_loop)
            how(half / name)
            kind = name.split("_0")[0].split(".")[0].removeprefix("random_states").removeprefix("custom_checkpoint")
            assert (fault := fault_of(half)) is not None and kind in fault, (name, fault)


def test_the_manifest_itself_may_be_half(tmp_path):
    whole = made(tmp_path / "checkpoint-1")
    cut(whole / MANIFEST)
    assert MANIFEST in fault_of(whole)


def test_the_newest_whole_one_and_why_others_are_passed_over(tmp_path):
    for step in (2, 10, 9):
        made(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-10" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    found = newest_whole(tmp_path)
    assert found.newest == tmp_path / "checkpoint-9"
    assert [(path.name, reason.split()[0]) for path, reason in found.passed] == [
        ("checkpoint-11", "holds"),
        ("checkpoint-10", "optimizer.pt"),
    ]
    with pytest.raises(IncompleteCheckpointError, match=r"checkpoint-10 cannot .* optimizer.pt missing.*checkpoint-9"):
        check_whole(tmp_path / "checkpoint-10")
    check_whole(tmp_path / "checkpoint-9")


def test_the_newest_checkpoint_of_a_loop_is_that_of_the_highest_step(tmp_path, caplog):
    assert newest_checkpoint(tmp_path / "nowhere") is None
    made(tmp_path / "epoch_1", step=8, of_loop=True)
    made(tmp_path / "step_4", step=4, of_loop=True)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "epoch_1")
    cut(tmp_path / "epoch_1" / "optimizer.bin")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "step_4")
    assert "epoch_1 is passed over (optimizer.bin" in caplog.text and "continues from step_4" in caplog.text


def test_until_it_has_its_name_it_is_no_checkpoint(tmp_path):
    target = tmp_path / "checkpoint-3"
    lock = begin(target)
    fill(pending_place(target))
    assert newest_whole(tmp_path).newest is None and not newest_whole(tmp_path).passed
    tidy(tmp_path)  # it is alive
    with pytest.raises(RMTKDError, match="being written by another run"):
        begin(target)
    let_go(lock)
    tidy(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_what_the_next_run_removes_with_a_line(tmp_path, caplog):
    """Of a process that is gone, whatever its number is now."""
    code = (
        "import os, sys, pathlib; from optimum_rmtkd.checkpoints import begin, pending_place;"
        "target = pathlib.Path(sys.argv[1]); lock = begin(target);"
        "(pending_place(target) / 'model.safetensors').write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "checkpoint-4"]).returncode == -9
    (tmp_path / ".mine.partial").mkdir()
    (tmp_path / ".mine.partial" / "notes").write_text("mine")
    tidy(tmp_path)
    assert "checkpoint-4.partial, which a run that was killed" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [".mine.partial"]


def test_one_of_the_same_step_is_replaced_and_strange_files_stay(tmp_path):
    target = made(tmp_path / "checkpoint-5")
    (target / "notes.txt").write_text("mine")
    (target / "rng_state_3.pth").write_text("of a run of more processes")
    first = json.loads((target / MANIFEST).read_text())
    made(target, step=7)
    assert json.loads((target / MANIFEST).read_text()) == first | {"step": 7}
    assert (target / "notes.txt").read_text() == "mine" and not (target / "rng_state_3.pth").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_what_was_moved_aside_comes_back(tmp_path, caplog):
    made(tmp_path / "checkpoint-5")
    aside = tmp_path / ".checkpoint-5.ab12cd34.old"
    aside.mkdir()
    (tmp_path / "checkpoint-5").rename(aside / "checkpoint-5")
    tidy(tmp_path)
    assert fault_of(tmp_path / "checkpoint-5") is None and "back in its place" in caplog.text
    assert not aside.exists()


def killed_at_the_second_rename(target, step):
    """A checkpoint is being replaced by one of this step: the old one has been moved aside, the new one is sealed."""
    code = (
        "import os, pathlib, sys; from optimum_rmtkd.checkpoints import begin, pending_place, put_in_place;"
        "from tests.test_checkpoints import fill; target, calls = pathlib.Path(sys.argv[1]), []; begin(target);"
        "fill(pending_place(target), of_loop=True); rename = pathlib.Path.rename\n"
        "def counted(path, to):\n"
        "    calls.append(to)\n"
        "    return os.kill(os.getpid(), 9) if len(calls) == 2 else rename(path, to)\n"
        "pathlib.Path.rename = counted; put_in_place(target, int(sys.argv[2]))"
    )
    done = subprocess.run([sys.executable, "-c", code, target, str(step)], cwd=ROOT)
    assert done.returncode == -9 and not target.exists()


@pytest.mark.parametrize("name", ["last", "checkpoint-5", "x" * 100])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_kill_between_two_renames_costs_no_checkpoint(tmp_path, caplog, name, sealed):
    """The new one, whole and sealed, gets its name; without it the old one comes back."""
    made(tmp_path / name, step=5, of_loop=True)
    (tmp_path / name / "notes").write_text("mine")
    killed_at_the_second_rename(tmp_path / name, 10)
    if not sealed:
        cut(pending_place(tmp_path / name) / "optimizer.bin")
    assert newest_checkpoint(tmp_path) == str(tmp_path / name)
    assert step_of(tmp_path / name) == (10 if sealed else 5) and fault_of(tmp_path / name) is None
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name / "notes").exists()
    assert "place: a run was killed while it replaced" in caplog.text


def test_a_kill_while_the_old_one_is_removed_leaves_nothing(tmp_path):
    made(tmp_path / "last", step=5)
    for token, content in {"ab12cd34": ["last/model.safetensors"], "cd34ab12": ["last"], "ef56ef56": []}.items():
        for name in ("", *content):
            place = tmp_path / f".last.{token}.old" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text("half") if "." in name else place.mkdir()
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_what_only_looks_like_ours_stays(tmp_path):
    """Whatever lies under such names is told by what is in it."""
    made(tmp_path / "last")
    for place in (".thesis.ab12cd34.old/thesis", ".last.ab12cd34.old/other", ".notes.partial/mine", ".x.ab12cd34.old"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "text").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert newest_checkpoint(tmp_path) == str(tmp_path / "last")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_discarded_checkpoint_does_not_come_back(tmp_path):
    made(tmp_path / "last")
    pending_place(tmp_path / "last").parent.mkdir()
    (tmp_path / "last").rename(pending_place(tmp_path / "last"))  # killed before its files are removed
    assert newest_checkpoint(tmp_path) is None and list(tmp_path.iterdir()) == []


def test_one_that_lies_aside_without_locks_is_still_found(tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_rmtkd.checkpoints.take_if_abandoned", lambda path: None)
    monkeypatch.setattr("optimum_rmtkd.checkpoints.SETTLES", 0.1)
    aside = tmp_path / ".last.ab12cd34.old" / "last"
    made(tmp_path / "last", of_loop=True)
    aside.parent.mkdir()
    (tmp_path / "last").rename(aside)
    assert newest_checkpoint(tmp_path) == str(aside)


def header(text):
    return len(text).to_bytes(8, "little") + text


DAMAGED = {
    "header a list": ("model.safetensors", header(b"[1]")),
    "tensor a list": ("model.safetensors", header(b'{"a": [1]}')),
    "tensor without offsets": ("model.safetensors", header(b'{"a": {}}')),
    "offsets empty": ("model.safetensors", header(b'{"a": {"data_offsets": []}}')),
    "offsets words": ("model.safetensors", header(b'{"a": {"data_offsets": ["x", "y"]}}')),
    "header deep": ("model.safetensors", header(b"[" * 100_000)),
    "state a list": ("rmtkd_state.json", b"[]"),
    "state without a version": ("rmtkd_state.json", b"{}"),
    "state deep": ("rmtkd_state.json", b"[" * 100_000),
    "manifest deep": (MANIFEST, b"[" * 100_000),
    "manifest of a list": (MANIFEST, b'{"step": 9, "files": [1]}'),
    "manifest a number": (MANIFEST, b"5"),
    "manifest of no state": (MANIFEST, b'{"step": 9, "files": {}}'),
    "size infinite": (MANIFEST, b'{"step": 9, "files": {"rmtkd_state.json": Infinity}}'),
    "step infinite": (MANIFEST, b'{"step": Infinity, "files": {"a": 1}}'),
    "step a list": (MANIFEST, b'{"step": [], "files": {"a": 1}}'),
    "a name that no file can have": (MANIFEST, json.dumps({"files": {"x" * 5000: 1, STATE: 14}}).encode()),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_whatever_is_wrong_with_the_newest_the_one_before_is_found(tmp_path, case):
    name, content = DAMAGED[case]
    intact, newest = made(tmp_path / "checkpoint-5", step=5), fill(tmp_path / "checkpoint-9")
    (newest / name).write_bytes(content)
    assert newest_whole(tmp_path).newest == intact
    assert newest_checkpoint(tmp_path) == str(intact)
    assert "\n" not in fault_of(newest) and len(fault_of(newest)) < 500
    tidy(tmp_path)


@pytest.mark.parametrize("of_loop", [True, False])
def test_zeros_in_the_place_of_an_optimizer_are_seen(tmp_path, of_loop):
    """A full disk, or a file system after a crash, leaves a file of the right size."""
    whole = made(tmp_path / "checkpoint-1", of_loop=of_loop)
    names = ("optimizer.bin", "random_states_0.pkl") if of_loop else ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    for name in names:
        content = (whole / name).read_bytes()
        (whole / name).write_bytes(bytes(len(content)))
        assert f"{name} cannot be read" in fault_of(whole)
        (whole / name).write_bytes(content)
    assert fault_of(whole) is None


def test_discarding_leaves_nothing(tmp_path):
    discard(made(tmp_path / "checkpoint-5"))
    assert list(tmp_path.iterdir()) == []


def test_wholeness_is_cheap(tmp_path):
    """Sizes and headers are read, no tensors."""
    big = tmp_path / "checkpoint-1"
    lock = begin(big)
    fill(pending_place(big))
    save_file({"a": torch.zeros(50_000_000)}, pending_place(big) / "model.safetensors")
    put_in_place(big, 1)
    let_go(lock)
    begun = time.perf_counter()
    assert fault_of(big) is None
    assert time.perf_counter() - begun < 0.5
