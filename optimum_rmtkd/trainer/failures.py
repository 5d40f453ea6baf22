"""What ends one process is told to the others: what they see of it themselves is a closed connection."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from ..errors import RMTKDError
from ..surgery.processes import several


__all__ = ["NoticeBoard"]

logger = logging.getLogger(__name__)

PATIENCE = datetime.timedelta(seconds=10)  # with a store that does not answer
LONGEST = 1000  # characters of a notice
GRACE = 2.0  # seconds in which the others hear of a failure, before their connections are broken
POLL = 0.01, 0.2  # seconds between two looks, at first and at last
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
WELL = "well"

_numbers = itertools.count()  # every process makes its boards in the same order


class NoticeBoard:
    """Where a process says why it ends, and the others read it once they have lost it.

    The notice is written to the store that the processes met at, before the error leaves, and read only where a
    collective operation has failed, or at the end of what is done `together`. A process that is killed leaves none.

    Args:
        accelerator: of this process; with one process, or without a process group, nothing is done.
        store: to write to; None: that of the default process group.
    """

    def __init__(self, accelerator: Any, store: dist.Store | None = None):
        self.rank, self._store, number = 0, None, next(_numbers)
        self.processes, self._parts, self._kept = accelerator.num_processes, itertools.count(), store
        if store is None and several(accelerator) and dist.is_initialized():
            store = self._kept = _default_store()  # kept: it may be the one that serves all
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
            raise _of_another(told) from error

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block in which each process does its part of one thing, collective operations included. All of them
        leave it well, or none does: one that fails tells the others and waits for none; those that are done wait for
        the word of all; those that wait for it in a collective operation have their connections broken.

        Raises:
            RMTKDError: another process failed; names it and its error. A process's own error is raised as it is,
                unless it is what the other's led to.
        """
        number = next(self._parts)
        if self._store is None:
            yield
            return
        try:
            yield
        except BaseException as error:
            told, lost = self._failure_of(number), _is_cut_off(error)
            self._say(number, _words_of(self.rank, error))
            if not lost:
                self._let_hear(number)
            if told and isinstance(error, Exception) and (lost or not isinstance(error, RMTKDError)):
                raise _of_another(told) from error
            raise
        self._say(number, WELL)
        if told := self._word_of_all(number):
            raise _of_another(told)

    def _say(self, number: int, word: str) -> None:
        """How this process left that block."""
        with contextlib.suppress(RuntimeError):  # see `_write`
            if word != WELL:
                self._store.compare_set(f"{number}/{FIRST}", "", word)
            self._store.set(f"{number}/{self.rank}", word)

    def _failure_of(self, number: int) -> str | None:
        """What the first process to fail in that block said; None where none has."""
        return self._read(f"{number}/{FIRST}")

    def _word_of_all(self, number: int) -> str | None:
        """Wait until all have left that block, or one has failed in it: what that one said."""
        keys = [f"{number}/{rank}" for rank in range(self.processes)]
        for _ in _moments(_patience()):
            told = self._failure_of(number)
            if told is not None:
                return told
            if self._store.check(keys):
                return None
        missing = [str(rank) for rank in range(self.processes) if not self._store.check([f"{number}/{rank}"])]
        return f"process {', '.join(missing)} did not come to the end of it in {_patience():.0f} s"

    def _let_hear(self, number: int) -> None:
        """Give the others the time to hear that this process failed in that block: this one may serve the store."""
        keys = [f"{number}/{rank}" for rank in range(self.processes)]
        with contextlib.suppress(RuntimeError):
            if any(self._store.check(keys) for _ in _moments(GRACE)):
                return
            # somebody waits for us in a collective operation, perhaps for ever
            _break_connections()
            any(self._store.check(keys) for _ in _moments(GRACE))

    def _write(self, error: BaseException) -> None:
        if self._store is None:
            return
        with contextlib.suppress(RuntimeError):  # the store is gone with its process; our own error is raised anyway
            self._store.compare_set(FIRST, "", _words_of(self.rank, error))

    def _read(self, key: str = FIRST) -> str | None:
        with contextlib.suppress(RuntimeError):
            if self._store.check([key]):
                return self._store.get(key).decode("utf8", "replace")
        return None


def _default_store() -> dist.Store | None:
    """Where the processes met. Torch gives it out under a private name alone: a version without it has no board, and a
    process that loses another one sees a closed connection."""
    get = getattr(dist.distributed_c10d, "_get_default_store", None)
    if get is None:
        logger.warning(
            "This version of torch (%s) does not give out the store of its processes: a process that loses another "
            "one cannot say why.",
            torch.__version__,
        )
    return None if get is None else get()


def _break_connections() -> None:
    """Of all process groups, by torch's private way; where a version has none, of the default group, by the public
    one; where it cannot either, the others wait until this process is gone, or for as long as the group allows."""
    default = dist.group.WORLD
    ways = getattr(dist.distributed_c10d, "_abort_process_group", None), getattr(default, "abort", None)
    abort = next((way for way in ways if way is not None), None)
    if abort is None:
        logger.warning(
            "This version of torch (%s) cannot break off a collective operation: the other processes may wait in one "
            "until this one has ended, or for %.0f s.",
            torch.__version__,
            _patience(),
        )
    else:
        abort()


def _words_of(rank: int, error: BaseException) -> str:
    return f"process {rank}: {type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST]


def _of_another(told: str) -> RMTKDError:
    return RMTKDError(f"Another process failed, so all stop. {told}")


def _patience() -> float:
    """Seconds that a process waits for the others: as long as in a collective operation."""
    return dist.distributed_c10d.default_pg_timeout.total_seconds()


def _moments(limit: float) -> Iterator[float]:
    """Seconds passed, at moments that get rarer, until `limit`."""
    begun, pause = time.monotonic(), POLL[0]
    while (passed := time.monotonic() - begun) < limit:
        yield passed
        time.sleep(pause)
        pause = min(1.2 * pause, POLL[1])


def _is_cut_off(error: BaseException | None) -> bool:
    """Whether a collective operation failed, or led to the error."""
    while error is not None:
        words = str(error).lower() if isinstance(error, RuntimeError) else ""
        if isinstance(error, dist.DistError) or any(word in words for word in CUT_OFF):
            return True
        error = error.__cause__ or error.__context__
    return False
