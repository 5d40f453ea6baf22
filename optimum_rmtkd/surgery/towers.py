"""Layouts of models with several streams: encoders beside each other that meet at their outputs alone, and stages one
behind the other, each of another width. What is inside their blocks can be cut."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import nn

from ..errors import UnsupportedArchitectureError
from .layouts import EncoderLayout
from .sites import Anatomy, Site, Unit, get_module, has_module


__all__ = ["StagesLayout", "TowersLayout"]

TOWERS = (
    "this class holds {names}, each with a stream of its own, and one cut knows one stream. Narrow the towers by "
    "themselves ({names} have classes of their own), or what is inside their blocks"
)
STAGES = "each of its stages has a stream of its own, and one cut knows one stream; what is inside blocks can be cut"


@dataclass(frozen=True)
class TowersLayout:
    """Encoders beside each other.

    Where a class holds one of them it is an encoder like others. Where it holds several, what is inside their blocks
    can be cut: names of sites begin with that of their tower.

    Attributes:
        towers: {name: its layout, with paths that are relative to the whole model}.
    """

    towers: dict[str, EncoderLayout]

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Sites and units of `model`.

        Raises:
            UnsupportedArchitectureError: it has none of the towers.
        """
        present = {name: layout for name, layout in self.towers.items() if has_module(model, layout.blocks)}
        if not present:
            raise UnsupportedArchitectureError(
                f"{type(model).__name__} has none of the encoders that its family declares: {', '.join(self.towers)}. "
                "Use form='factored', which works for every architecture."
            )
        found = {name: layout.anatomy(model) for name, layout in present.items()}
        if len(found) == 1:
            return next(iter(found.values()))
        return _together(found, TOWERS.format(names=" and ".join(found)))


@dataclass(frozen=True)
class StagesLayout:
    """Stages of blocks, one behind the other, with layers between them that make another width.

    Attributes:
        stages: the ModuleList of stages.
        stage: the layout of one, `blocks` relative to it.
    """

    stages: str
    stage: EncoderLayout

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Sites and units of `model`; raises UnsupportedArchitectureError where it lacks a declared module."""
        paths = [f"{self.stages}.{s}.{self.stage.blocks}" for s in range(len(get_module(model, self.stages)))]
        found = {
            f"stage.{s}": dataclasses.replace(self.stage, blocks=path).anatomy(model) for s, path in enumerate(paths)
        }
        return _together(found, STAGES)


def _together(towers: dict[str, Anatomy], why: str) -> Anatomy:
    """One anatomy of several without their streams. No block gives what the next one of all reads, so that none is
    named.

    Args:
        why: their streams are not cut.
    """
    sites, units, attributes, fixed, scales, depth = {}, [], [], {}, {}, 0
    for name, tower in towers.items():
        inner = [site for site in tower.sites.values() if site.couple not in ("hidden", "embedding")]
        sites |= {f"{name}.{site.name}": _renamed(site, name, depth) for site in inner}
        known = {site.name for site in inner}
        units += [_without_stream(unit, name, known) for unit in tower.units if {unit.reads, unit.writes} & known]
        attributes += [dataclasses.replace(each, site=f"{name}.{each.site}") for each in tower.attributes]
        fixed, scales, depth = fixed | tower.fixed_attrs, scales | tower.softmax_scales, depth + len(tower.blocks)
    return Anatomy(
        sites=sites,
        units=tuple(units),
        blocks=(),
        attributes=tuple(attributes),
        fixed_attrs=fixed,
        softmax_scales=scales,
        refused={"hidden": why},
    )


def _renamed(site: Site, tower: str, depth: int) -> Site:
    return dataclasses.replace(
        site, name=f"{tower}.{site.name}", couple=f"{tower}.{site.couple}", depth=site.depth + depth
    )


def _without_stream(unit: Unit, tower: str, known: set[str]) -> Unit:
    reads, writes = (f"{tower}.{name}" if name in known else None for name in (unit.reads, unit.writes))
    return dataclasses.replace(unit, reads=reads, writes=writes, block=None, through=None, scaled=None)
