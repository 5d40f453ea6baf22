"""Disks that are full."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple

import pytest
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from optimum_rmtkd.disks import check_room, full_disk_named, readable
from optimum_rmtkd.errors import DiskFullError


Usage = namedtuple("Usage", "total used free")


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**10, 10**10, 3_000_000))
    check_room(tmp_path / "not" / "there", 1_000_000, "checkpoint-5")
    with pytest.raises(
        DiskFullError, match=r"checkpoint-5: it takes at least 5.0 MB, and the disk mounted at .* 3.0 MB"
    ):
        check_room(tmp_path, 5_000_000, "checkpoint-5")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/data/run/optimizer.pt"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 151360 vs 151252"),
        RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_what_a_writer_says_of_a_full_disk_is_said_plainly(tmp_path, error):
    with pytest.raises(
        DiskFullError, match="checkpoint-5 could not be written.*the disk mounted at /.*free"
    ) as caught:
        with full_disk_named(tmp_path, "checkpoint-5"):
            raise error
    assert caught.value.__cause__ is error
    assert getattr(error, "filename", None) is None or "/data/run/optimizer.pt" in str(caught.value)


def sharded(error):
    """What torch makes of an error that process 1 had while all wrote their shards."""
    return CheckpointException("write", {1: (error, None)})


def led_to(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "cause",
    [
        OSError(errno.ENOSPC, "No space left on device", "/data/run/__1_0.distcp"),
        led_to(RuntimeError("the writer failed"), OSError(errno.EDQUOT, "Disk quota exceeded")),
        RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
    ],
)
def test_a_disk_that_is_full_for_one_of_several_writers_of_shards_is_said_by_all(tmp_path, cause):
    error = sharded(cause)
    with pytest.raises(DiskFullError, match="^checkpoint-5 could not be written.*the disk mounted at /") as caught:
        with full_disk_named(tmp_path, "checkpoint-5"):
            raise error
    assert caught.value.__cause__ is error and "Traceback" not in str(caught.value)
    assert getattr(cause, "filename", None) is None or "/data/run/__1_0.distcp" in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        sharded(KeyError("x")),
        OSError(errno.EACCES, "no"),
        RuntimeError("shape mismatch"),
        ValueError("no"),
        KeyError("x"),
    ],
)
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught:
        with full_disk_named(tmp_path, "checkpoint-5"):
            raise error
    assert caught.value is error


def test_the_outermost_block_says_what_could_not_be_written(tmp_path):
    with pytest.raises(DiskFullError, match="^checkpoint-5 could not be written to the end, at /data/a: ") as caught:
        with full_disk_named(tmp_path, "checkpoint-5"), full_disk_named(tmp_path, "one of its files"):
            raise OSError(errno.ENOSPC, "No space left on device", "/data/a")
    assert isinstance(caught.value.__cause__, OSError) or caught.value.__cause__.__cause__ is not None
    with pytest.raises(DiskFullError, match="^No room for all"), full_disk_named(tmp_path, "checkpoint-5"):
        check_room(tmp_path, 10**18, "all")


def test_sizes_for_people():
    assert [readable(n) for n in (12, 1200, 5_000_000, 2_340_000_000)] == ["12 bytes", "1.2 kB", "5.0 MB", "2.3 GB"]
