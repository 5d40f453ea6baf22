"""Widths that are decided together: their grid, and what is predicted to be lost at each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..config import RMTKDConfig
from .sites import BLOCK, Site


__all__ = ["Couple", "change", "couple_grid", "group_means", "predicted"]

HEADS = 8  # a head may be narrower than another site by this factor


@dataclass(frozen=True)
class Couple:
    """Sites that share one width a group.

    Attributes:
        name: see `Site.couple`.
        sites: its members.
        width: features of a group now.
        floor: the smallest width it may get.
        step: widths are multiples of this, the full width excepted.
        stride: how far one move of the allocation goes, a multiple of `step`.
        damage: (width + 1,) fp64 predicted loss by width, summed over members.
        inside: {couple of a block: what of the damage is in that block, (width + 1,)}: nothing once it is gone.
        beside: of a block, {couple of another one: what is lost beyond the damage of both, where both are gone}.
        score: (width,) eigenvalue over noise edge of each direction, descending; empty where nothing reads it.
        rank: width that the spectral edge asks for; None where nothing reads it.
    """

    name: str
    sites: tuple[Site, ...]
    width: int
    floor: int
    step: int
    stride: int
    damage: torch.Tensor
    score: torch.Tensor
    rank: int | None
    inside: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    beside: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def is_block(self) -> bool:
        """Whether it is a whole block, all or nothing."""
        return any(site.kind == BLOCK for site in self.sites)

    def loss(self, width: int, widths: Mapping[str, int]) -> float:
        """Predicted loss at this width, where the others have those of {couple: width}."""
        lost = float(self.damage[width])
        for block, damage in self.inside.items():
            lost -= float(damage[width]) if widths.get(block) == 0 else 0.0
        return lost

    def on_grid(self, config: RMTKDConfig) -> Couple:
        """The same with the floor, step and stride of another recipe."""
        lead = next(site for site in self.sites if site.chosen)
        floor, step, stride = couple_grid(lead, config)
        return dataclasses.replace(self, floor=floor, step=step, stride=stride)


def couple_grid(site: Site, config: RMTKDConfig) -> tuple[int, int, int]:
    """(floor, step, stride) of the widths of one group of a site.

    Heads are cut in multiples of `round_to` where they are at least four times as wide, else of a quarter of their
    width, so that narrow heads can be cut at all; none is narrower than an eighth of `min_width`. Where one width is
    that of a head and, times their number, that of the stream, the stream is a multiple of `round_to`.
    """
    full = site.group_width
    if site.kind == BLOCK:
        return 0, 1, 1
    if site.kind == "attention_groups":  # whole groups, down to the last one
        return 1, 1, 1
    if site.kind == "hidden" and site.groups > 1:
        step = min(config.round_to // math.gcd(config.round_to, site.groups), max(1, full // 4))
        least = max(-(-config.min_width // HEADS), -(-config.min_width // site.groups))
        return _grid(full, step, least)
    step = min(config.round_to, max(1, full // 4)) if site.groups > 1 else min(config.round_to, full)
    least = -(-config.min_width // HEADS) if site.groups > 1 else config.min_width
    return _grid(full, step, least)


def _grid(full: int, step: int, least: int) -> tuple[int, int, int]:
    return min(full, -(-least // step) * step), step, max(step, full // 64 // step * step)


def predicted(couples: list[Couple], widths: Mapping[str, int]) -> float:
    """Loss of all cuts together: of what is inside a block that is gone, that of the block alone."""
    gone = {c.name for c in couples if c.is_block and widths[c.name] == 0}
    together = sum(more for c in couples if c.name in gone for name, more in c.beside.items() if name in gone)
    return sum(c.loss(widths[c.name], widths) for c in couples) + together / 2


def change(couples: list[Couple], couple: Couple, new: int, widths: Mapping[str, int]) -> float:
    """What a move adds to the predicted loss."""
    if not couple.is_block:
        return couple.loss(new, widths) - couple.loss(widths[couple.name], widths)
    return predicted(couples, {**widths, couple.name: new}) - predicted(couples, widths)


def group_means(values: torch.Tensor, site: Site) -> torch.Tensor:
    """(width,) descending values -> (group_width,): heads are cut alike, so their k-th directions go together."""
    return values[: site.width].reshape(site.group_width, site.groups).mean(1)
