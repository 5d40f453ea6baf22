from __future__ import annotations

import os
import stat

import pytest

from optimum_rmtkd.commands.output import comparison, format_table, weight_bytes, writing_beside
from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.folders import write_record


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_folder_appears_only_at_the_end(tmp_path):
    target = tmp_path / "deep" / "out"
    with writing_beside(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
        assert folder.parent == target.parent  # the rename must not cross file systems
    assert names(target) == ["a", "rmtkd_files.json"]
    assert names(target.parent) == ["out"]


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


def written(folder, name="old"):
    """As an earlier run left it."""
    with writing_beside(folder) as beside:
        (beside / name).write_text(name)
    return folder


def test_overwrite_replaces_what_an_earlier_run_wrote(tmp_path, capsys):
    target = written(tmp_path / "out")
    (target / "mine").write_text("mine")
    with writing_beside(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert names(target) == ["mine", "new", "rmtkd_files.json"] and (target / "mine").read_text() == "mine"
    assert names(tmp_path) == ["out"]
    assert f"1 files that an earlier run wrote into {target} will be replaced; mine stays" in capsys.readouterr().out


def test_overwrite_does_not_touch_a_folder_without_a_record(tmp_path):
    target = filled(tmp_path / "out")
    with pytest.raises(RMTKDError, match="holds old, and no rmtkd_files.json"):
        with writing_beside(target, overwrite=True):
            pytest.fail("the block must not run")
    assert names(target) == ["old"] and names(tmp_path) == ["out"]


def test_overwrite_does_not_touch_what_was_changed(tmp_path):
    target = written(tmp_path / "out")
    (target / "old").write_text("edited")
    with pytest.raises(RMTKDError, match="old in .* changed since an earlier run wrote it"):
        with writing_beside(target, overwrite=True):
            pytest.fail("the block must not run")
    assert (target / "old").read_text() == "edited"


def test_overwrite_keeps_the_old_folder_when_the_block_fails(tmp_path):
    target = written(tmp_path / "out")
    with pytest.raises(RuntimeError):
        with writing_beside(target, overwrite=True):
            raise RuntimeError
    assert names(target) == ["old", "rmtkd_files.json"] and names(tmp_path) == ["out"]


def test_what_cannot_be_put_in_place_in_the_end_is_kept(tmp_path):
    target = written(tmp_path / "out")
    (tmp_path / "out.new1").mkdir()
    with pytest.raises(RMTKDError, match="new in .* would be replaced.*is kept in .*out.new2"):
        with writing_beside(target, overwrite=True) as folder:
            (folder / "new").write_text("new")
            (target / "new").write_text("mine")
    assert (target / "new").read_text() == "mine" and (target / "old").read_text() == "old"
    assert (tmp_path / "out.new2" / "new").read_text() == "new" and names(tmp_path) == ["out", "out.new1", "out.new2"]


def test_the_record_belongs_to_the_folder_that_moves(tmp_path):
    written(tmp_path / "out").rename(tmp_path / "moved")
    with writing_beside(tmp_path / "moved", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path / "moved") == ["new", "rmtkd_files.json"]


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A home with a project in it, which is the working directory and holds model, data and checkpoints."""
    project = tmp_path / "home" / "project"
    for name in ("model", "images/cat", "runs/checkpoint-1", "tables"):
        (project / name).mkdir(parents=True)
        (project / name / "file").write_text(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(project)
    (tmp_path / "link").symlink_to(project)
    (project / "model_link").symlink_to(project / "model")
    return project


INPUTS = [
    ("the model", "model"),
    ("the data", "images"),
    ("the data", "tables/file"),
    ("the data", None),
    ("the model", "org/name"),
    ("--checkpoints", "runs"),
    ("--checkpoints", "later"),
]


@pytest.mark.parametrize(
    "place",
    [
        ".",
        "",
        "./",
        "..",
        "../..",
        "/",
        "../project",
        "../../link",
        "model/..",
        "model",
        "model/",
        "./model/../model",
        "model/inside",
        "model_link",
        "model_link/inside",
        "../../link/model",
        "images",
        "images/cat",
        "images/cat/new",
        "tables",
        "tables/file",
        "runs",
        "runs/new",
        "runs/checkpoint-1",
        "later",
        "later/out",
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_output_apart_from_what_is_read_and_kept(room, place, overwrite):
    before = sorted(room.parent.parent.rglob("*"))
    with pytest.raises(RMTKDError, match="is or contains|is, contains or lies in|not a folder"):
        with writing_beside(place, overwrite, INPUTS):
            pytest.fail("the block must not run")
    assert sorted(room.parent.parent.rglob("*")) == before


def test_a_record_does_not_open_what_must_stay_apart(room):
    write_record(room)
    write_record(room / "model")
    for place in (".", "model"):
        with pytest.raises(RMTKDError, match="is or contains|is, contains or lies in"):
            with writing_beside(place, True, INPUTS):
                pytest.fail("the block must not run")


@pytest.mark.parametrize("place", ["out", "./deep/er/out", "tables/out", "../beside", "modeling", "model/../out"])
def test_ordinary_places_are_taken(room, place):
    with writing_beside(place, False, INPUTS) as folder:
        (folder / "a").write_text("1")
    assert (room / place / "a").read_text() == "1"


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    written(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with writing_beside(tmp_path / "link", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "real") == ["new", "rmtkd_files.json"]


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(RMTKDError):
        with writing_beside(tmp_path / "loop", overwrite=True):
            pytest.fail("the block must not run")
    assert (tmp_path / "loop").is_symlink()


def test_a_place_where_nothing_can_be_written():
    with pytest.raises(RMTKDError, match="Cannot write"):
        with writing_beside("/proc/out"):
            pytest.fail("the block must not run")


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
