"""What all recipes share: checked fields, copies with changes, JSON both ways."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .errors import RMTKDError
from .files import write_text
from .validation import check_fields
from .validation.wording import a_kind, brief, close, shown


__all__ = ["Recipe", "option", "parse_json"]

R = TypeVar("R", bound="Recipe")
MOST_KEYS = 10  # in a message


def option(default: Any, help: str, choices: tuple | None = None) -> Any:
    """A dataclass field with the help text of its command-line option and the words it may hold."""
    return dataclasses.field(default=default, metadata={"help": help} | ({"choices": choices} if choices else {}))


class Recipe:
    """Base of frozen dataclasses whose fields are checked by their declared types (see `validation`)."""

    SIZE: ClassVar[str | None] = None  # the field that a bare number would have meant

    def __post_init__(self):
        check_fields(self)
        self.check_together()

    def check_together(self) -> None:
        """Fields that contradict each other; each is in its own range by now.

        Raises:
            RMTKDError: with the fields and a way out.
        """

    @classmethod
    def taken(cls: type[R], given: Any, name: str = "config") -> R:
        """The recipe that was passed as the argument `name`, or the default one for None.

        Raises:
            RMTKDError: something else; says how a recipe is made of it.
        """
        if given is None or isinstance(given, cls):
            return cls() if given is None else given
        word = cls.__name__
        cure = f"{word}(**values), {word}.from_json_file(path)"
        if isinstance(given, (int, float)) and not isinstance(given, bool) and cls.SIZE is not None:
            cure = f"{word}({cls.SIZE}={given!r})"
        elif isinstance(given, (str, os.PathLike)):
            cure = f"{word}.from_json_file({os.fspath(given)!r}), if that is its file"
        elif isinstance(given, type):
            cure = f"an instance, {word}({'' if cls.SIZE is None else f'{cls.SIZE}=0.5'})"
        raise RMTKDError(f"{name} is {a_kind(given)}; expected {word}: {cure}.")

    def replace(self: R, **changes: Any) -> R:
        """A copy with some fields changed, validated again.

        Raises:
            RMTKDError: a name that is no field, or a value that does not fit.
        """
        self._refuse_unknown(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dictionary of every field."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls: type[R], values: Mapping[str, Any]) -> R:
        """Inverse of `to_dict`.

        Raises:
            RMTKDError: no mapping; a key that is no field of the recipe, answered with the known ones; a value that
                does not fit.
        """
        if not isinstance(values, Mapping):
            raise RMTKDError(
                f"{cls.__name__}.from_dict got {a_kind(values)}, {shown(values)}; expected a mapping of its fields, "
                "as to_dict gives it."
            )
        cls._refuse_unknown(values)
        return cls(**values)

    @classmethod
    def _refuse_unknown(cls, names: Iterable[Any]) -> None:
        known = [item.name for item in dataclasses.fields(cls)]
        if unknown := [name for name in names if name not in known]:
            words = sorted(brief(n) if isinstance(n, str) and n.isidentifier() else shown(n) for n in unknown)
            told = ", ".join(words[:MOST_KEYS]) + (", ..." if len(words) > MOST_KEYS else "")
            meant = close(unknown[0], known)
            raise RMTKDError(
                f"Unknown {cls.__name__} key(s) {told}. Known keys: {', '.join(known)}.{' ' + meant if meant else ''}"
            )

    def to_json_file(self, path: str | Path) -> None:
        """Write the recipe as JSON, whole or not at all.

        Raises:
            RMTKDError: it cannot be written, or there lies a file that holds something and is no such recipe.
        """
        there = Path(os.path.realpath(path))
        if there.is_file() and there.stat().st_size:
            try:
                self.from_json_file(there)
            except RMTKDError as error:
                raise RMTKDError(
                    f"{path} exists and is no {type(self).__name__}: it is not replaced. Choose another name, or move "
                    f"it away. ({error})"
                ) from error
        write_text(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def from_json_file(cls: type[R], path: str | Path) -> R:
        """Read a recipe written by `to_json_file`.

        Raises:
            RMTKDError: a file that cannot be read, is not JSON or holds no object; unknown keys; values that do not
                fit.
        """
        wanted = f"expected the file that {cls.__name__}.to_json_file writes"
        try:
            text = Path(path).read_text(encoding="utf8")
        except UnicodeDecodeError as error:
            raise RMTKDError(f"{path} is not UTF-8 text ({error}); {wanted}. Save it as UTF-8.") from error
        except (OSError, ValueError, TypeError) as error:
            raise RMTKDError(f"{path} cannot be read ({error}); {wanted}.") from error
        values = parse_json(text, str(path), wanted)
        if not isinstance(values, dict):
            raise RMTKDError(
                f"{path} holds a JSON {type(values).__name__}; expected an object of {cls.__name__} fields."
            )
        return cls.from_dict(values)


def parse_json(text: str, what: str, wanted: str) -> Any:
    """Values of a JSON text as the standard has it: without NaN and infinities, each key once.

    Args:
        what, wanted: how the text is called and what was expected of it, for the message.

    Raises:
        RMTKDError: anything else.
    """
    try:
        text = text.removeprefix("\ufeff")  # editors of Windows begin with a mark
        return json.loads(text, parse_constant=_no_number, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:  # a JSONDecodeError is a ValueError, as are too many digits
        raise RMTKDError(f"{what} is not JSON ({error}); {wanted}.") from error


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} stands there twice")
    return values
