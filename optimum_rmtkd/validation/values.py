"""One value against one annotation: normalised, or a misfit that says what would have fitted."""

from __future__ import annotations

import math
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from .limits import Interval, Length
from .wording import advice, alternatives, close, shown


__all__ = ["Misfit", "fitted"]

LARGEST = 2**63 - 1  # what torch and Arrow hold
DEEPEST = 32  # levels of nested JSON


class Misfit(Exception):
    """A value that does not fit.

    Attributes:
        words: what would, in alternatives.
        value, path: the very item that does not fit, and where it lies: "[0]".
        of_its_kind: the type is right, the value is not.
        hint: a whole sentence, or nothing.
    """

    def __init__(self, *words: str, value: Any, path: str = "", of_its_kind: bool = False, hint: str = ""):
        super().__init__(*words)
        self.words, self.value, self.path = words, value, path
        self.of_its_kind, self.hint = of_its_kind, hint


def fitted(value: Any, hint: Any) -> Any:
    """The normalised value.

    Raises:
        Misfit: it does not fit.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _constrained(value, arguments[0], arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, arguments)
    if origin is Literal:
        return _literal(value, arguments)
    if hint in _PLAIN:
        return _PLAIN[hint](value)
    if origin in (tuple, list, Sequence):
        fitted = _items(value, arguments[0])
        return tuple(fitted) if origin is tuple else fitted
    if origin in (dict, Mapping):
        return _pairs(value, *arguments)
    if origin is Callable or hint is Callable:
        return _ensured(value, callable(value), "something that can be called")
    if isinstance(hint, type) and origin is None and not _is_pattern(hint):
        return _ensured(value, isinstance(value, hint), f"a {hint.__name__}")
    return value


def _is_pattern(hint: type) -> bool:
    """A protocol or a TypedDict: instances cannot be told."""
    return getattr(hint, "_is_protocol", False) or typing.is_typeddict(hint)


def _ensured(value: Any, fits: bool, expected: str) -> Any:
    if not fits:
        raise Misfit(expected, value=value, hint=advice(value, expected))
    return value


def _constrained(value: Any, hint: Any, constraints: Iterable[Any]) -> Any:
    limits = [limit for limit in constraints if isinstance(limit, (Interval, Length))]
    try:
        kept = fitted(value, hint)
    except Misfit as misfit:
        if not misfit.path:
            for limit in limits:
                if isinstance(limit, Interval):
                    misfit.words = tuple(limit.described(word) for word in misfit.words)
        raise
    for limit in limits:
        if not limit.holds(kept):
            noun = _NOUNS.get(hint, _NOUNS.get(typing.get_origin(hint), "values"))
            raise Misfit(limit.described(noun), value=value, of_its_kind=True, hint=_percent(kept, limit))
    return kept


def _percent(value: Any, limit: Interval | Length) -> str:
    """Shares are often meant as percentages."""
    share = isinstance(limit, Interval) and 0 <= limit.low and limit.high == 1
    return f"Did you mean {value / 100:g}?" if share and 2 <= value < 100 else ""


def _one_of(value: Any, hints: Sequence[Any]) -> Any:
    misfits = []
    for hint in hints:
        try:
            return fitted(value, hint)
        except Misfit as misfit:
            misfits.append(misfit)
    inner = [misfit for misfit in misfits if misfit.path]
    if inner:  # the right container with a wrong item: that item is what the user has to see
        raise inner[0]
    near = [misfit for misfit in misfits if misfit.of_its_kind]
    words = [word for misfit in misfits for word in misfit.words if not (near and word == "None")]
    hint = next((misfit.hint for misfit in misfits if misfit.hint), "")
    raise Misfit(*words, value=value, of_its_kind=bool(near), hint=hint)


def _literal(value: Any, options: Sequence[Any]) -> Any:
    word = isinstance(value, str)
    for option in options:
        if word and option == str.__str__(value) or type(option) is type(value) and option == value:
            return option
    raise Misfit(*map(repr, options), value=value, of_its_kind=word, hint=close(value, options))


def _none(value: Any) -> None:
    return _ensured(value, value is None, "None")


def _truth(value: Any) -> bool:
    # numpy's own truth value belongs to no abstract class that would tell it without numpy
    if isinstance(value, bool) or type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise Misfit("True", "False", value=value, hint=advice(value, "True or False"))


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise Misfit("a whole number", value=value, hint=advice(value, "a whole number"))
    if not -LARGEST <= int(value) <= LARGEST:
        raise Misfit("a whole number", value=value, of_its_kind=True, hint="It has to fit into 64 bits.")
    return int(value)


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise Misfit("a number", value=value, hint=advice(value, "a number"))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Misfit("a number", value=value, of_its_kind=True, hint="It has to be finite." * (number == number))
    return number


def _text(value: Any) -> str:
    return str.__str__(_ensured(value, isinstance(value, str), "a string"))


def _items(value: Any, hint: Any) -> list:
    """Several of one kind; one alone is a list of one."""
    several = isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, range))
    if not several:
        try:
            return [fitted(value, hint)]
        except Misfit as misfit:
            if not misfit.of_its_kind:
                misfit.hint = advice(value, "a list") or misfit.hint
                misfit.words = (f"a list (each {alternatives(misfit.words)})",)
            raise
    return [_inside(item, hint, f"[{number}]") for number, item in enumerate(value)]


def _pairs(value: Any, key_hint: Any, value_hint: Any) -> dict:
    _ensured(value, isinstance(value, Mapping), "a mapping")
    return {
        _inside(key, key_hint, f" key {shown(key)}"): _inside(item, value_hint, f"[{shown(key)}]")
        for key, item in value.items()
    }


def _inside(value: Any, hint: Any, place: str) -> Any:
    try:
        return fitted(value, hint)
    except Misfit as misfit:
        misfit.path = place + misfit.path
        raise


def _json(value: Any, depth: int = 0) -> Any:
    """What JSON can hold, with text for keys: whole numbers become text, as they would in a file."""
    if depth > DEEPEST:
        raise Misfit(f"at most {DEEPEST} levels", value=value, path="[...]", of_its_kind=True)
    if isinstance(value, Mapping):
        pairs = {}
        for key, item in value.items():
            whole = isinstance(key, numbers.Integral) and not isinstance(key, bool)
            name = _inside(str(int(key)) if whole else key, str, f" key {shown(key)}")
            if name in pairs:
                raise Misfit("each key once", value=key, path=f" key {shown(key)}", of_its_kind=True)
            pairs[name] = _deeper(item, depth, f"[{shown(key)}]")
        return pairs
    if isinstance(value, (list, tuple)):
        return [_deeper(item, depth, f"[{number}]") for number, item in enumerate(value)]
    for kind in (None, bool, int, float, str):
        try:
            return _PLAIN[kind](value)
        except Misfit as misfit:
            if misfit.of_its_kind:
                raise
    raise Misfit("what JSON can hold", value=value, hint=advice(value, "what JSON can hold"))


def _deeper(value: Any, depth: int, place: str) -> Any:
    try:
        return _json(value, depth + 1)
    except Misfit as misfit:
        misfit.path = place + misfit.path
        raise


def _json_list(value: Any) -> list:
    return _json(_ensured(value, isinstance(value, (list, tuple)), "a list"))


def _json_object(value: Any) -> dict:
    return _json(_ensured(value, isinstance(value, Mapping), "a mapping"))


_PLAIN: dict[Any, Callable[[Any], Any]] = {
    None: _none,
    types.NoneType: _none,
    bool: _truth,
    int: _whole,
    float: _real,
    str: _text,
    dict: _json_object,
    Mapping: _json_object,
    list: _json_list,
    Any: lambda value: value,
}
_NOUNS = {int: "a whole number", float: "a number", tuple: "a list", list: "a list", Sequence: "a list"}
_NOUNS |= {dict: "a mapping", Mapping: "a mapping"}
