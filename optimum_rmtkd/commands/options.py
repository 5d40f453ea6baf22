"""Options generated from dataclasses: the field's type, default and `metadata` are the only source of an option."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Collection
from typing import Any, TypeVar

from ..config import RMTKDConfig
from ..recipe import option


__all__ = ["add_options", "add_recipe_options", "from_options", "option", "recipe_from_options"]

T = TypeVar("T")
METAVARS = {int: "N", float: "X"}


def add_options(
    parser: argparse.ArgumentParser, kind: type, title: str, skip: Collection[str] = ()
) -> argparse._ArgumentGroup:
    """Add one `--option` for each field of the dataclass `kind`, in a group of its own.

    An option that is not given leaves no trace in the namespace, so that `from_options` can tell it from one given
    with its default value.
    """
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        if item.name in skip:
            continue
        text = item.metadata["help"]
        if item.default is not None:
            text += f" Default: {item.default}."
        group.add_argument(
            f"--{item.name.replace('_', '-')}",
            dest=item.name,
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
            **_argument(hints[item.name], item.metadata.get("choices")),
        )
    return group


def _argument(hint: Any, choices: tuple | None) -> dict[str, Any]:
    """Keyword arguments of `add_argument` for a field annotated `hint`."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [k for k in (typing.get_args(hint) if is_union else (hint,)) if k is not types.NoneType]
    kinds = [str if typing.get_origin(k) is typing.Literal else k for k in kinds]
    if kinds == [bool]:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kinds[0]) in (tuple, list):
        return {"nargs": "+", "type": typing.get_args(kinds[0])[0]}
    if dict in kinds:
        return {"type": str, "metavar": "JSON"}
    if set(kinds) == {str, int}:
        return {"type": _word_or_number}
    if set(kinds) == {str, float}:
        return {"type": _word_or_share, "metavar": "X"}
    return {"type": kinds[0], "choices": choices, "metavar": None if choices else METAVARS.get(kinds[0])}


def _word_or_number(text: str) -> str | int:
    return int(text) if text.isdigit() else text


def _word_or_share(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def from_options(kind: type[T], args: argparse.Namespace, base: T | None = None) -> T:
    """The dataclass `kind` with the options given in `args`; the others come from `base`, or are the defaults."""
    given = {item.name: getattr(args, item.name) for item in dataclasses.fields(kind) if hasattr(args, item.name)}
    return kind(**given) if base is None else dataclasses.replace(base, **given)


def add_recipe_options(parser: argparse.ArgumentParser, skip: Collection[str] = ()) -> None:
    """Add `--recipe FILE` and one option for each field of `RMTKDConfig`, except those in `skip`."""
    group = add_options(parser, RMTKDConfig, "recipe (fields of RMTKDConfig)", skip)
    group.add_argument(
        "--recipe",
        metavar="FILE",
        help="JSON file of RMTKDConfig fields; single options given beside it take precedence.",
    )


def recipe_from_options(args: argparse.Namespace) -> RMTKDConfig:
    """The recipe described by the options of `add_recipe_options`.

    Raises:
        RMTKDError: the recipe file is missing or wrong, or a value lies outside its range.
    """
    path = getattr(args, "recipe", None)
    if path is None:
        return from_options(RMTKDConfig, args)
    return from_options(RMTKDConfig, args, base=RMTKDConfig.from_json_file(path))
