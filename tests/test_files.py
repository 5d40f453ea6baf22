"""Files appear whole or not at all."""

from __future__ import annotations

import pytest

from optimum_rmtkd import RMTKDError
from optimum_rmtkd.files import write_text, write_whole


def test_a_file_is_replaced_as_a_whole(tmp_path):
    write_text(tmp_path / "a.txt", "first")
    write_text(str(tmp_path / "a.txt"), "zwölf\n")
    assert (tmp_path / "a.txt").read_bytes() == "zwölf\n".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_failure_of_the_writer_leaves_the_old_file_alone(tmp_path):
    write_text(tmp_path / "a.txt", "first")

    def stop(beside):
        beside.write_bytes(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.txt", stop)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]


def test_where_nothing_can_be_written_nothing_is_left(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(RMTKDError, match="Cannot write .*folder"):
        write_text(tmp_path / "folder", "text")
    with pytest.raises(RMTKDError, match="No such file"):
        write_text(tmp_path / "missing" / "a.txt", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
