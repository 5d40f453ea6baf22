"""Words of messages about values: how a value is shown, what it is, what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


__all__ = ["a_kind", "advice", "alternatives", "brief", "close", "shown"]

LONGEST = 120
FALSE, TRUE = ("false", "no", "off", "0", "n", "f"), ("true", "yes", "on", "1", "y", "t")


def shown(value: Any) -> str:
    """The value as Python writes it, on one line and cut where it is long."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # whole numbers beyond Python's limit of digits; endless nesting
        text = f"<{type(value).__name__}>"
    text = text.encode("utf8", "backslashreplace").decode("utf8")  # half a character cannot be printed
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def brief(text: str, longest: int = 60) -> str:
    """A name that somebody else chose, in a message: cut where it is long."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def a_kind(value: Any) -> str:
    """Its type with an article: "an int"."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def alternatives(words: Sequence[str]) -> str:
    """Joined with "or", each once."""
    words = list(dict.fromkeys(words))
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])}{',' if ',' in words[-2] else ''} or {words[-1]}"


def close(given: Any, known: Iterable[Any] | None) -> str:
    """A sentence that names the known word nearest to the given one; empty where none is near."""
    words = [word for word in known or () if isinstance(word, str)]
    near = difflib.get_close_matches(given, words, n=1) if isinstance(given, str) and len(given) < LONGEST else []
    return f"Did you mean {near[0]}?" if near else ""


def advice(value: Any, expected: str) -> str:
    """What to write in place of a value of another type; empty where nothing is plain."""
    if isinstance(value, str):
        return _unquoted(value.strip().lower(), expected)
    if isinstance(value, (bytes, bytearray)) and expected == "a string":
        return "Decode it."
    if isinstance(value, float) and value.is_integer() and expected == "a whole number":
        return f"Write {shown(int(value))}."
    if hasattr(value, "tolist") and hasattr(value, "shape"):  # arrays and tensors
        return f"Take its {'.tolist()' if expected == 'a list' else '.item()'}."
    return ""


def _unquoted(text: str, expected: str) -> str:
    if expected == "True or False" and text in (*FALSE, *TRUE):
        return f"Write {text in TRUE}, without quotes."
    kind = {"a number": float, "a whole number": int}.get(expected)
    if kind is None:
        return ""
    try:
        kind(text)
    except ValueError:
        return ""
    return f"Write {text}, without quotes."
