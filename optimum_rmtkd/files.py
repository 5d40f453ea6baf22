"""Files that appear whole or not at all, and never in the place of a file that somebody else wrote.

What a command writes to a name that the user chose carries a line with the digest of all the rest. A file with such a
line, unchanged since, is ours and may be replaced; every other one stays.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .disks import full_disk_named
from .errors import RMTKDError
from .leftovers import beside, remove_abandoned
from .locks import hold, let_go


__all__ = [
    "PICTURE",
    "UNSIGNED",
    "check_replaceable",
    "check_writable",
    "is_ours",
    "picture_metadata",
    "read_text",
    "sign",
    "write_signed",
    "write_text",
    "write_whole",
]

MARK = "optimum-rmtkd sha256:"
UNSIGNED = MARK + 64 * "0"
"""What a text has to hold once, wherever its format has room for it, to be signed."""
PICTURE = "optimum-rmtkd picture"  # pictures are not edited by hand, and have no room for a digest of themselves
PICTURE_FIELDS = {".png": "Software", ".svg": "Creator", ".pdf": "Creator", ".ps": "Creator", ".eps": "Creator"}
_SIGNATURE = re.compile(re.escape(MARK).encode() + rb"([0-9a-f]{64})")


def write_text(path: str | Path, text: str) -> None:
    """`write_whole` of UTF-8 text."""
    write_whole(path, lambda beside: beside.write_bytes(text.encode("utf8")))


def write_whole(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, under a name that nobody has, then rename it: a reader never meets half a
    file. Where `path` is a link, the file that it names is written.

    Raises:
        RMTKDError: the place cannot be written to; what was there is left as it was.
    """
    path = Path(os.path.realpath(path))
    remove_abandoned(path.parent, path.name)
    new, lock = None, None
    try:
        new, lock = _new_file(path)
        with full_disk_named(path, f"{path}"):
            write(new)
        os.replace(new, path)
    except OSError as error:
        raise RMTKDError(
            f"Cannot write {path} ({error.strerror}): choose a file in a folder that can be written to."
        ) from error
    finally:
        if new is not None:
            new.unlink(missing_ok=True)  # nothing is left there where all went well
        let_go(lock)


def _new_file(path: Path) -> tuple[Path, int | None]:
    """An empty file beside `path`, and its lock."""
    while True:
        new = path.with_name(beside(path.name, secrets.token_hex(4), "partial"))
        with new.open("xb"):
            pass
        try:
            return new, hold(new)
        except FileNotFoundError:
            continue  # somebody took it for abandoned


def read_text(path: str | Path) -> str:
    """UTF-8 text of a file.

    Raises:
        RMTKDError: it cannot be read, or is no UTF-8 text.
    """
    try:
        return Path(path).read_text(encoding="utf8")
    except OSError as error:
        raise RMTKDError(f"Cannot read {path} ({error.strerror}): expected a text file.") from error
    except UnicodeDecodeError as error:
        raise RMTKDError(f"{path} is no UTF-8 text ({error}): write it anew, or save it as UTF-8.") from error


def sign(text: str) -> str:
    """`text` with the digest of itself in the place of `UNSIGNED`, which it holds once; signed text as it is."""
    return text.replace(UNSIGNED, MARK + hashlib.sha256(text.encode("utf8")).hexdigest())


def is_ours(path: str | Path) -> bool:
    """Whether the file is as `write_signed` or a plot left it."""
    data = Path(path).read_bytes()
    found = _SIGNATURE.findall(data)
    if not found:
        return Path(path).suffix.lower() in PICTURE_FIELDS and PICTURE.encode() in data
    digest = hashlib.sha256(_SIGNATURE.sub(UNSIGNED.encode(), data)).hexdigest()
    return len(found) == 1 and found[0] == digest.encode()


def write_signed(path: str | Path, text: str) -> None:
    """`write_text` of the signed `text`, where nothing lies or what lies there is ours.

    Raises:
        RMTKDError: as `write_text` and `check_replaceable`.
    """
    check_replaceable(path)
    write_text(path, sign(text))


def check_replaceable(path: str | Path) -> None:
    """Refuse the place of a file that we did not write, or that was changed since.

    Raises:
        RMTKDError: `path` is a folder or somebody else's file.
    """
    path = Path(path)
    if path.is_dir():
        raise RMTKDError(f"Cannot write {path}: it is a folder; expected the name of a file.")
    try:
        if not path.exists() or (path.is_file() and is_ours(path)):
            return
    except OSError as error:
        raise RMTKDError(f"Cannot write {path}: what lies there cannot be read ({error.strerror}).") from error
    raise RMTKDError(
        f"{path} exists, and is not as this command would have left it: it is not replaced. Choose another name, or "
        "move it away."
    )


def picture_metadata(path: str | Path) -> dict[str, str] | None:
    """`metadata` of matplotlib's `savefig` that makes the picture recognisable; None where its format has none."""
    name = PICTURE_FIELDS.get(Path(path).suffix.lower())
    return {name: PICTURE} if name else None


def check_writable(folder: str | Path) -> None:
    """Try whether files can be written in `folder`, or where it would be made; nothing is left there.

    Raises:
        RMTKDError: they cannot, or a file is in the way.
    """
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise RMTKDError(f"Cannot write to {folder}: {place} is a file; expected a folder.")
    try:  # permissions alone do not tell: the file system may be read-only, root may write everywhere
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise RMTKDError(
            f"Cannot write to {folder} ({error.strerror}): choose a folder that can be written to."
        ) from error
