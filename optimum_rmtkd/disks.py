"""Disks that are full: said by name, before the writing where that can be known, and in place of what a writer says
of it."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DiskFullError


__all__ = ["check_room", "full_disk_named", "readable"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TOLD = ("No space left", "Disk quota exceeded", "File too large", "os error 28", "os error 122", "os error 27")
TORCH = ("PytorchStreamWriter failed", "inline_container", "unexpected pos")  # its archive writer names no cause
SPARE = 1 << 20  # bytes left free: a file system gives away less than it says


def check_room(folder: str | Path, wanted: int, what: str) -> None:
    """Refuse to begin what the disk of `folder` cannot hold.

    Args:
        wanted: bytes, at least.
        what: is to be written, for the message.

    Raises:
        DiskFullError: fewer are free.
    """
    free = _free(folder)
    if wanted and wanted + SPARE > free:
        raise DiskFullError(
            f"No room for {what}: it takes at least {readable(wanted)}, and {disk_of(folder)} has {readable(free)} "
            "free. Nothing was written. Free some, or choose a folder on another disk."
        )


@contextmanager
def full_disk_named(folder: str | Path, what: str) -> Iterator[None]:
    """What fails in this block because a disk is full says which, of what is written below `folder`.

    Raises:
        DiskFullError: in place of the writer's error.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError, _safetensors_error(), *_sharded_writing_error()) as found:
        error = found.__cause__ if isinstance(found, DiskFullError) else found  # the outermost block says what it is
        cause = _full_in(error)
        if cause is None:
            raise
        file = getattr(cause, "filename", None)
        folder = file or folder
        raise DiskFullError(
            f"{what} could not be written to the end{f', at {file}' if file else ''}: {disk_of(folder)} has "
            f"{readable(_free(folder))} free, or a limit on the size of files is reached ({_words(cause)}). What was "
            "begun is removed, what was there before is as it was. Free some, or choose a folder on another disk."
        ) from error


def disk_of(folder: str | Path) -> str:
    """In words: the mount point, and the folder on it."""
    place = mount = _existing(folder)
    while not os.path.ismount(mount) and mount != mount.parent:
        mount = mount.parent
    return f"the disk mounted at {mount} ({place})"


def readable(size: int) -> str:
    """Bytes, as people read them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def _full_in(error: BaseException | None) -> BaseException | None:
    """What says that a disk is full: the error, one that led to it, or one that any process had while all of them
    wrote shards; None where nothing does."""
    if error is None or _is_full(error):
        return error
    of_processes = (failure[0] for failure in getattr(error, "failures", {}).values())
    return next(filter(None, map(_full_in, (error.__cause__, *of_processes))), None)


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    if hasattr(error, "failures"):  # its text is that of all errors below it
        return False
    text = str(error)
    if isinstance(error, RuntimeError) and any(words in text for words in TORCH):
        return True
    return any(words in text for words in TOLD)


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _free(folder: str | Path) -> int:
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: str | Path) -> Path:
    place = Path(os.path.realpath(folder))
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def _safetensors_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError


def _sharded_writing_error() -> tuple[type[BaseException], ...]:
    """What `torch.distributed.checkpoint` raises in all processes where one fails; no `Exception`. Nothing raises it
    that has not loaded it."""
    api = sys.modules.get("torch.distributed.checkpoint.api")
    return () if api is None else (api.CheckpointException,)
