"""What every command shares: its help text and the way its errors reach the user."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from optimum.commands.base import BaseOptimumCLICommand

from ..errors import NoTargetError, RMTKDError
from ..signals import Terminated, terminable


__all__ = ["Command", "CommandParser", "set_help"]

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
LONGEST = 2000  # characters of an error: names and values in it are other people's
FIRST_CALLS = 3  # examples that a help begins with
EXAMPLES = "examples:\n"


class CommandParser(ArgumentParser):
    """A parser whose errors name the option that was meant, and the help that lists it.

    An option that it does not know is its own error: argparse would hand it up to the root, which knows no options.
    """

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        given = list(sys.argv[1:] if args is None else args)
        for word in given[: given.index("--")] if "--" in given else given:
            name = word.partition("=")[0]
            if name.startswith("--") and not any(known.startswith(name) for known in self._option_string_actions):
                self.error(f"unknown option {name}{self._meant(name)}")
        namespace, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"unknown arguments: {' '.join(left)}")
        return namespace, left

    def _meant(self, name: str) -> str:
        close = get_close_matches(name, self._option_string_actions, n=2)
        return f": did you mean {' or '.join(close)}?" if close else ""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_USER_ERROR, f"{self.prog}: error: {message}\nAll options: {self.prog} --help\n")


def set_help(parser: ArgumentParser, description: str, epilog: str, usage: str | None = None) -> None:
    """Give `parser` a description and an epilog that keep their line breaks, and a usage shorter than all its options.

    The first examples of the epilog go to the top, before the options: they are what most people look for. optimum
    creates the parser itself and passes on no formatter, so it is set afterwards.
    """
    parser.usage = usage
    parser.formatter_class = RawDescriptionHelpFormatter
    first, others = _divided(epilog)
    parser.description, parser.epilog = f"{description}{first}", others


def _divided(epilog: str) -> tuple[str, str]:
    """(the first examples, the rest of the epilog); an example begins with a line that is indented by two spaces."""
    if not epilog.startswith(EXAMPLES):
        return "", epilog
    block, gap, rest = epilog.removeprefix(EXAMPLES).partition("\n\n")
    examples = re.split(r"\n(?=  \S)", block.rstrip("\n"))
    first, others = examples[:FIRST_CALLS], examples[FIRST_CALLS:]
    more = "more examples:\n" + "\n".join(others) + "\n" if others else ""
    between = "\n" if more and gap else ""
    return "\n" + EXAMPLES + "\n".join(first), more + between + rest


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
