"""One value against one annotation: normalised, or a misfit that says what would have fitted."""

from __future__ import annotations

import math
import numbers
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from .limits import Interval, Json, Length
from .wording import advice, alternatives, close, shown


__all__ = ["Misfit", "fitted"]

LARGEST = 2**63 - 1  # what torch and Arrow hold
DEEPEST = 32  # levels of nested JSON
LONGEST_RANGE = 10_000  # written out as a list


class Misfit(Exception):
    """A value that does not fit.

    Attributes:
        words: what would, in alternatives.
        value, path: the very item that does not fit, and where it lies: "[0]".
        of_its_kind: the type is right, the value is not.
        foreign: what was expected is known to the owner of the annotation better than here.
        hint: a whole sentence, or nothing.
    """

    def __init__(self, *words: str, value: Any, path: str = "", of_its_kind: bool = False, hint: str = ""):
        super().__init__(*words)
        self.words, self.value, self.path = words, value, path
        self.of_its_kind, self.hint, self.foreign = of_its_kind, hint, False


def fitted(value: Any, hint: Any) -> Any:
    """The normalised value.

    Raises:
        Misfit: it does not fit.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if not isinstance(hint, Hashable):  # no type at all
        return value
    if origin is not None and not arguments:  # typing.List, tuple[()]
        return fitted(value, origin)
    if origin is Annotated:
        return _constrained(value, arguments[0], arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, arguments)
    if origin is Literal:
        return _literal(value, arguments)
    if hint in _PLAIN:
        return _PLAIN[hint](value)
    if origin is tuple and Ellipsis not in arguments:
        return _one_each(value, arguments)
    if origin in (tuple, list, Sequence):
        items = _items(value, arguments[0])
        return tuple(items) if origin is tuple or origin is Sequence and isinstance(value, tuple) else items
    if origin in (dict, Mapping):
        return _pairs(value, *arguments)
    if origin is Callable or hint is Callable:
        return _ensured(value, callable(value), "something that can be called")
    if isinstance(hint, type) and origin is None and not _is_pattern(hint):
        return _instance(value, hint)
    return value


def _is_pattern(hint: type) -> bool:
    """A protocol or a TypedDict: instances cannot be told."""
    return getattr(hint, "_is_protocol", False) or typing.is_typeddict(hint)


def _ensured(value: Any, fits: bool, expected: str) -> Any:
    if not fits:
        raise Misfit(expected, value=value, hint=advice(value, expected))
    return value


def _instance(value: Any, hint: type) -> Any:
    try:
        return _ensured(value, isinstance(value, hint), f"a {hint.__name__}")
    except Misfit as misfit:
        misfit.foreign = True
        raise


def _constrained(value: Any, hint: Any, constraints: Iterable[Any]) -> Any:
    constraints = tuple(constraints)
    if any(isinstance(constraint, Json) for constraint in constraints):
        return {dict: _json_object, list: _json_list}[hint](value)
    limits = [limit for limit in constraints if isinstance(limit, (Interval, Length))]
    try:
        kept = fitted(value, hint)
    except Misfit as misfit:
        if not misfit.path:
            for limit in limits:
                if isinstance(limit, Interval):
                    misfit.words = tuple(limit.described(word) for word in misfit.words)
                    misfit.foreign = False
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


def _kind(hint: Any) -> Any:
    """The plain type of an annotation: tuple of Annotated[tuple[int, ...], Length(1)]."""
    hint = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    return typing.get_origin(hint) or hint


def _one_of(value: Any, hints: Sequence[Any]) -> Any:
    misfits, found = [], [hint for hint in hints if _kind(hint) is type(value)]
    for hint in (*found, *hints):  # a whole number stays one where both kinds of numbers are declared
        try:
            return fitted(value, hint)
        except Misfit as misfit:
            misfits.append(misfit)
    misfits = misfits[len(found) :]
    inner = [misfit for misfit in misfits if misfit.path]
    if inner:  # the right container with a wrong item: that item is what the user has to see
        raise inner[0]
    near = [misfit for misfit in misfits if misfit.of_its_kind]
    words = [word for misfit in misfits for word in misfit.words if not (near and word == "None")]
    hint = next((misfit.hint for misfit in misfits if misfit.hint), "")
    whole = Misfit(*words, value=value, of_its_kind=bool(near), hint=hint)
    whole.foreign = any(misfit.foreign for misfit in misfits)
    raise whole


def _literal(value: Any, options: Sequence[Any]) -> Any:
    word = isinstance(value, str)
    for option in options:
        if word and option == str.__str__(value) or type(option) is type(value) and option == value:
            return option
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if whole and type(option) is int and option == int(value):
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
        misfit = Misfit("a number", value=value, of_its_kind=True, hint="It has to be finite." * (number == number))
        misfit.foreign = isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral)
        raise misfit
    return number


def _text(value: Any) -> str:
    return str.__str__(_ensured(value, isinstance(value, str), "a string"))


def _items(value: Any, hint: Any) -> list:
    """Several of one kind; one alone is a list of one."""
    several = isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))
    several = several and not (isinstance(value, range) and len(value) > LONGEST_RANGE)
    if not several:
        try:
            return [fitted(value, hint)]
        except Misfit as misfit:
            if not misfit.of_its_kind:
                misfit.hint = advice(value, "a list") or misfit.hint
                misfit.words = (f"a list (each {alternatives(misfit.words)})",)
            raise
    return [_inside(item, hint, f"[{number}]") for number, item in enumerate(value)]


def _one_each(value: Any, hints: Sequence[Any]) -> tuple:
    """As many items as there are annotations."""
    _ensured(value, isinstance(value, (list, tuple)), "a list")
    if len(value) != len(hints):
        raise Misfit(f"a list of {len(hints)}", value=value, of_its_kind=True)
    return tuple(_inside(item, hint, f"[{n}]") for n, (item, hint) in enumerate(zip(value, hints, strict=True)))


def _sequence(value: Any) -> Any:
    return _ensured(value, isinstance(value, (list, tuple, range)), "a list")


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
    dict: lambda value: _ensured(value, isinstance(value, Mapping), "a mapping"),
    Mapping: lambda value: _ensured(value, isinstance(value, Mapping), "a mapping"),
    list: lambda value: list(_sequence(value)),
    tuple: lambda value: tuple(_sequence(value)),
    Any: lambda value: value,
}
_NOUNS = {int: "a whole number", float: "a number", tuple: "a list", list: "a list", Sequence: "a list"}
_NOUNS |= {dict: "a mapping", Mapping: "a mapping"}
