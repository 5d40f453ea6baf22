"""Whether whoever writes a file or a folder is still at it.

The writer holds a lock on what it writes. The kernel lets go of it when the process ends, whatever ended it, so that
nobody has to trust the number of a process that may be another one by now, in this container or the next.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows has none: nothing is ever taken for abandoned there
    fcntl = None


__all__ = ["hold", "held", "let_go", "take_if_abandoned"]


def hold(path: Path) -> int | None:
    """Lock an existing file or folder until `let_go`; a folder stays locked under a new name. None where the file
    system knows no locks.

    Raises:
        FileNotFoundError: it is gone, or another one has taken its place: somebody took it for abandoned before it was
            locked. Make a new one.
        BlockingIOError: somebody else holds it.
    """
    place = _opened(path)
    if place is None:
        return None
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(place), os.stat(path)):
            raise FileNotFoundError(path)
    except (BlockingIOError, FileNotFoundError):
        os.close(place)
        raise
    except OSError:  # NFS without locks and the like
        os.close(place)
        return None
    return place


def let_go(place: int | None) -> None:
    """Unlock what `hold` or `take_if_abandoned` returned."""
    if place is not None:
        os.close(place)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """`hold` within a block."""
    place = hold(path)
    try:
        yield
    finally:
        let_go(place)


def take_if_abandoned(path: Path) -> int | None:
    """The lock of what nobody writes any more, so that it can be removed; None where somebody still does, or where
    that cannot be known."""
    try:
        return hold(path)
    except OSError:  # held, gone by now, or somebody else's
        return None


def _opened(path: Path) -> int | None:
    return None if fcntl is None else os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
