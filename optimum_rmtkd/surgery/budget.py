"""From spectra to widths: which sites give how much, until the model is as small as asked."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..config import RMTKDConfig
from ..errors import BudgetError
from .costs import Additive, flops_of, parameters_of, site_widths
from .couples import Couple, change, couple_grid, predicted
from .sites import BLOCK, Site


__all__ = [
    "BudgetPoint",
    "Couple",
    "Plan",
    "allocate",
    "check_reachable",
    "couple_grid",
    "descent",
    "flops_of",
    "parameters_of",
    "predicted",
    "site_widths",
    "smallest_widths",
    "speed_weight_of",
]

logger = logging.getLogger(__name__)

SPEED_WEIGHT, DEEP_SPEED_WEIGHT, DEEP = (
    4.0,
    1.0,
    0.85,
)  # docs/surgery.md, section 3: by latency, by accuracy, beyond that
TOLERANCE = 0.005  # overshoot of a share that a step may leave while another step fits better
MET = 0.01  # of the uncut model: a plan that goes further beyond its target than this is made again in smaller steps


@dataclass(frozen=True)
class BudgetPoint:
    """One move of the allocation: what the model costs after it, the predicted loss (nats a sample, or share of energy
    without gradients), the couple that gave, and its width then."""

    cost: float
    predicted_loss: float
    couple: str
    width: int


class Plan(NamedTuple):
    """What an allocation decides.

    Attributes:
        couples: {couple: features of a group}.
        curve: the moves in order; empty where the spectral edges decide.
        round_to: what widths are multiples of: the recipe's, or less where that would have missed the target.
    """

    couples: dict[str, int]
    curve: list[BudgetPoint]
    round_to: int


def speed_weight_of(config: RMTKDConfig) -> float:
    """The recipe's, or the default for its target_reduction."""
    if config.speed_weight is not None:
        return config.speed_weight
    return DEEP_SPEED_WEIGHT if (config.target_reduction or 0.0) > DEEP else SPEED_WEIGHT


def _move_price(
    couples: list[Couple], couple: Couple, new: int, widths: Mapping[str, int], config: RMTKDConfig
) -> float:
    """What a move costs in quality: the allocation takes the cheapest per unit of size."""
    old = widths[couple.name]
    if config.allocation == "loss":
        return change(couples, couple, new, widths)
    return float(couple.score[new:old].mean()) if len(couple.score) else 0.0


def _already_met(size: float, goal: float, whole: float, what: str) -> BudgetError:
    """The error for a model of `size` "parameters" or "FLOPs", of `whole` ones before its first cut, that is to get
    `goal` of them, and is no larger now."""
    gone = 1 - size / whole
    cure = "Ask for a larger reduction, or leave the model as it is."
    if gone > 0:
        cure = (
            f"A target counts from the uncut model, which had {whole:,.0f}: {gone:.1%} of them are gone already, and "
            f"{1 - goal / whole:.1%} are asked for. {cure}"
        )
    return BudgetError(
        f"The model has {size:,.0f} {what}, already no more than the {goal:,.0f} that were asked for: nothing is left "
        f"to narrow. {cure}"
    )


def check_reachable(
    sites: list[Site],
    cost: Callable[[Mapping[str, int]], float],
    goal: float,
    whole: float,
    config: RMTKDConfig,
    what: str,
) -> None:
    """Refuse a size that no widths can give, before anything is computed.

    Args:
        sites: those that may be cut. cost: {couple: width} -> size. goal, whole, what: as for `allocate`.

    Raises:
        BudgetError: the model is no larger than `goal` now, or larger than that with every site at its floor.
    """
    size = cost({})
    if size <= goal:
        raise _already_met(size, goal, whole, what)
    if (least := cost(smallest_widths(sites, cost, config))) > goal:
        raise _beyond_reach(goal, least, whole, config, what)


def smallest_widths(
    sites: list[Site], cost: Callable[[Mapping[str, int]], float], config: RMTKDConfig
) -> dict[str, int]:
    """{couple: width} of the model that costs least, in steps of single features."""
    finest = config.replace(round_to=1)
    leads = {site.couple: site for site in sites if site.chosen}
    widths = {name: site.group_width for name, site in leads.items()}
    for _ in range(2):  # two thin factors can be larger than the layer that they replace: each site is tried
        for name, site in leads.items():
            # the floor first: in a block that is gone all widths cost the same, and one of the blocks comes back
            tries = [{**widths, name: width} for width in (couple_grid(site, finest)[0], site.group_width)]
            widths = min(tries, key=cost)
    blocks = [name for name, site in leads.items() if site.kind == BLOCK]
    if blocks and len(blocks) == len(cost.anatomy.blocks):  # one stays, the smallest
        widths = min(({**widths, name: 1} for name in blocks), key=cost)
    return widths


def allocate(
    couples: list[Couple],
    cost: Callable[[Mapping[str, int]], float],
    worth: Callable[[Couple], Callable[[Mapping[str, int]], float]],
    goal: float,
    whole: float,
    config: RMTKDConfig,
    what: str,
    near: float = MET,
) -> Plan:
    """Narrow greedily until `cost` is at most `goal`, and no more than `near` of `whole` beyond it.

    Each move narrows the couple whose move is cheapest: predicted loss per unit of worth saved ("loss": the discrete
    form of one common Lagrange multiplier), eigenvalue over edge ("edge": one common multiple c of the noise edge,
    above which all sites keep), or the widest share ("uniform"). Where multiples of `round_to` miss the goal, it is
    planned anew with multiples of half of it, and so on; the last resort is to put the move that went too far first
    and to keep more of all others.

    Args:
        cost: {couple: width} -> size of the model.
        worth: couple -> {couple: width} -> what the layers that touch it are worth, in any unit: what "loss" divides
            by.
        goal, whole: size asked for, and size of the uncut model, of which shares are taken.
        what: "parameters" or "FLOPs", for the message.
        near: share of `whole` that a plan may go beyond the goal without being made again in smaller steps.

    Blocks go like widths do, which is no more than a greedy choice: what it comes to is held against a plan of widths
    alone, and the one of less predicted loss is taken.

    Returns:
        The plan nearest to the goal: where single features are too coarse for it, it may be further off than `near`.

    Raises:
        BudgetError: every couple is at its floor; names the largest reduction that can be reached.
    """
    size = cost({c.name: c.width for c in couples})
    if size <= goal:
        raise _already_met(size, goal, whole, what)
    plans, failure = [], None
    widths_alone = [c for c in couples if not c.is_block]
    for chosen in (couples, widths_alone) if widths_alone and len(widths_alone) < len(couples) else (couples,):
        try:
            plans.append(_planned(chosen, cost, worth, goal, whole, config, near))
        except _Stuck as stuck:
            failure = failure or stuck
    if not plans:
        raise _beyond_reach(goal, failure.size, whole, config, what)
    best = min(plans, key=lambda plan: plan.curve[-1].predicted_loss)
    best = best._replace(couples={c.name: c.width for c in couples} | best.couples)
    _say(best, goal, whole, config, what, near)
    return best


def _planned(
    couples: list[Couple],
    cost: Callable[[Mapping[str, int]], float],
    worth: Callable[[Couple], Callable[[Mapping[str, int]], float]],
    goal: float,
    whole: float,
    config: RMTKDConfig,
    near: float,
) -> Plan:
    """One plan of `allocate`; raises _Stuck where these couples cannot reach the goal."""
    local = {c.name: worth(c) for c in couples}
    nearest, last, failure = None, None, None
    for round_to, pinned in _tries(config.round_to, lambda: last):
        recipe = config.replace(round_to=round_to)
        try:
            curve, widths = _descend([c.on_grid(recipe) for c in couples], pinned, cost, local, goal, whole, recipe)
        except _Stuck as stuck:
            failure, last = stuck, None
            continue
        last = curve[-1]
        if nearest is None or last.cost > nearest.curve[-1].cost:
            nearest = Plan(widths, curve, round_to)
        if last.cost >= goal - near * whole:
            break
    if nearest is None:
        raise failure
    return nearest


class _Stuck(Exception):
    """Every couple is at its floor; `size` is what is left of the model then, `curve` the moves that led there."""

    def __init__(self, size: float, curve: list[BudgetPoint]):
        super().__init__(size)
        self.size, self.curve = size, curve


def descent(
    couples: list[Couple],
    cost: Callable[[Mapping[str, int]], float],
    worth: Callable[[Couple], Callable[[Mapping[str, int]], float]],
    goal: float,
    whole: float,
    config: RMTKDConfig,
) -> list[BudgetPoint]:
    """The moves of `allocate` in steps of `round_to`, towards `goal` and as far as they go: what sizes cost, for
    somebody who has not asked for one yet."""
    try:
        return _descend(couples, {}, cost, {c.name: worth(c) for c in couples}, goal, whole, config)[0]
    except _Stuck as stuck:
        return stuck.curve


def _tries(round_to: int, last_move: Callable[[], BudgetPoint | None]) -> Iterator[tuple[int, dict[str, int]]]:
    """(round_to, {couple: width taken first and kept}): halves down to 1, then with the moves that went too far
    pinned one by one."""
    while True:
        yield round_to, {}
        if round_to == 1:
            break
        round_to //= 2
    pinned: dict[str, int] = {}
    while (move := last_move()) and move.couple not in pinned:
        pinned = {**pinned, move.couple: move.width}
        yield 1, pinned


def _beyond_reach(goal: float, size: float, whole: float, config: RMTKDConfig, what: str) -> BudgetError:
    return BudgetError(
        f"A reduction to {goal:,.0f} {what} was asked for; with min_width={config.min_width} and the chosen sites the "
        f"model cannot get below {size:,.0f} (a reduction of {math.floor(1e4 * (1 - size / whole)) / 1e4:.4f}). Ask "
        "for at most that, allow more sites, or lower min_width."
    )


def _say(plan: Plan, goal: float, whole: float, config: RMTKDConfig, what: str, near: float) -> None:
    if plan.round_to < config.round_to:
        logger.warning(
            "Widths are multiples of %d: with round_to=%d the target would have been missed by more than %g %% of the "
            "%s.",
            plan.round_to,
            config.round_to,
            100 * near,
            what,
        )
    reached = plan.curve[-1].cost
    if reached < goal - near * whole or whole - reached > 2 * (whole - goal):
        logger.warning(
            "%.3g %% of the %s are removed where %.3g %% were asked for: single features of the chosen sites are too "
            "coarse for less. More sites come nearer.",
            100 * (1 - reached / whole),
            what,
            100 * (1 - goal / whole),
        )


def _descend(
    couples: list[Couple],
    pinned: Mapping[str, int],
    cost: Callable[[Mapping[str, int]], float],
    local: Mapping[str, Callable[[Mapping[str, int]], float]],
    goal: float,
    whole: float,
    config: RMTKDConfig,
) -> tuple[list[BudgetPoint], dict[str, int]]:
    """(moves, widths) from full width down to `goal`; `pinned` couples are moved at once and then left alone.

    Raises:
        _Stuck: every couple is at its floor.
    """
    widths = {c.name: c.width for c in couples}
    size, curve = cost(widths), []
    lost = predicted(couples, widths)
    blocks = {c.name for c in couples if c.is_block}
    spare = len(cost.anatomy.blocks) - len(blocks) if blocks else 0  # that are not up for choice

    def take(couple: Couple, width: int, saved: float) -> None:
        nonlocal size, lost
        lost += change(couples, couple, width, widths)
        widths[couple.name] = width
        size -= saved
        curve.append(BudgetPoint(float(size), lost, couple.name, width))

    for couple in couples:
        if couple.name in pinned:
            take(couple, pinned[couple.name], size - cost({**widths, couple.name: pinned[couple.name]}))
    free = [c for c in couples if c.name not in pinned]
    everything = {c.name for c in free}
    offered: dict[str, list[tuple]] = {}
    while size > goal:
        for c in free:
            if c.name in blocks and spare + sum(widths[name] for name in blocks) == 1:
                offered[c.name] = []  # the last one
            if c.name not in offered:
                offered[c.name] = _moves(couples, c, widths, size, cost, local[c.name], config)
        moves = [m for c in free for m in offered[c.name]]
        if not moves:
            raise _Stuck(size, curve)
        fitting = [m for m in moves if size - m[1] >= goal - TOLERANCE * whole]
        if fitting:
            _, saved, couple, width = min(fitting, key=lambda m: m[0])
        else:
            _, saved, couple, width = _least_too_far(moves, TOLERANCE * whole)
        take(couple, width, saved)
        # what the others offer is what it was, unless a unit of theirs is one of this couple's, too
        for name in cost.neighbours(couple.name) if isinstance(cost, Additive) else everything:
            offered.pop(name, None)
        for name in blocks if couple.name in blocks else ():  # what they lose together
            offered.pop(name, None)
    return curve, widths


def _least_too_far(moves: list[tuple], near: float) -> tuple:
    """Of moves that all go too far the one that saves least; of blocks, which are about as large as each other, the
    cheapest of those that save no more than `near` beyond that."""
    least = min(moves, key=lambda m: (m[1], m[0]))
    alike = [m for m in moves if m[2].is_block and m[1] <= least[1] + near] if least[2].is_block else [least]
    return min(alike, key=lambda m: m[0])


def _moves(
    couples: list[Couple],
    couple: Couple,
    widths: dict[str, int],
    size: float,
    cost: Callable,
    worth: Callable,
    config: RMTKDConfig,
) -> list[tuple]:
    """(priority, saved, couple, new width) of the one-stride and one-step moves of a couple."""
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
        price = _move_price(couples, couple, new, widths, config)
        if config.allocation == "loss":
            priority = price / (worth(widths) - worth({**widths, couple.name: new}))
        elif config.allocation == "edge":
            priority = price
        else:
            priority = -old / couple.width
        moves.append((priority, saved, couple, new))
    return moves
