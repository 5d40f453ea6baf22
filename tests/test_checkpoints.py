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
    begin,
    check_whole,
    discard,
    fault_of,
    newest_whole,
    pending_place,
    put_in_place,
    tidy,
)
from optimum_rmtkd.errors import IncompleteCheckpointError, RMTKDError
from optimum_rmtkd.locks import let_go


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
