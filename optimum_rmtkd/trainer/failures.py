"""What ends one process is told to the others: what they see of it themselves is a closed connection."""

from __future__ import annotations

import contextlib
import datetime
import itertools
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from ..errors import RMTKDError
from ..surgery.processes import several


__all__ = ["NoticeBoard"]

PATIENCE = datetime.timedelta(seconds=10)  # with a store that does not answer
LONGEST = 1000  # characters of a notice
CUT_OFF = (
    "connection closed by peer",
    "connection reset",
    "broken pipe",
    "socket closed",
    "timed out",
    "gloo",
    "nccl",
)  # of torch's messages: gloo raises bare RuntimeErrors
FIRST = "first"

_numbers = itertools.count()  # every process makes its boards in the same order


class NoticeBoard:
    """Where a process says why it ends, and the others read it once they have lost it.

    Nothing is waited for: the notice is written to the store that the processes met at, before the error leaves, and
    read only where a collective operation has failed. A process that is killed leaves none.

    Args:
        accelerator: of this process; with one process, or without a process group, nothing is done.
        store: to write to; None: that of the default process group.
    """

    def __init__(self, accelerator: Any, store: dist.Store | None = None):
        self.rank, self._store, number = 0, None, next(_numbers)
        if store is None and several(accelerator) and dist.is_initialized():
            store = dist.distributed_c10d._get_default_store()
            if hasattr(store, "clone"):  # a connection of our own: its time limit is not that of others
                store = store.clone()
                store.set_timeout(PATIENCE)
        if store is not None:
            self.rank, self._store = accelerator.process_index, dist.PrefixStore(f"rmtkd/failures/{number}", store)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """What fails in this context is told to the others; a lost connection is explained by what they told.

        Raises:
            RMTKDError: in place of a collective operation's error, where another process has said why it ended.
        """
        try:
            yield
        except BaseException as error:  # an interrupt and an exit end a process as well
            asked = self._store is not None and isinstance(error, Exception)  # an interrupt is its own reason
            told = self._read() if asked and _is_cut_off(error) else None
            if told is None:
                self._write(error)
                raise
            raise RMTKDError(f"Another process failed, so all stop. {told}") from error

    def _write(self, error: BaseException) -> None:
        if self._store is None:
            return
        text = f"process {self.rank}: {type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST]
        with contextlib.suppress(RuntimeError):  # the store is gone with its process; our own error is raised anyway
            self._store.compare_set(FIRST, "", text)

    def _read(self) -> str | None:
        with contextlib.suppress(RuntimeError):
            if self._store.check([FIRST]):
                return self._store.get(FIRST).decode("utf8", "replace")
        return None


def _is_cut_off(error: BaseException | None) -> bool:
    """Whether a collective operation failed, or led to the error."""
    while error is not None:
        words = str(error).lower() if isinstance(error, RuntimeError) else ""
        if isinstance(error, dist.DistError) or any(word in words for word in CUT_OFF):
            return True
        error = error.__cause__ or error.__context__
    return False
