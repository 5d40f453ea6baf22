from __future__ import annotations

import os
import stat

import pytest

from optimum_rmtkd.commands.output import comparison, format_table, weight_bytes, writing_beside
from optimum_rmtkd.errors import RMTKDError


def test_folder_appears_only_at_the_end(tmp_path):
    target = tmp_path / "deep" / "out"
    with writing_beside(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
        assert folder.parent == target.parent  # the rename must not cross file systems
    assert [p.name for p in target.iterdir()] == ["a"]
    assert [p.name for p in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_a_failure(tmp_path, error):
    with pytest.raises(error):
        with writing_beside(tmp_path / "out") as folder:
            (folder / "a").write_text("1")
            raise error
    assert list(tmp_path.iterdir()) == []


def test_folder_has_the_mode_of_any_new_folder(tmp_path):
    (tmp_path / "plain").mkdir()
    with writing_beside(tmp_path / "out"):
        pass
    assert stat.S_IMODE(os.stat(tmp_path / "out").st_mode) == stat.S_IMODE(os.stat(tmp_path / "plain").st_mode)


def test_files_can_be_read_by_whoever_may_enter_the_folder(tmp_path):
    (tmp_path / "plain").write_text("")
    with writing_beside(tmp_path / "out") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "weights").write_text("1")
        (folder / "deep" / "weights").chmod(0o600)
    found = os.stat(tmp_path / "out" / "deep" / "weights").st_mode
    assert stat.S_IMODE(found) == stat.S_IMODE(os.stat(tmp_path / "plain").st_mode)


def filled(folder):
    folder.mkdir()
    (folder / "old").write_text("old")
    return folder


def test_filled_folder_is_refused_at_once(tmp_path):
    target = filled(tmp_path / "out")
    with pytest.raises(RMTKDError, match="--overwrite"):
        with writing_beside(target):
            pytest.fail("the block must not run")
    assert [p.name for p in target.iterdir()] == ["old"]


def test_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with writing_beside(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert (tmp_path / "out" / "a").exists()


def test_overwrite_replaces_everything(tmp_path):
    target = filled(tmp_path / "out")
    with writing_beside(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_keeps_the_old_folder_when_the_block_fails(tmp_path):
    target = filled(tmp_path / "out")
    with pytest.raises(RuntimeError):
        with writing_beside(target, overwrite=True):
            raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["old"]


def test_folder_filled_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(RMTKDError, match="not empty"):
        with writing_beside(tmp_path / "out"):
            filled(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["old"]


@pytest.mark.parametrize("place", ["file", "file/out"])
def test_a_file_in_the_way(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(RMTKDError, match="not a folder|Cannot write"):
        with writing_beside(tmp_path / place):
            pytest.fail("the block must not run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_parent_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RMTKDError, match="Cannot write"):
        with writing_beside(tmp_path / "out"):
            pytest.fail("the block must not run")


def test_weight_bytes_prefers_safetensors(tmp_path):
    assert weight_bytes(tmp_path) == 0
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 7)
    assert weight_bytes(tmp_path) == 7
    (tmp_path / "model-1.safetensors").write_bytes(b"x" * 3)
    (tmp_path / "model-2.safetensors").write_bytes(b"x" * 2)
    assert weight_bytes(tmp_path) == 5


def test_comparison_and_table():
    rows = comparison(parameters=(1000, 200), size=(4000, 1000), metric="accuracy", values=(0.9, 0.895))
    assert rows == [
        ("parameters", "1,000", "200", "-80.0 %"),
        ("bytes on disk", "4,000", "1,000", "-75.0 %"),
        ("accuracy", "90.00 %", "89.50 %", "-0.50 points"),
    ]
    lines = format_table(("", "before", "after", "change"), rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == ["parameters", "1,000", "200", "-80.0", "%"]


def test_comparison_of_a_correlation_and_of_nothing():
    assert comparison((2, 1), (0, 1), "pearson", (0.5, 0.75))[1:] == [
        ("bytes on disk", "0", "1", "-"),
        ("pearson", "0.5000", "0.7500", "+0.2500"),
    ]
    assert len(comparison((2, 1), (2, 1), "accuracy", (None, None))) == 2
