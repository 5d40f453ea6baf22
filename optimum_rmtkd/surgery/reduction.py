"""One surgery from end to end: calibrate, look at the spectra, decide the widths, cut, refit."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..config import RMTKDConfig
from ..errors import NoTargetError, RMTKDError, UnsupportedArchitectureError
from ..modeling_rmtkd import resolve_path
from ..models import Scratch, check_kind, count_parameters, scratch_for
from .budget import Plan, site_widths
from .cautions import divergence_warning
from .checks import anatomy_of
from .depth import removed_blocks
from .families import family_of
from .latency import Measurement
from .processes import broadcast_model, from_main, one_for_all
from .report import SpectralReport
from .sites import BLOCK, select_sites
from .surgeon import Surgeon
from .tolerance import Search, check_evaluate, measured, search_size
from .untargeted import asks_for_edges, has_target, whole_sites


__all__ = [
    "Reduction",
    "SiteRecord",
    "analyze",
    "block_paths",
    "check_edges",
    "narrow",
    "narrow_to",
    "narrow_within",
    "reduce",
    "stage_sites",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteRecord:
    """What one cut did to a site: its width before and after, the noise edge, and the rank above it."""

    name: str
    kind: str
    width_before: int
    width_after: int
    edge: float
    rank: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; a missing edge is None."""
        return dataclasses.asdict(self) | {"edge": self.edge if math.isfinite(self.edge) else None}


@dataclass(frozen=True)
class Reduction:
    """One cut.

    Attributes:
        model: the narrow model, in eval mode, on the device and in the dtype of the old one.
        projections: {"hidden": (d_old, d_new) fp32}: stream of the narrow model = old stream @ projection, at the
            output of every block; empty where the stream was not cut. Where that of one stack alone can be
            (Whisper's decoder), {path of each of its blocks: the same matrix}: the other blocks keep theirs.
        sites: what happened to each site that was open to this cut, also where it kept its width.
        parameters_before, parameters_after: tied parameters counted once.
        report: the spectra the widths come from.
        predicted_loss: what the cut was predicted to cost, in `loss_unit`; None where it has none.
        loss_unit: "nats", of the likelihood of an answer (a sample of a classifier, a token of a language model) to
            second order; "energy", for models without logits, the sum over sites of the share of the stream's energy
            that is lost; None for factors, which weigh each layer by itself.
        divergence: what it did cost before any training: the mean KL divergence of the narrow model's answers from the
            old one's on a few calibration batches, nats an answer (`mean_divergence`); None without logits.
        latency: where the recipe asks for a time: that of the narrow model beside the old one's.
    """

    model: PreTrainedModel
    projections: dict[str, torch.Tensor]
    sites: tuple[SiteRecord, ...]
    parameters_before: int
    parameters_after: int
    report: SpectralReport = field(repr=False)
    predicted_loss: float | None = None
    loss_unit: str | None = None
    divergence: float | None = None
    latency: Measurement | None = None


def block_paths(model: PreTrainedModel) -> tuple[str, ...]:
    """Absolute module paths of the residual blocks, whose outputs are the residual stream, in forward order.

    Raises:
        UnsupportedArchitectureError: no family is registered for the model, or it has several streams.
    """
    if not (blocks := family_of(model).layout.anatomy(model).blocks):
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} has several residual streams, and no one list of blocks. Name the layers to "
            "compare (`layers` of an objective takes a mapping of module paths)."
        )
    return tuple(resolve_path(model, path) for path in blocks)


def stage_sites(model: PreTrainedModel, config: RMTKDConfig) -> list[list[str]]:
    """Names of the sites a recipe cuts, grouped layer by layer, shallow to deep (the paper's order)."""
    anatomy = anatomy_of(model, config)
    chosen = [site for site in select_sites(anatomy, config.sites) if site.chosen and site.kind != BLOCK]
    depths = sorted({site.depth for site in chosen})
    return [[site.name for site in chosen if site.depth == depth] for depth in depths]


def analyze(
    model: PreTrainedModel, dataloader: Iterable, config: RMTKDConfig | None = None, *, progress: bool = True
) -> SpectralReport:
    """Spectra of a model's sites and the widths that a recipe would give them; nothing is cut.

    Args:
        model: any supported PreTrainedModel; left untouched.
        dataloader: yields mappings of model inputs; the first `config.calibration_samples` samples are used.

    Raises:
        UnsupportedArchitectureError, CalibrationError, BudgetError: see `optimum_rmtkd.errors`.
    """
    config = _arguments(model, config)
    surgeon = Surgeon(model, dataloader, config, progress=progress, thorough=True, **_targets(config))
    try:
        plan, note = surgeon.plan(), "" if has_target(config) else whole_sites(surgeon.doubts())
    except NoTargetError as error:
        plan, note = Plan({}, [], config.round_to), str(error)
    return dataclasses.replace(surgeon.report(*plan), note=note)


def check_edges(
    model: PreTrainedModel,
    dataloader: Iterable,
    config: RMTKDConfig,
    *,
    accelerator: Any = None,
    progress: bool = True,
) -> tuple[str, ...] | None:
    """Whether a recipe without a target says how far to cut a model, asked before anything is trained.

    It costs a calibration. With several processes each passes its own data, as for `reduce`.

    Returns:
        Names of the sites whose spectral edge decides, in the order of the network; None where a target, or an
        estimator that the user named, leaves no question (nothing is computed then).

    Raises:
        NoTargetError: the edge of no site means anything; the message shows what sizes are predicted to cost.
        UnsupportedArchitectureError, CalibrationError: as for `analyze`.
    """
    config = _arguments(model, config)
    if has_target(config) or asks_for_edges(config) or config.schedule == "none":
        return None
    surgeon = Surgeon(model, dataloader, config, None, accelerator, progress, trust_edges=False, null_moments=True)
    with one_for_all(accelerator):
        surgeon.plan()
    return from_main(tuple(name for name, why in surgeon.doubts().items() if why is None), accelerator)


def narrow(
    model: PreTrainedModel,
    dataloader: Iterable,
    config: RMTKDConfig | None = None,
    *,
    evaluate: Callable[[PreTrainedModel], float] | None = None,
    greater_is_better: bool = True,
    progress: bool = True,
    scratch: str | Path | Scratch | None = None,
) -> PreTrainedModel:
    """One cut, no training: a new, narrow model; `model` is left bit-identical.

    A model whose answers lie far from those of the old one draws a warning (`divergence_warning`), and one that misses
    the recipe's `target_latency` by more than a tenth another.

    Args:
        model, dataloader, config, progress: as for `analyze`.
        evaluate: for a recipe with `tolerance`, which needs it: the validation metric of a model in eval mode. It is
            asked about `model` and about each size that is tried, some seven of them; the table of them is printed
            with `progress`.
        greater_is_better: False where that metric is to be small, as a loss or a perplexity is.
        scratch: a folder on a disk, for models that memory has no room to cut: copies of the model, moments, and what
            is made of them lie in files there, and backward passes compute each block twice, so that what has to be in
            memory at a time is that of one block. Same widths, same weights; the model must be on the host, and
            that of the result are mapped from a file. See `narrow_streamed`, which loads and saves, too.

    Raises:
        NoTargetError: a recipe without a target where the spectra do not say how far to cut.
        LatencyError: no widths are as quick as `target_latency` asks.
        BudgetError: no size keeps the tolerance; and as for `analyze`, whose other errors are raised, too.
        RMTKDError: a recipe with `schedule="none"`, which cuts nothing; `evaluate` without `tolerance`, or the
            reverse; an `evaluate` that returns no finite number of the uncut model.
    """
    config = _arguments(model, config)
    if config.schedule == "none":
        raise RMTKDError("schedule='none' cuts nothing, and narrow is one cut: leave the schedule out.")
    if config.tolerance is not None or evaluate is not None:
        check_evaluate(config, evaluate)
        search = _search(model, dataloader, config, evaluate, greater_is_better, progress, scratch)
        if progress:
            print(search.table())
        _warn_of(search.surgeon.divergence(search.found.student))
        return search.found.student
    # nobody sees the spectra: they are not computed where a budget decides
    options = {"trust_edges": asks_for_edges(config), "reported": False, "scratch": scratch}
    done = _cut(model, dataloader, config, progress=progress, **options)
    if has_target(config):  # else _cut has looked at it
        _warn_of(done.divergence)
    return done.student


def narrow_within(
    model: PreTrainedModel,
    dataloader: Iterable,
    config: RMTKDConfig,
    evaluate: Callable[[PreTrainedModel], float],
    *,
    greater_is_better: bool = True,
    progress: bool = True,
) -> tuple[Reduction, Search]:
    """The smallest model that keeps the recipe's tolerance, untrained, with all that is known of the cut, and the path
    to it. Arguments and errors as for `narrow`."""
    config = _arguments(model, config)
    check_evaluate(config, evaluate)
    search = _search(model, dataloader, config, evaluate, greater_is_better, progress)
    surgeon, found = search.surgeon, search.found
    report = surgeon.report(found.couples, list(found.curve), config.round_to)
    costs = surgeon.predicted_loss(found.couples), surgeon.divergence(found.student)
    plan = Plan(found.couples, list(found.curve), config.round_to)
    return _reduction(model, _Cut(surgeon, plan, found.student, found.projections, report, *costs)), search


def _search(
    model: PreTrainedModel,
    dataloader: Iterable,
    config: RMTKDConfig,
    evaluate: Callable[[PreTrainedModel], float],
    greater_is_better: bool,
    progress: bool,
    scratch: str | Path | Scratch | None = None,
) -> Search:
    files = scratch_for(model, scratch)
    baseline = measured(evaluate, model)  # what is wrong with it should show now
    surgeon = Surgeon(model, dataloader, config, progress=progress, scratch=files)
    return search_size(surgeon, evaluate, baseline, greater_is_better)


def narrow_to(
    model: PreTrainedModel,
    dataloader: Iterable,
    couples: dict[str, int],
    config: RMTKDConfig,
    *,
    progress: bool = True,
) -> PreTrainedModel:
    """Narrow to given widths, {couple: features of a group} (a site's `couple` names it), instead of found ones."""
    config = _arguments(model, config)
    anatomy = anatomy_of(model, config)
    known = {site.couple: site.group_width for site in anatomy.sites.values()}
    blocks = {site.couple for site in anatomy.block_sites.values()}
    wrong = {n: width for n, width in couples.items() if not (n not in blocks) <= width <= known.get(n, -1)}
    if wrong:
        raise RMTKDError(f"Widths {wrong}: expected a couple and at most its width a group, of {known}.")
    names = [site.name for site in anatomy.sites.values() if site.couple in couples]
    return Surgeon(model, dataloader, config, names, progress=progress).operate(dict(couples), last=True)[0]


def reduce(
    model: PreTrainedModel,
    dataloader: Iterable,
    config: RMTKDConfig,
    *,
    target_reduction: float | None = None,
    sites: Iterable[str] | None = None,
    accelerator: Any = None,
    progress: bool = True,
    trust_edges: bool | None = None,
) -> Reduction:
    """One cut, with all that a trainer wants to know of it; `model` is left untouched.

    The report wants the spectra of all sites, an eigendecomposition and more of each, which `narrow` does without.

    Args:
        target_reduction: overrides the recipe's; like it, a share of the parameters before the first cut.
        sites: names of the sites to cut now; default: the recipe's.
        accelerator: with several processes, each passes its own data; moments are summed over all, the main process
            decides, every process cuts and refits on the data of all, and every one returns the main process's
            weights.
        trust_edges: without a target, take every spectral edge as it is. None: where the recipe names an edge
            estimator, and for schedule="layerwise", whose edges decide whatever the target. Else only sites with a
            separated bulk of noise are cut, and the others keep their width (`spectra.separation`).

    Raises:
        UnsupportedArchitectureError, CalibrationError, BudgetError, RMTKDError: see `optimum_rmtkd.errors`.
        NoTargetError: no target, edges that are not trusted, and none of them means anything.
    """
    config = _arguments(model, config)
    if trust_edges is None:
        trust_edges = asks_for_edges(config) or config.schedule == "layerwise"
    return _reduction(
        model, _cut(model, dataloader, config, target_reduction, sites, accelerator, progress, trust_edges)
    )


def _reduction(model: PreTrainedModel, done: _Cut) -> Reduction:
    """What is told of a cut that was made and reported."""
    widths = site_widths(done.plan.couples, done.surgeon.anatomy)
    records = tuple(
        SiteRecord(s.name, s.kind, s.width, s.planned, s.subspace.edge, s.subspace.rank)
        for s in done.report.sites
        if s.name in widths or not s.planned
    )
    numbers = {*removed_blocks(done.surgeon.anatomy, done.plan.couples)}
    records += tuple(  # a block has no spectrum
        SiteRecord(site.name, site.kind, 1, int(site.depth not in numbers), math.nan, 1)
        for site in done.surgeon.sites
        if site.kind == BLOCK
    )
    sizes = count_parameters(model), count_parameters(done.student)
    costs = done.predicted_loss, done.surgeon.loss_unit, done.divergence
    return Reduction(done.student, done.projections, records, *sizes, done.report, *costs, done.latency)


@dataclass(frozen=True)
class _Cut:
    """A cut that was made; `report` where it was asked for, the rest as in `Reduction`."""

    surgeon: Surgeon
    plan: Plan
    student: PreTrainedModel
    projections: dict[str, torch.Tensor]
    report: SpectralReport | None
    predicted_loss: float | None
    divergence: float | None
    latency: Measurement | None = None


def _arguments(model: Any, config: Any) -> RMTKDConfig:
    """The recipe, where these are a model and a recipe, or none: looked at before anything is read from them.

    Raises:
        RMTKDError: something else.
    """
    check_kind(model)
    return RMTKDConfig.taken(config)


def _targets(config: RMTKDConfig, target_reduction: float | None = None) -> dict[str, Any]:
    """What a surgeon checks before the calibration; `target_reduction` overrides the recipe's targets."""
    asked = config.target_reduction if target_reduction is None else target_reduction
    if asked is not None:
        return {"target_reduction": asked}
    return {"target_flops": config.target_flops, "timed": config.target_latency is not None}


def _cut(
    model: PreTrainedModel,
    dataloader: Iterable,
    config: RMTKDConfig,
    target_reduction: float | None = None,
    sites: Iterable[str] | None = None,
    accelerator: Any = None,
    progress: bool = True,
    trust_edges: bool = False,
    reported: bool = True,
    scratch: str | Path | Scratch | None = None,
) -> _Cut:
    by_edge = target_reduction is None and not has_target(config)
    options = _targets(config, target_reduction) | {
        "null_moments": by_edge and not trust_edges,
        "trust_edges": trust_edges,
        "scratch": scratch_for(model, scratch),
    }
    surgeon = Surgeon(model, dataloader, config, sites, accelerator, progress, **options)
    with one_for_all(accelerator):
        plan = surgeon.plan(target_reduction)
    plan = from_main(plan, accelerator)
    with one_for_all(accelerator):
        # before the cut: what is wrong with a spectrum should show now, and the moments are not needed after it
        report = surgeon.report(*plan) if reported else None
        student, projections = surgeon.operate(plan.couples, last=True)
    broadcast_model(student, projections, accelerator)
    with one_for_all(accelerator):
        predicted = surgeon.predicted_loss(plan.couples) if reported or by_edge else None
        time = None if surgeon.stopwatch is None else surgeon.stopwatch.verify(student, plan.couples)
        costs = predicted, surgeon.divergence(student), time
    predicted, divergence, time = from_main(costs, accelerator)
    if time is not None and (accelerator is None or accelerator.is_main_process):
        (logger.info if time.met else logger.warning)("%s.", time.words())
    # one layer of many (schedule="layerwise") is no cut to judge by itself
    if by_edge and sites is None and (accelerator is None or accelerator.is_main_process):
        _say_of_edges(surgeon, predicted if surgeon.loss_unit == "nats" else None, divergence)
    return _Cut(surgeon, plan, student, projections, report, predicted, divergence, time)


def _say_of_edges(surgeon: Surgeon, *nats: float | None) -> None:
    """Which sites keep their width, and a warning where the edges cost much, predicted or measured."""
    if kept := whole_sites(surgeon.doubts()):
        logger.warning(kept)
    _warn_of(max((value for value in nats if value is not None), default=None))


def _warn_of(nats: float | None) -> None:
    if text := divergence_warning(nats):
        logger.warning(text)
