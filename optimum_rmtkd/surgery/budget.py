"""From spectra to widths: which sites give how much, until the model is as small as asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..config import RMTKDConfig
from ..errors import BudgetError
from ..models import count_parameters
from .sites import Anatomy, Site, Unit, get_module, is_layer, linear_shape, module_parameters, unit_delta


__all__ = [
    "BudgetPoint",
    "Couple",
    "allocate",
    "flops_of",
    "parameters_of",
    "site_widths",
    "speed_weight_of",
]

SPEED_WEIGHT, DEEP_SPEED_WEIGHT, DEEP = (
    4.0,
    1.0,
    0.85,
)  # docs/surgery.md, section 3: by latency, by accuracy, beyond that
TOLERANCE = 0.005  # overshoot of a share that a step may leave while another step fits better


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
        score: (width,) eigenvalue over noise edge of each direction, descending; empty where unknown.
        rank: width that the spectral edge asks for.
    """

    name: str
    sites: tuple[Site, ...]
    width: int
    floor: int
    step: int
    stride: int
    damage: torch.Tensor
    score: torch.Tensor
    rank: int


@dataclass(frozen=True)
class BudgetPoint:
    """One move of the allocation: what the model costs after it, the predicted loss (nats a sample, or share of energy
    without gradients), the couple that gave, and its width then."""

    cost: float
    predicted_loss: float
    couple: str
    width: int


def couple_grid(site: Site, config: RMTKDConfig) -> tuple[int, int, int]:
    """(floor, step, stride) of the widths of one group of a site.

    Heads are cut in multiples of `round_to` where they are at least four times as wide, else of a quarter of their
    width, so that narrow heads can be cut at all.
    """
    full = site.group_width
    step = min(config.round_to, max(1, full // 4)) if site.groups > 1 else min(config.round_to, full)
    floor = step if site.groups > 1 else min(full, -(-config.min_width // step) * step)
    stride = max(step, full // 64 // step * step)
    return floor, step, stride


def site_widths(couples: Mapping[str, int], anatomy: Anatomy) -> dict[str, int]:
    """{site: all features} from {couple: features of a group}; the pooler follows the stream even where it is absent.

    Factors of full rank are no cut, nor is a table's factor that is not thinner than the stream it feeds: such sites
    are left out.
    """
    stream = couples.get("hidden", float("inf"))
    widths = {}
    for site in anatomy.sites.values():
        width = couples.get(site.couple)
        factored = site.kind in ("embedding", "linear")
        if width is None or (factored and width >= min(site.width, stream if site.kind == "embedding" else width + 1)):
            continue
        widths[site.name] = width * site.groups
    if "hidden" in couples:
        widths["pooler"] = couples["hidden"]
    return widths


def _is_tied(model: nn.Module, unit: Unit) -> bool:
    """A decoder whose table is counted, and cut, elsewhere."""
    return unit.factor == "hidden"


def parameters_of(
    model: nn.Module, anatomy: Anatomy, scope: list[Unit] | None = None
) -> Callable[[Mapping[str, int]], int]:
    """A function from {couple: width} to the parameter count of the narrowed model (with `scope`: of these units)."""
    units = [
        (u, get_module(model, u.path)) for u in (anatomy.units if scope is None else scope) if is_layer(model, u.path)
    ]

    def size(unit: Unit, module: nn.Module, widths: dict[str, int]) -> int:
        delta = unit_delta(unit, module, widths)
        if _is_tied(model, unit):
            return delta.get("rank", getattr(module, "rank", 0)) * module.in_features
        return module_parameters(module, delta)

    fixed = 0 if scope is not None else count_parameters(model) - sum(size(u, m, {}) for u, m in units)

    def count(couples: Mapping[str, int]) -> int:
        widths = site_widths(couples, anatomy)
        return fixed + sum(size(u, m, widths) for u, m in units)

    return count


def flops_of(
    model: nn.Module, anatomy: Anatomy, positions: Mapping[str, float], scope: list[Unit] | None = None
) -> Callable[[Mapping[str, int]], float]:
    """A function from {couple: width} to the FLOPs of one sample, 2 a multiply-add: all linear layers, convolutions
    and attention products (with `scope`: of these units).

    Args:
        positions: {spec path: positions of a sample it is applied to}, of every layer that counts.
    """
    units = [
        (u, get_module(model, u.path)) for u in (anatomy.units if scope is None else scope) if u.path in positions
    ]
    fixed = set(positions) - {u.path for u in anatomy.units} if scope is None else ()
    units += [(Unit(path), get_module(model, path)) for path in sorted(fixed)]
    # products with the keys and with the values: 2 L^2 a feature each; queries and keys are two units that share one
    pairs = {"attention_qk": 1.0, "attention_vo": 2.0}
    attention = {s.name: pairs[s.kind] for s in anatomy.sites.values() if s.kind in pairs}

    def count(couples: Mapping[str, int]) -> float:
        widths = site_widths(couples, anatomy)
        total = 0.0
        for unit, module in units:
            shape, delta = linear_shape(module), unit_delta(unit, module, widths)
            inputs, outputs = delta.get("in", shape[0]), delta.get("out", shape[1])
            rank = delta.get("rank", getattr(module, "rank", None))
            products = inputs * outputs * shape[2] if rank is None else rank * (inputs + outputs)
            total += 2.0 * products * positions[unit.path]
            if unit.writes in attention:
                total += attention[unit.writes] * positions[unit.path] ** 2 * outputs
        return total

    return count


def speed_weight_of(config: RMTKDConfig) -> float:
    """The recipe's, or the default for its target_reduction."""
    if config.speed_weight is not None:
        return config.speed_weight
    return DEEP_SPEED_WEIGHT if (config.target_reduction or 0.0) > DEEP else SPEED_WEIGHT


def _move_price(couple: Couple, old: int, new: int, config: RMTKDConfig) -> float:
    """What a move costs in quality: the allocation takes the cheapest per unit of size."""
    if config.allocation == "loss":
        return float(couple.damage[new] - couple.damage[old])
    return float(couple.score[new:old].mean()) if len(couple.score) else 0.0


def already_met(size: float, goal: float, what: str) -> BudgetError:
    """The error for a model of `size` "parameters" or "FLOPs" that is to get `goal` of them, and is no larger now."""
    return BudgetError(
        f"The model has {size:,.0f} {what}, already no more than the {goal:,.0f} that were asked for: nothing is left "
        "to narrow. Ask for a larger reduction, or leave the model as it is."
    )


def allocate(
    couples: list[Couple],
    cost: Callable[[Mapping[str, int]], float],
    worth: Callable[[Couple], Callable[[Mapping[str, int]], float]],
    goal: float,
    whole: float,
    config: RMTKDConfig,
    what: str,
) -> tuple[dict[str, int], list[BudgetPoint]]:
    """Narrow greedily until `cost` is at most `goal`.

    Each move narrows the couple whose move is cheapest: predicted loss per unit of worth saved ("loss": the discrete
    form of one common Lagrange multiplier), eigenvalue over edge ("edge": one common multiple c of the noise edge,
    above which all sites keep), or the widest share ("uniform").

    Args:
        cost: {couple: width} -> size of the model.
        worth: couple -> {couple: width} -> what the layers that touch it are worth, in any unit: what "loss" divides
            by.
        goal, whole: size asked for, and size of the uncut model, of which shares are taken.
        what: "parameters" or "FLOPs", for the message.

    Returns:
        ({couple: width}, the moves in order).

    Raises:
        BudgetError: every couple is at its floor; names the largest reduction that can be reached.
    """
    widths = {c.name: c.width for c in couples}
    local = {c.name: worth(c) for c in couples}
    size, curve = cost(widths), []
    if size <= goal:
        raise already_met(size, goal, what)
    lost = sum(float(c.damage[c.width]) for c in couples)
    while size > goal:
        moves = [m for c in couples for m in _moves(c, widths, size, cost, local[c.name], config)]
        if not moves:
            raise BudgetError(
                f"A reduction to {goal:,.0f} {what} was asked for; with min_width={config.min_width} and the chosen "
                f"sites the model cannot get below {size:,.0f} (a reduction of "
                f"{math.floor(1e4 * (1 - size / whole)) / 1e4:.4f}). Ask for at most that, allow more sites, or lower "
                "min_width."
            )
        fitting = [m for m in moves if size - m[1] >= goal - TOLERANCE * whole]
        if fitting:
            _, saved, couple, width, price = min(fitting, key=lambda m: m[0])
        else:
            _, saved, couple, width, price = min(moves, key=lambda m: m[1])
        widths[couple.name] = width
        size -= saved
        lost += price
        curve.append(BudgetPoint(float(size), lost, couple.name, width))
    return widths, curve


def _moves(
    couple: Couple, widths: dict[str, int], size: float, cost: Callable, worth: Callable, config: RMTKDConfig
) -> list[tuple]:
    """(priority, saved, couple, new width, damage) of the one-stride and one-step moves of a couple."""
    old = widths[couple.name]
    moves = []
    for stride in {couple.stride, couple.step}:
        new = -(-(old - stride) // couple.step) * couple.step
        if new < couple.floor:
            continue
        saved = size - cost({**widths, couple.name: new})
        while saved <= 0 and new - couple.step >= couple.floor:
            # two factors save nothing above their break-even rank: jump below it
            new -= couple.step
            saved = size - cost({**widths, couple.name: new})
        if saved <= 0:
            continue
        price = _move_price(couple, old, new, config)
        damage = float(couple.damage[new] - couple.damage[old])
        if config.allocation == "loss":
            priority = price / (worth(widths) - worth({**widths, couple.name: new}))
        elif config.allocation == "edge":
            priority = price
        else:
            priority = -old / couple.width
        moves.append((priority, saved, couple, new, damage))
    return moves
