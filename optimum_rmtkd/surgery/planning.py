"""From what a surgeon knows to widths: by parameters, FLOPs or time, by spectral edges, and the curve of all sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from transformers import PreTrainedModel

from ..config import RMTKDConfig
from ..models import uncut_parameters
from .budget import BudgetPoint, Couple, Plan, allocate, descent, flops_of, parameters_of, speed_weight_of
from .cautions import MUCH
from .checks import positions_of
from .latency import Stopwatch
from .sites import Anatomy, Unit
from .untargeted import SHARES, curve_table, has_target, no_size, no_target


__all__ = ["Known", "moves_of", "planned"]

Price = Callable[[Mapping[str, int]], float]


class Known(Protocol):
    """What a plan is made from; a `Surgeon` knows it."""

    source: PreTrainedModel
    teacher: PreTrainedModel
    config: RMTKDConfig
    anatomy: Anatomy
    batches: Sequence[dict[str, Any]]
    stopwatch: Stopwatch | None
    trust_edges: bool
    answers: float
    loss_unit: str | None

    def couples(self, spectra: bool = False) -> list[Couple]: ...

    def doubts(self) -> dict[str, str | None]: ...

    def predicted_loss(self, couples: Mapping[str, int]) -> float | None: ...


def planned(surgeon: Known, target_reduction: float | None = None) -> Plan | None:
    """Widths by budget where there is a target, else by the spectral edges that mean something; None on a process that
    does not measure the time that is the target.

    Raises:
        BudgetError: the target cannot be reached, or already is.
        NoTargetError: no target, and no edge that says how far to cut; a tolerance alone.
    """
    config, by_budget = surgeon.config, target_reduction is not None or has_target(surgeon.config)
    couples = surgeon.couples(spectra=not by_budget or config.allocation == "edge")
    target = config.target_reduction if target_reduction is None else target_reduction
    if not by_budget:
        return _by_edges(surgeon, couples)
    if target is None and config.tolerance is not None:
        raise no_size(config, _curve(surgeon, couples))
    if target is None and config.target_latency is not None:
        return _by_time(surgeon, couples)
    parameters = parameters_of(surgeon.teacher, surgeon.anatomy)
    flops = flops_of(surgeon.teacher, surgeon.anatomy, positions_of(surgeon.teacher, surgeon.batches))
    if target is not None:
        whole = float(uncut_parameters(surgeon.source))
        goal, cost, what = (1 - target) * whole, parameters, "parameters"
    else:
        whole = flops({})
        goal, cost, what = (1 - config.target_flops) * whole, flops, "FLOPs"
    return allocate(couples, cost, _worth_in_flops(surgeon), goal, whole, config, what)


def _by_time(surgeon: Known, couples: list[Couple]) -> Plan | None:
    watch = surgeon.stopwatch
    if watch is None:
        return None
    weight = speed_weight_of(surgeon.config)
    worth = _worth(surgeon, watch.before, lambda couple: watch.within({site.name for site in couple.sites}), weight)
    return watch.plan(couples, worth)


def _by_edges(surgeon: Known, couples: list[Couple]) -> Plan:
    parameters = parameters_of(surgeon.teacher, surgeon.anatomy)
    whole, doubts, widths = parameters({}), surgeon.doubts(), {}
    for c in couples:
        sure = all(doubts.get(site.name) is None for site in c.sites)
        # two factors of a rank near the full one hold more parameters than the layer they replace
        sure = sure and not c.is_block  # a block has no spectrum
        widths[c.name] = c.rank if sure and parameters({c.name: c.rank}) < whole else c.width
    lost = surgeon.predicted_loss(widths) if surgeon.loss_unit == "nats" else None
    if not surgeon.trust_edges and (all(widths[c.name] == c.width for c in couples) or (lost or 0.0) > MUCH):
        raise no_target(surgeon.config, doubts, lost, _curve(surgeon, couples))
    return Plan(widths, [], surgeon.config.round_to)


def moves_of(surgeon: Known, couples: list[Couple], goal: float = 0.0) -> list[BudgetPoint]:
    """The moves of the budget from the model at hand down to so many parameters, or as far as they go."""
    parameters, whole = parameters_of(surgeon.teacher, surgeon.anatomy), float(uncut_parameters(surgeon.source))
    return descent(couples, parameters, _worth_in_flops(surgeon), goal, whole, surgeon.config)


def _curve(surgeon: Known, couples: list[Couple]) -> str:
    """What sizes are predicted to cost, as a table."""
    now = parameters_of(surgeon.teacher, surgeon.anatomy)({})
    whole = float(uncut_parameters(surgeon.source))
    moves = moves_of(surgeon, couples, (1 - SHARES[-1]) * whole)
    units = {
        "nats": ("nats an answer, to second order", surgeon.answers),
        "energy": ("sum of shares of the energy", 1.0),
    }
    unit, per = units.get(surgeon.loss_unit, ("mean share of a layer's energy", float(len(couples))))
    return curve_table(moves, now, whole, unit, per)


def _worth_in_flops(surgeon: Known) -> Callable[[Couple], Price]:
    teacher, anatomy = surgeon.teacher, surgeon.anatomy
    positions = positions_of(teacher, surgeon.batches)
    whole = max(flops_of(teacher, anatomy, positions)({}), 1.0)
    # decoding takes as long as it takes to read the weights: what it costs is size
    free = anatomy.answers and surgeon.config.speed_weight is None
    weight = 0.0 if free else speed_weight_of(surgeon.config)
    return _worth(surgeon, whole, lambda c: flops_of(teacher, anatomy, positions, _units_of(surgeon, c)), weight)


def _worth(
    surgeon: Known, whole: float, work_of: Callable[[Couple], Price], speed_weight: float
) -> Callable[[Couple], Price]:
    """couple -> widths -> share of the parameters and, times `speed_weight`, of the work that its layers make up.

    Args:
        whole, work_of: FLOPs, or milliseconds, of the model, and of a couple's layers by widths.
    """
    parameters = parameters_of(surgeon.teacher, surgeon.anatomy)({})

    def worth(couple: Couple) -> Price:
        size = parameters_of(surgeon.teacher, surgeon.anatomy, _units_of(surgeon, couple))
        work, weight = work_of(couple), speed_weight / whole
        return lambda widths: size(widths) / parameters + weight * work(widths)

    return worth


def _units_of(surgeon: Known, couple: Couple) -> list[Unit]:
    if couple.is_block:
        blocks = {surgeon.anatomy.blocks[site.depth] for site in couple.sites}
        return [u for u in surgeon.anatomy.units if u.block in blocks]
    names = {site.name for site in couple.sites} | ({"pooler"} if couple.name == "hidden" else set())
    return [u for u in surgeon.anatomy.units if names & {u.reads, u.writes, u.factor}]
