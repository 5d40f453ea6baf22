"""SIGTERM, which schedulers send some time before they kill: a run stops where it can go on from.

Only where nobody else listens: a handler of the user's own stays, and so does Python's in other threads than the main
one. A second SIGTERM ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


__all__ = ["EXIT_TERMINATED", "Terminated", "Termination", "terminable"]

EXIT_TERMINATED = 143  # 128 + SIGTERM, as shells have it
DELAY = 500  # milliseconds of training between two questions to the other processes
RARELY = 64  # steps between them, at most


class Terminated(SystemExit):
    """A process ends because of SIGTERM; like KeyboardInterrupt no error that somebody might take for their own."""

    def __init__(self, *code):
        super().__init__(*(code or (EXIT_TERMINATED,)))


class Termination:
    """What training makes of SIGTERM.

    Args:
        at_once: says what is kept, where no step is near and the process ends at once.
        speaks: whether this process says so; the others keep silent.

    Attributes:
        asked: it has come.
        soon: the end of a step is near; nothing ends before.
        leaving: all processes know of it, and stop at the end of the step.
    """

    soon = asked = leaving = False

    def __init__(self, at_once: Callable[[], str], speaks: bool = True):
        self.at_once, self.speaks = at_once, speaks
        self._earlier = None
        self._listens = False
        self._passed, self._every, self._since = 0, 1, None  # steps since all were asked, until, and when that was

    def listen(self) -> None:
        """From here on."""
        if self._listens or not _nobody_listens():
            return
        self._earlier = signal.signal(signal.SIGTERM, self._come)
        self._listens = True

    def stop(self) -> None:
        """The earlier handler comes back; not after a SIGTERM, so that a second one ends the process at once."""
        if self._listens and not self.asked:
            signal.signal(signal.SIGTERM, self._earlier)
        self._listens = self.soon = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The same for a block.

        Raises:
            Terminated: it came when there was no step to come, and the block went on to its end.
        """
        self.asked = self.leaving = False
        self._passed, self._every, self._since = 0, 1, None
        self.listen()
        try:
            yield
        finally:
            self.stop()
        if self.asked:
            self._end()

    @contextmanager
    def busy(self, really: bool = True) -> Iterator[None]:
        """No step ends for long in this block: a SIGTERM ends the process at once, also one that came when all had
        agreed to go on."""
        soon, self.soon = self.soon, self.soon and not really
        try:
            if really and self.asked and not self.leaving:
                self._end()
            yield
        finally:
            self.soon = soon

    def over(self) -> None:
        """No step is to come.

        Raises:
            Terminated: it has come.
        """
        self.soon = False
        if self.asked:
            self._end()

    def agreed(self, accelerator, now: bool = True) -> bool:
        """Whether it has come to one of the processes; all of them call this at the end of a step.

        Args:
            now: all are asked, as something that takes long follows, or has come before. Else, of several processes,
                about every half second, and after `RARELY` steps at the latest: to sum a number over two processes on
                CPUs (gloo) takes up to 2.5 ms, a GPU has to come to its end for it.
        """
        if accelerator.num_processes == 1:
            self.leaving = self.asked
            return self.leaving
        self._passed += 1
        self.leaving = (now or self._passed >= self._every) and self._ask_all(accelerator)
        return self.leaving

    def _ask_all(self, accelerator) -> bool:
        import torch

        moment = time.monotonic()
        took = round(1000 * (moment - (moment if self._since is None else self._since)))
        # whole numbers: their sum, and the steps until the next question, are the same in all processes
        asked = torch.tensor([int(self.asked), took], device=accelerator.device)
        asking, total = accelerator.reduce(asked, "sum").tolist()
        if self._since is not None:
            fitting = DELAY * accelerator.num_processes * self._passed // max(1, total)
            self._every = max(1, min(fitting, 2 * self._every, RARELY))
        self._passed, self._since = 0, moment
        return asking > 0

    def say(self, words: str) -> None:
        """One line for whoever reads the log of a job that ends. Not through `logging`: its locks may be held."""
        if self.speaks:
            with suppress(OSError):  # a reader may be gone: the same signal ended the tee behind a pipe
                os.write(2, f"{words}\n".encode())

    def _come(self, number, frame) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.asked = True
        if not self.soon:
            self._end()
        at_hand = "at the end of this step, or of the evaluation or checkpoint at hand"
        self.say(f"SIGTERM: training stops {at_hand}; a second one ends it at once.")

    def _end(self) -> None:
        self.say(f"SIGTERM: no step ends soon, so that training stops here. {self.at_once()}")
        raise Terminated


@contextmanager
def terminable() -> Iterator[None]:
    """A SIGTERM in this block ends it as an error would, so that what was begun is cleared away."""

    def come(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    if not _nobody_listens():
        yield
        return
    come.of_this_package = True
    earlier = signal.signal(signal.SIGTERM, come)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is come:
            signal.signal(signal.SIGTERM, earlier)


def _nobody_listens() -> bool:
    if threading.current_thread() is not threading.main_thread():
        return False
    handler = signal.getsignal(signal.SIGTERM)
    return handler is signal.SIG_DFL or getattr(handler, "of_this_package", False)
