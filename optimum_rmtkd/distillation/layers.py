"""Which layer of the student is compared with which layer of the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from torch import nn

from ..errors import RMTKDError, UnsupportedArchitectureError
from ..models import kept_blocks
from ..reparameterization.targets import block_list
from ..validation import Length, check_value


__all__ = ["Layers", "blocks_of", "check_layers", "in_decoder", "layer_pairs", "own_blocks", "uniform_map"]

Layers = Literal["last", "uniform"] | Annotated[Mapping[str | int, str | int], Length(1)]


def blocks_of(model: nn.Module) -> tuple[str, ...]:
    """Paths of a model's residual blocks: as its family declares them, else the longest list of modules of one
    type."""
    from .. import surgery

    try:
        return surgery.block_paths(model)
    except (UnsupportedArchitectureError, AttributeError):  # no family; no transformers model at all
        return block_list(model)


def uniform_map(student: int, teacher: int) -> list[int]:
    """Teacher layer floor((l + 1) T / S) - 1 for each student layer l of S: 2 l + 1 from 12 to 6, the last with the
    last."""
    return [max(0, (layer + 1) * teacher // student - 1) for layer in range(student)]


def own_blocks(student: nn.Module, teacher: nn.Module) -> list[int] | None:
    """For each block of the student the number of the teacher's that it was made from, where blocks went that the
    teacher still has; None where both have as many, or the one was not made from the other."""
    ours, theirs = blocks_of(student), blocks_of(teacher)
    if len(ours) >= len(theirs):
        return None
    entry = next(iter(kept_blocks(student).values()), None)
    if entry is None or len(entry["kept"]) != len(ours):
        return None
    former = next(iter(kept_blocks(teacher).values()), {"kept": range(len(theirs)), "of": len(theirs)})
    places = {number: place for place, number in enumerate(former["kept"])}
    known = former["of"] == entry["of"] and all(number in places for number in entry["kept"])
    return [places[number] for number in entry["kept"]] if known else None


def check_layers(layers: Layers) -> Layers:
    """The same, if `layer_pairs` can read it.

    Raises:
        RMTKDError: neither a known word nor a mapping with anything in it.
    """
    return check_value(layers, Layers, "layers")


def layer_pairs(student: nn.Module, teacher: nn.Module, layers: Layers) -> tuple[tuple[str, str], ...]:
    """(student path, teacher path) of the layers to compare.

    Args:
        layers: "last"; "uniform": every student block, with the block of the teacher that it was made from
            (`own_blocks`), else with `uniform_map`; or {student: teacher} of module paths or
            block numbers (from 0, negative from the end).

    Raises:
        RMTKDError: no such module or block, or no blocks can be found.
    """
    check_layers(layers)
    ours, theirs = blocks_of(student), blocks_of(teacher)
    if isinstance(layers, Mapping):
        return tuple((_path(student, ours, a), _path(teacher, theirs, b)) for a, b in layers.items())
    for model, blocks in ((student, ours), (teacher, theirs)):
        if not blocks:
            raise RMTKDError(
                f"layers={layers!r}: no list of equal blocks in {type(model).__name__}. Name the modules: "
                "layers={'path in the student': 'path in the teacher'}}."
            )
    if layers == "last":
        return ((ours[-1], theirs[-1]),)
    own = own_blocks(student, teacher) or uniform_map(len(ours), len(theirs))
    return tuple((ours[i], theirs[j]) for i, j in enumerate(own))


def in_decoder(model: nn.Module, path: str) -> bool:
    """Is the module at `path` part of an encoder-decoder's decoder, with causal attention over its own tokens?"""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    decoder = model.get_decoder()  # the model itself where only the encoder of such a pair is there
    return decoder is not model and any(module is model.get_submodule(path) for module in decoder.modules())


def _path(model: nn.Module, blocks: tuple[str, ...], given: str | int) -> str:
    number = int(given) if str(given).lstrip("-").isdigit() else None  # JSON keys are strings
    if number is not None:
        if not -len(blocks) <= number < len(blocks):
            raise RMTKDError(f"layers: block {number} of {type(model).__name__}, which has {len(blocks)}.")
        return blocks[number]
    try:
        model.get_submodule(given)
    except AttributeError as error:
        raise RMTKDError(
            f"layers: no module {given!r} in {type(model).__name__}; its blocks are {', '.join(blocks) or 'unknown'}."
        ) from error
    return given
