"""Values that users pass by mistake, and values that fit an annotation: for tests of what is checked by types."""

from __future__ import annotations

import dataclasses
import decimal
import enum
import fractions
import functools
import inspect
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.validation import Interval, Length
from optimum_rmtkd.validation.limits import Json


class Word(str, enum.Enum):
    AUTO = "auto"


class Number(enum.IntEnum):
    TWO = 2


def nested(levels: int) -> dict:
    return {"a": nested(levels - 1)} if levels else {}


NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.integers(),
    st.sampled_from([2**31, 2**32, 2**63, 2**64, -(2**63), 80, 1000]),
    st.sampled_from([400, 5000]).map(lambda digits: 10**digits),  # beyond floats; beyond what Python prints
    st.floats(),
    st.floats(-1, 2),
    st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 5e-324, 1e308, 16.0]),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.text(max_size=6),
    st.sampled_from(
        ["", "no", "false", "0.8", "3", "1e3", "nan", "auto", "none", "{", "[1", '{"a": NaN}', "\ud800", "²"]
    ),
    st.binary(max_size=4),
)
ODD = st.sampled_from(
    [
        np.int64(3),
        np.int64(-1),
        np.uint64(2**64 - 1),
        np.float32(0.25),
        np.float64(0.25),
        np.float16("nan"),
        np.longdouble(0.25),
        np.bool_(True),
        np.str_("auto"),
        np.bytes_(b"auto"),
        np.array(3),
        np.array([1, 2]),
        np.array(["hidden"]),
        np.datetime64("2020-01-01"),
        torch.tensor(0.5),
        torch.tensor([1, 2]),
        Word.AUTO,
        Number.TWO,
        fractions.Fraction(1, 2),
        decimal.Decimal("0.5"),
        1 + 1j,
        range(3),
        object(),
        int,
        Exception,
        len,
        slice(1),
        Ellipsis,
        frozenset("ab"),
        bytearray(b"ab"),
        nested(20),
        nested(200),
    ]
)
WILD = st.recursive(
    SCALARS | ODD,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3) | st.integers(0, 3) | st.none() | st.just((1, 2)), inner, max_size=3),
        st.sampled_from([{1, 2}, iter([1]), types.SimpleNamespace(a=1), types.MappingProxyType({"a": 1})]),
    ),
    max_leaves=5,
)
PARTS = st.sampled_from(
    [
        "kl",
        "mpo",
        {},
        [],
        {"kl": {}},
        {"kl": {"weight": 0.5}},
        ["task", {"name": "kl"}],
        '{"kl": {"weight": 1}}',
        {"kl": None},
    ]
)


def fitting(hint: typing.Any) -> st.SearchStrategy:
    """Values that fit an annotation, numpy's included."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        limit = next((a for a in arguments[1:] if isinstance(a, Interval)), None)
        size = next((a for a in arguments[1:] if isinstance(a, Length)), None)
        if any(isinstance(a, Json) for a in arguments[1:]):
            return PARTS
        if limit is not None:
            return _within(arguments[0], limit)
        return fitting(arguments[0]).filter(lambda value: not hasattr(value, "__len__") or size.holds(value))
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(fitting, arguments))
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin in (tuple, list, Sequence):
        return st.lists(fitting(arguments[0]), min_size=1, max_size=3) | fitting(arguments[0])
    if origin is Mapping:
        return st.dictionaries(*map(fitting, arguments), min_size=1, max_size=3)
    if hint in (int, float):
        return _within(hint, Interval())
    if hint is str:
        return st.text(max_size=5) | st.sampled_from(["qk", "vv", "hidden", "screenot", "mp_quantile", "fixed", "erf"])
    plain = {bool: st.booleans() | st.just(np.bool_(False)), types.NoneType: st.none()}
    return plain.get(hint, WILD)


def _within(kind: type, limit: Interval) -> st.SearchStrategy:
    if kind is int:
        low = int(max(limit.low, -100)) + (not limit.has_low)
        whole = st.integers(low, int(min(limit.high, low + 1000)))
        return whole | whole.map(np.int32)
    low, high = max(limit.low, -1e6), min(limit.high, 1e6)
    open_ends = {
        "exclude_min": not limit.has_low and low == limit.low,
        "exclude_max": not limit.has_high and high == limit.high,
    }
    real = st.floats(low, high, **open_ends)
    return real | real.map(np.float64) | st.just((low + high) / 2)


def hints_of(thing: typing.Any) -> dict[str, typing.Any]:
    """Name -> annotation of what a dataclass' or another class' constructor, or a function, takes."""
    hints = typing.get_type_hints(thing if dataclasses.is_dataclass(thing) else _function(thing), include_extras=True)
    return {name: hints.get(name, typing.Any) for name in inspect.signature(thing).parameters}


def _function(thing: typing.Any) -> typing.Any:
    return inspect.unwrap(thing.__init__ if isinstance(thing, type) else thing)


def arguments(thing: typing.Any, skip: Sequence[str] = ()) -> st.SearchStrategy:
    """Some of the arguments: many fit, some are anything."""
    hints = {name: hint for name, hint in hints_of(thing).items() if name not in skip}
    words = {}
    if dataclasses.is_dataclass(thing):
        words = {
            item.name: item.metadata["choices"] for item in dataclasses.fields(thing) if "choices" in item.metadata
        }

    def value(name: str) -> st.SearchStrategy:
        fits = st.sampled_from(words[name]) if name in words else fitting(hints[name])
        return st.tuples(st.just(name), st.one_of(fits, fits, WILD))

    pairs = st.sampled_from(sorted(hints)).flatmap(value)
    return st.lists(pairs, max_size=4, unique_by=lambda pair: pair[0]).map(dict)


def accepted(make: typing.Callable, given: dict) -> typing.Any:
    """What was made; None where it was refused with an error that names an argument."""
    try:
        return make(**given)
    except RMTKDError as error:
        message = str(error)
        assert any(name.removesuffix("s") in message for name in given), message
        assert "\n" not in message
        message.encode("utf8")
        return None


DAMAGES = st.lists(
    st.tuples(
        st.sampled_from(["cut", "drop", "double", "put"]),
        st.integers(0, 400),
        st.sampled_from(
            list('{}[]",:0-.e \n') + ["NaN", "Infinity", "null", "true", "1e999", "9" * 400, "[" * 2000, "\ud800"]
        ),
    ),
    max_size=3,
)


def raw(thing: typing.Any) -> st.SearchStrategy:
    """What somebody may hand to `from_dict`: fields, names that are none, and things that are no mapping."""
    names = st.text(max_size=4) | st.integers(0, 3) | st.none() | st.sampled_from([*hints_of(thing), "__class__", ""])
    odd = st.dictionaries(names, WILD, max_size=2)
    fields = st.tuples(arguments(thing), odd | st.just({})).map(lambda both: both[0] | both[1])
    return st.one_of(arguments(thing), fields, fields.map(types.MappingProxyType), WILD)


def texts(thing: typing.Any) -> st.SearchStrategy:
    """What a file may hold in the place of a recipe: bytes of JSON, whole or damaged, or of anything."""
    whole = arguments(thing).map(_written)
    damaged = st.tuples(whole, DAMAGES).map(lambda pair: functools.reduce(_damaged, pair[1], pair[0]))
    encoded = st.tuples(damaged, st.sampled_from(["utf8", "utf8", "utf-8-sig", "utf16", "latin1"]))
    return encoded.map(lambda pair: pair[0].encode(pair[1], "replace")) | st.binary(max_size=20)


def _written(values: dict) -> str:
    try:
        return json.dumps(values, default=str, skipkeys=True)
    except ValueError:  # numbers of more digits than Python writes
        return "{}"


def _damaged(text: str, damage: tuple[str, int, str]) -> str:
    kind, place, new = damage
    place %= len(text) + 1
    return {
        "cut": text[:place],
        "drop": text[:place] + text[place + 1 :],
        "double": text[:place] + text[place - 5 :],
        "put": text[:place] + new + text[place:],
    }[kind]


def recipe_or_refusal(make: typing.Callable, given: typing.Any) -> None:
    """A recipe that JSON gives back equal, or an error of ours of one line; nothing else."""
    try:
        recipe = make(given)
    except RMTKDError as error:
        assert "\n" not in str(error) and len(str(error)) < 3000
        str(error).encode("utf8")
        return
    assert type(recipe).from_dict(through_json(recipe.to_dict())) == recipe


def through_json(values: dict) -> dict:
    return json.loads(json.dumps(values, allow_nan=False))


def many(count: int) -> settings:
    return settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
