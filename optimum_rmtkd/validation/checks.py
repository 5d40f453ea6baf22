"""Dataclasses and functions whose values are checked by their annotations."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from ..errors import RMTKDError
from .values import Misfit, fitted
from .wording import a_kind, alternatives, close, shown


__all__ = ["check_arguments", "check_fields", "check_value", "checked"]

F = TypeVar("F", bound=Callable[..., Any])


def check_fields(instance: Any, names: Collection[str] | None = None, as_options: bool = False) -> None:
    """Check and normalise the fields of a dataclass, frozen or not, in place.

    Args:
        names: of the fields to check; None: all.
        as_options: name them as the command line does (--batch-size 0) in errors.

    Raises:
        RMTKDError: a value of another type or outside its range; with the field, the value and what was expected.
    """
    hints = _hints_of(type(instance))
    for item in dataclasses.fields(instance):
        if names is not None and item.name not in names:
            continue
        value = getattr(instance, item.name)
        subject = functools.partial(_as_option if as_options else _as_argument, item.name)
        object.__setattr__(instance, item.name, _check(value, hints[item.name], subject, item.metadata.get("choices")))


def check_value(value: Any, hint: Any, name: str, owner: str = "") -> Any:
    """The value as it is kept, if it fits the annotation.

    Args:
        hint: a type as in annotations, with `Interval` and `Length` inside `Annotated`.
        name, owner: for the message: "owner(name=value): expected ...".

    Raises:
        RMTKDError: it does not fit.
    """
    return _check(value, hint, functools.partial(_as_argument, name, owner=owner))


def checked(function: F, by_base: Mapping[str, type] | None = None) -> F:
    """The function, or `__init__`, with its arguments checked and normalised by their annotations.

    A default is always taken. Annotations that cannot be read at run time (imports under TYPE_CHECKING) and kinds of
    types that are not known here are not checked.

    Args:
        by_base: given for constructors of parts: types of arguments, by name, that are left to a base class. What
            such a constructor declares by a class of its own is left to it, too.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        owner = type(args[0]).__name__ if _name(function) == "__init__" else _name(function)
        bound.arguments.update(check_arguments(function, bound.arguments, owner, by_base))
        return function(*bound.args, **bound.kwargs)

    return typing.cast(F, call)


def check_arguments(
    function: Callable,
    arguments: Mapping[str, Any],
    owner: str | None = None,
    by_base: Mapping[str, type] | None = None,
) -> dict[str, Any]:
    """As `checked`, of arguments that a function is to be called with later.

    Args:
        owner: in errors; None: the function's name.

    Raises:
        RMTKDError: a value that does not fit.
    """
    function = inspect.unwrap(function)
    parameters, hints, kept = inspect.signature(function).parameters, _hints_of(function), dict(arguments)
    for name, value in arguments.items():
        several = parameters[name].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if name not in hints or several or _is_default(value, parameters[name].default):
            continue
        if by_base is not None and isinstance(value, by_base.get(name, ())):
            continue
        subject = functools.partial(_as_argument, name, owner=_name(function) if owner is None else owner)
        kept[name] = _check(value, hints[name], subject, own=by_base is not None)
    return kept


def _is_default(value: Any, default: Any) -> bool:
    """Itself, or the same once more from JSON: a default may be of another type than declared."""
    plain = type(value) is type(default) and isinstance(value, (str, int, float))
    return value is default or plain and value == default


def _name(function: Callable) -> str:
    """Objects that can be called have no name of their own."""
    return getattr(function, "__name__", type(function).__name__)


def _as_argument(name: str, value: str, path: str, owner: str = "") -> str:
    return f"{owner}({name}{path}={value})" if owner else f"{name}{path}={value}"


def _as_option(name: str, value: str, path: str) -> str:
    return f"--{name.replace('_', '-')} {value}"


def _check(
    value: Any, hint: Any, subject: Callable[..., str], choices: Sequence | None = None, own: bool = False
) -> Any:
    try:
        kept = fitted(value, hint)
        if choices and kept is not None and kept not in choices:
            raise Misfit(value=value, of_its_kind=True)
    except Misfit as misfit:
        if own and misfit.foreign:
            return value
        expected = f"one of {', '.join(choices)}" if choices else alternatives(misfit.words)
        got = "" if misfit.of_its_kind else f"; got {a_kind(misfit.value)}"
        said = close(misfit.value, choices) if choices else misfit.hint
        told = f" {said}" if said else ""
        raise RMTKDError(
            f"{subject(value=shown(misfit.value), path=misfit.path)}: expected {expected}{got}.{told}"
        ) from None
    return kept


@functools.cache
def _hints_of(owner: Any) -> dict[str, Any]:
    """Annotations of a class or function as objects; of a function, those that can be read."""
    if isinstance(owner, type):
        return typing.get_type_hints(owner, include_extras=True)
    hints = {}
    for name, written in inspect.get_annotations(owner).items():
        try:
            single = types.SimpleNamespace(__annotations__={name: written})
            hints |= typing.get_type_hints(single, inspect.unwrap(owner).__globals__, include_extras=True)
        except (NameError, TypeError, AttributeError, SyntaxError):  # known to type checkers alone, or no type at all
            continue
    return hints
