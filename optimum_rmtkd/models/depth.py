"""Which blocks of the uncut model a model of fewer layers has, and what its modules were called before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..modeling_rmtkd import resolve_path
from ..spec_rmtkd import MOST_LAYERS, SpecMismatchError


__all__ = ["KEPT", "block_names", "kept_blocks", "parameters_as"]

COUNT = "num_hidden_layers"
KEPT = "kept_blocks"
"""Field of the config of a plain model of fewer layers: what the spec of another says in `blocks`. transformers keeps
it and ignores it."""


def kept_blocks(model: nn.Module) -> dict[str, dict[str, Any]]:
    """{path of the list of blocks: {"kept": numbers of those that stayed, "of": how many there were}}; empty where no
    block was removed.

    Raises:
        SpecMismatchError: the field `kept_blocks` of a plain config says anything else.
    """
    config = getattr(model, "config", None)
    spec = (getattr(config, "rmtkd", None) or {}).get("spec", {})
    if found := spec.get("blocks"):
        return found
    found = getattr(config, KEPT, None)
    if found is not None:
        _check(found, getattr(config, COUNT, None))
    return found or {}


def _check(found: Any, count: Any) -> None:
    """Of a plain checkpoint nobody has looked at it: a spec is checked where it is read."""
    entries = list(found.values()) if isinstance(found, Mapping) else [None]
    for entry in entries:
        said = entry if isinstance(entry, Mapping) else {}
        kept, of = said.get("kept"), said.get("of")
        sound = (
            set(said) == {"kept", "of"} and type(of) is int and of <= MOST_LAYERS and isinstance(kept, (list, tuple))
        )
        sound = sound and kept and all(type(number) is int and 0 <= number < of for number in kept)
        if not (sound and sorted(set(kept)) == list(kept) and count in (None, len(kept))):
            raise SpecMismatchError(
                f"config.json: {KEPT} is {str(found)[:200]}: expected, for a list of blocks, {{'kept': the numbers of "
                f"the blocks that stayed, {count or 'some'} in ascending order, 'of': how many there were, at most "
                f"{MOST_LAYERS:,}}}. Delete the field: the blocks are then taken as all there ever were."
            )


def block_names(old: nn.Module, new: nn.Module) -> Callable[[str], str | None]:
    """A function from a path in `old` to that of the same module or tensor in `new`, which has no more blocks; None
    where its block was removed."""
    before, moves = kept_blocks(old), {}
    for raw, entry in kept_blocks(new).items():
        known = before.get(raw, {}).get("kept") or list(range(entry["of"]))
        where = {number: place for place, number in enumerate(entry["kept"])}
        moves[resolve_path(old, raw) + "."] = [where.get(number) for number in known]

    def name(path: str) -> str | None:
        for start, places in moves.items():
            number, dot, rest = path[len(start) :].partition(".")
            if path.startswith(start) and number.isdigit() and int(number) < len(places):
                place = places[int(number)]
                return None if place is None else f"{start}{place}{dot}{rest}"
        return path

    return name


def parameters_as(old: nn.Module, new: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `old` by their names in `new`; those of removed blocks by names that no model has."""
    name = block_names(old, new)
    return {name(path) or f"removed {path}": parameter for path, parameter in old.named_parameters()}
