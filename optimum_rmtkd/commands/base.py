"""What every command shares: its help text and the way its errors reach the user."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from optimum.commands.base import BaseOptimumCLICommand

from ..errors import NoTargetError, RMTKDError
from ..signals import Terminated, terminable


__all__ = ["Command", "set_help"]

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
LONGEST = 2000  # characters of an error: names and values in it are other people's


def set_help(parser: ArgumentParser, description: str, epilog: str, usage: str | None = None) -> None:
    """Give `parser` a description and an epilog that keep their line breaks, and a usage shorter than all its options.

    optimum creates the parser itself and passes on no formatter, so it is set afterwards.
    """
    parser.usage = usage
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.description, parser.epilog = description, epilog


def _in_one_line(text: str) -> str:
    """Without line breaks; of what is very long the begin and the end, where it says what to do."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


class Command(BaseOptimumCLICommand):
    """A command whose expected errors end in one line on stderr (and the table that belongs to it) and exit code 2;
    anything else keeps its traceback."""

    def execute(self) -> None:
        raise NotImplementedError

    def run(self) -> None:
        try:
            with terminable():
                self.execute()
        except (RMTKDError, OSError) as error:  # the latter: what only the system knows, a name too long, a full disk
            asking = isinstance(error, NoTargetError)
            message = _in_one_line(error.message if asking else str(error))
            print(f"optimum-cli rmtkd {self.COMMAND.name}: error: {message}", file=sys.stderr)
            if asking:
                print(error.curve, file=sys.stderr)
            raise SystemExit(EXIT_USER_ERROR) from error
        except KeyboardInterrupt as interrupt:
            print(f"optimum-cli rmtkd {self.COMMAND.name}: interrupted, no output was written", file=sys.stderr)
            raise SystemExit(EXIT_INTERRUPTED) from interrupt
        except Terminated:
            print(f"optimum-cli rmtkd {self.COMMAND.name}: terminated, no output was written", file=sys.stderr)
            raise
