"""What a run that was killed left beside its output: recognised by its name, and by the lock that nobody holds."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from .locks import let_go, take_if_abandoned


__all__ = ["abandoned", "beside", "remove", "remove_abandoned"]

logger = logging.getLogger(__name__)

KEPT = 64  # characters of a name that the name of what lies beside begins with
TOKEN = "[a-z0-9_]{4,16}"


def beside(name: str, token: str, ending: str) -> str:
    """Name of what is written for `name`, hidden, beside it."""
    return f".{name[:KEPT]}.{token}.{ending}"


def abandoned(parent: Path, name: str, ending: str) -> Iterator[Path]:
    """What lies beside `name` under such a name, whose writer is gone. It is locked while it is yielded."""
    fitting = re.compile(rf"\.{re.escape(name[:KEPT])}\.{TOKEN}\.{ending}")
    try:
        found = sorted(entry.name for entry in os.scandir(parent) if fitting.fullmatch(entry.name))
    except OSError:  # nothing can lie there, or nobody may look
        return
    for path in (parent / found_name for found_name in found):
        lock = None if path.is_symlink() else take_if_abandoned(path)
        if lock is None:
            continue
        try:
            yield path
        finally:
            let_go(lock)


def remove_abandoned(parent: Path, name: str, ending: str = "partial") -> None:
    """Remove it, with a line for each."""
    for path in abandoned(parent, name, ending):
        remove(path)


def remove(path: Path) -> None:
    """Remove what a run that was killed left at `path`, and say so."""
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        logger.warning("%s is left of a run that was killed, and cannot be removed (%s).", path, error)
    else:
        logger.warning("Removed %s, which a run that was killed had begun to write.", path)
