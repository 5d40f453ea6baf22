"""SIGTERM, which schedulers send some time before they kill: a run stops where it can go on from.

Only where nobody else listens: a handler of the user's own stays, and so does Python's in other threads than the main
one. A second SIGTERM ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


__all__ = ["EXIT_TERMINATED", "Terminated", "Termination", "terminable"]

EXIT_TERMINATED = 143  # 128 + SIGTERM, as shells have it


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
        self.listen()
        try:
            yield
        finally:
            self.stop()
        if self.asked:
            raise Terminated

    @contextmanager
    def busy(self, really: bool = True) -> Iterator[None]:
        """No step ends for long in this block: a SIGTERM ends the process at once."""
        soon, self.soon = self.soon, self.soon and not really
        try:
            yield
        finally:
            self.soon = soon

    def agreed(self, accelerator) -> bool:
        """Whether it has come to one of the processes; all of them call this at the end of a step."""
        self.leaving = self.asked
        if accelerator.num_processes > 1:
            import torch

            asked = torch.tensor([float(self.asked)], device=accelerator.device)
            self.leaving = bool(accelerator.reduce(asked, "sum").item() > 0)
        return self.leaving

    def say(self, words: str) -> None:
        """One line for whoever reads the log of a job that ends. Not through `logging`: its locks may be held."""
        if self.speaks:
            os.write(2, f"{words}\n".encode())

    def _come(self, number, frame) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.asked = True
        if not self.soon:
            self._end()
        self.say("SIGTERM: training stops at the end of this step; a second one ends it at once.")

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
