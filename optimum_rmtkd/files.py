"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import RMTKDError


__all__ = ["write_text"]


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text beside `path`, then rename: a reader never meets half a file.

    Raises:
        RMTKDError: the place cannot be written to; what was there is left as it was.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(text, encoding="utf8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RMTKDError(
            f"Cannot write {path} ({error.strerror}): choose a file in a folder that can be written to."
        ) from error
