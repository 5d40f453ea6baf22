"""Folders with a record: ours is replaced, everything else stays, whenever it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from optimum_rmtkd import RMTKDError
from optimum_rmtkd.folders import (
    RECORD,
    Contents,
    add_to_record,
    put,
    recover,
    remove_recorded,
    survey,
    write_record,
    writing_into,
)


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Text of every file below `folder`, but for its record."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


OLD = {"config.json": "old", "weights": "old", "figures/a.png": "old", "figures/gone.png": "old", "deep/er/x": "old"}
NEW = {"config.json": "new", "weights": "new", "figures/a.png": "new", "new/b": "new"}
FOREIGN = {"notes.txt": "mine", "figures/mine.png": "mine", "deep/mine/x": "mine", ".hidden": "mine"}


@pytest.fixture
def pair(tmp_path):
    """(new folder, old folder with somebody's files in it), both with a record."""
    target, beside = fill(tmp_path / "out", OLD), fill(tmp_path / "beside", NEW)
    write_record(target)
    write_record(beside)
    return beside, fill(target, FOREIGN)


def test_survey_tells_whose_a_file_is(pair):
    _, target = pair
    assert survey(target) == Contents(tuple(sorted(OLD)), (), tuple(sorted(FOREIGN)))
    (target / "weights").write_text("changed")
    (target / "config.json").unlink()
    found = survey(target)
    assert found.changed == ("weights",) and "config.json" not in found.own and "weights" not in found.own
    assert found.missing == ("config.json",)
    assert survey(target / "figures") is None


def test_only_files_of_the_record_are_replaced(pair, tmp_path):
    beside, target = pair
    (target / "empty").mkdir()
    was = put(beside, target)
    assert contents(target) == NEW | FOREIGN
    assert set(was.own) == set(OLD) and set(was.foreign) == set(FOREIGN)
    assert survey(target) == Contents(tuple(sorted(NEW)), (), tuple(sorted(FOREIGN)))
    assert (target / "empty").is_dir() and not (target / "deep" / "er").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "beside"}


@pytest.mark.parametrize(
    "there",
    [
        {"new/b": "mine"},  # a file of the same name
        {"new": "mine"},  # a file where a folder is needed
        {"new/b/c": "mine"},  # a folder where a file is needed
    ],
)
def test_what_is_in_the_way_of_a_new_file_stays(pair, there, tmp_path):
    beside, target = pair
    fill(target, there)
    with pytest.raises(RMTKDError, match="new/b in .*out would be replaced"):
        put(beside, target)
    assert contents(target) == OLD | FOREIGN | there and contents(beside) == NEW
    assert {path.name for path in tmp_path.iterdir()} == {"out", "beside"}


def test_a_changed_file_of_ours_is_in_the_way(pair):
    beside, target = pair
    (target / "weights").write_text("changed by hand")
    with pytest.raises(RMTKDError, match="weights in .* would be replaced"):
        put(beside, target)
    assert contents(target) == OLD | FOREIGN | {"weights": "changed by hand"}


def test_what_lies_behind_a_link_is_not_ours(pair, tmp_path):
    beside, target = pair
    os.rename(target / "figures", tmp_path / "elsewhere")
    (target / "figures").symlink_to(tmp_path / "elsewhere")
    assert "figures/a.png" not in survey(target).own and "figures" in survey(target).foreign
    with pytest.raises(RMTKDError, match="figures/a.png"):
        put(beside, target)
    (target / "weights").unlink()
    (target / "weights").symlink_to(tmp_path / "elsewhere" / "a.png")  # the same content as the file that we wrote
    assert "weights" not in survey(target).own
    assert contents(tmp_path / "elsewhere") == {"a.png": "old", "gone.png": "old", "mine.png": "mine"}


def everything(root: Path) -> list[str]:
    return sorted(path.read_text() for path in root.rglob("*") if path.is_file() and path.name != RECORD)


MOVES = len(OLD) + 1 + len(NEW) + 1


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", range(MOVES))
def test_a_failure_puts_everything_back(pair, tmp_path, monkeypatch, at, error):
    beside, target = pair
    rename, calls = Path.rename, iter(range(10**6))

    def failing(self, place):
        if next(calls) == at:
            raise error
        return rename(self, place)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(type(error)):
        put(beside, target)
    assert contents(target) == OLD | FOREIGN and contents(beside) == NEW
    assert survey(target).own == tuple(sorted(OLD)) and survey(beside).own == tuple(sorted(NEW))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "beside"}


class Killed(BaseException):
    """Stands for a process that ends at once: nothing after it runs."""


def killed_while_putting(beside: Path, target: Path, at: int) -> bool:
    """SIGKILL at the `at`-th change of a name, in a fork of this process; False where there are fewer."""
    child = os.fork()
    if not child:
        seen = iter(range(1, at + 1))

        def heard(event, args):
            if event in ("os.rename", "os.remove", "os.rmdir") and next(seen, at) == at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(heard)
        put(beside, target)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_the_next_run_mends_what_a_kill_left_at_any_moment(tmp_path, caplog):
    """All of the old files, or all of the new ones; nobody else's is touched, and nothing is left beside."""
    ends = []
    for at in range(1, 100):
        place = tmp_path / str(at)
        target, beside = fill(place / "out", OLD), fill(place / ".out.ab12cd34.partial", NEW)
        write_record(target)
        write_record(beside)
        fill(target, FOREIGN)
        if not killed_while_putting(beside, target, at):
            break
        recover(target)
        found = contents(target)
        assert {name: found[name] for name in FOREIGN} == FOREIGN
        ends.append({name: text for name, text in found.items() if name not in FOREIGN})
        assert ends[-1] in (OLD, NEW)
        assert survey(target).missing == survey(target).changed == ()
        assert [path.name for path in place.iterdir()] == ["out"]
    assert len(ends) > 15 and ends[0] == OLD and ends[-1] == NEW
    assert "is as it was" in caplog.text and "is complete" in caplog.text


@pytest.mark.parametrize("at", range(MOVES))
def test_killed_at_any_moment_every_file_still_exists(pair, tmp_path, monkeypatch, at):
    beside, target = pair
    rename, calls = Path.rename, iter(range(10**6))

    def killed(self, place):
        if next(calls) >= at:
            raise Killed
        return rename(self, place)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(Killed):
        put(beside, target)
    monkeypatch.undo()
    assert everything(tmp_path) == sorted([*OLD.values(), *NEW.values(), *FOREIGN.values()])
    assert all((target / name).read_text() == text for name, text in FOREIGN.items())
    found = survey(target)
    assert found is None or not found.changed  # what lies there is what its record says


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"files": ["a"]}',
        '{"files": {"../outside": "0"}}',
        '{"files": {"/etc/passwd": "0"}}',
        '{"files": {"a/../../outside": "0"}}',
        '{"files": {"": "0"}}',
        '{"files": {"a": 1}}',
        "[" * 100_000,
        "\xff",
    ],
)
def test_a_damaged_record_is_refused(pair, tmp_path, text):
    beside, target = pair
    fill(tmp_path, {"outside": "mine"})
    (target / RECORD).write_bytes(text.encode("latin1"))
    with pytest.raises(RMTKDError, match="rmtkd_files.json"):
        survey(target)
    with pytest.raises(RMTKDError, match="rmtkd_files.json"):
        put(beside, target)
    assert contents(target) == OLD | FOREIGN and (tmp_path / "outside").read_text() == "mine"


def test_a_record_that_is_a_link_is_none(pair, tmp_path):
    _, target = pair
    os.rename(target / RECORD, tmp_path / "record")
    (target / RECORD).symlink_to(tmp_path / "record")
    assert survey(target) is None


def test_files_written_later_are_added(pair, tmp_path):
    _, target = pair
    fill(target, {"report.html": "ours", "weights": "ours, again"})
    (target / "linked").symlink_to(tmp_path / "beside" / "weights")
    add_to_record(target, ["report.html", "weights", "missing", "linked"])
    found = survey(target)
    assert {"report.html", "weights"} <= set(found.own) and found.changed == () and "linked" in found.foreign
    bare = fill(tmp_path / "bare", {"a": ""})
    add_to_record(bare, ["a"])
    assert not (bare / RECORD).exists()


def test_clearing_leaves_what_is_not_in_the_record(pair, tmp_path):
    _, target = pair
    (target / "weights").write_text("changed")
    remove_recorded(target)
    assert contents(target) == FOREIGN | {"weights": "changed"} and not (target / RECORD).exists()
    ours = fill(tmp_path / "ours", OLD)
    remove_recorded(ours)
    assert contents(ours) == OLD
    write_record(ours)
    remove_recorded(ours)
    assert not ours.exists()


def test_the_record_is_plain_json(pair):
    beside, _ = pair
    values = json.loads((beside / RECORD).read_text())
    assert set(values["files"]) == set(NEW) and all(len(digest) == 64 for digest in values["files"].values())


@pytest.mark.parametrize("at", range(1, 7))
@pytest.mark.parametrize("before", [{}, {"config.json": "old", "model-00001-of-00002.safetensors": "old"}])
def test_a_kill_while_a_folder_is_filled_loses_no_model(tmp_path, at, before):
    """The next run finds the old model, or brings the new one to its end; a half of one never counts."""
    folder, new = (
        tmp_path / "model",
        {"config.json": "new", "model.safetensors": "new", "1_Pooling/config.json": "new"},
    )
    if before:
        fill(folder, before)
    child = os.fork()
    if not child:
        count = [0]

        def counted(event, args):
            if event in ("os.rename", "os.remove") and str(folder.parent) in str(args[0]):
                count[0] += 1
                if count[0] == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(counted)
        with writing_into(folder) as beside:
            fill(beside, new)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with writing_into(folder) as beside:
        fill(beside, {"notes": "of the next run"})
    found = contents(folder)
    assert found.pop("notes") == "of the next run"
    assert found in (before, new) and (killed or found == new)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_is_filled_as_a_whole(tmp_path):
    """Stale shards of earlier weights go with them; what fails changes nothing."""
    folder = fill(
        tmp_path / "model", {"config.json": "old", "model-00001-of-00002.safetensors": "old", "mine": "mine"}
    )
    before = contents(folder)
    with pytest.raises(OSError), writing_into(folder) as beside:
        fill(beside, {"config.json": "new"})
        raise OSError
    assert contents(folder) == before
    with writing_into(folder) as beside:
        fill(beside, {"config.json": "new", "model.safetensors": "new", "1_Pooling/config.json": "new"})
        (beside / "2_Normalize").mkdir()
    assert contents(folder) == {
        "config.json": "new",
        "model.safetensors": "new",
        "1_Pooling/config.json": "new",
        "mine": "mine",
    }
    assert (folder / "2_Normalize").is_dir()
    with writing_into(tmp_path / "new" / "model") as beside:
        fill(beside, {"config.json": "new"})
    assert contents(tmp_path / "new") == {"model/config.json": "new"}
    with pytest.raises(OSError), writing_into(tmp_path / "other") as beside:
        raise OSError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new"]
