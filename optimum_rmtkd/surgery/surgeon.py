"""Everything known about one model before it is cut: moments, directions, spectra, a plan; and the operation
itself."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..batches import batch_size, evaluating, run
from ..config import RMTKDConfig
from ..errors import CalibrationError, RMTKDError, UnsupportedArchitectureError
from ..models import (
    carry_over,
    check_behaviour,
    check_structure,
    count_parameters,
    provenance_of,
    twin_of,
    uncut_parameters,
)
from ..spectra import SecondMoments, SignalSubspace, signal_subspace
from ..spectra.edges import find_estimator
from .budget import (
    BudgetPoint,
    Couple,
    Plan,
    allocate,
    check_reachable,
    couple_grid,
    flops_of,
    parameters_of,
    site_widths,
    speed_weight_of,
)
from .calibration import Calibration, calibrate, features_last, observed, points_of
from .directions import Directions, site_directions
from .families import family_of
from .grouping import by_length
from .layouts import factored_anatomy
from .likelihood import gives_likelihood
from .narrowing import Cuts, build_student, fold_norms, initialise
from .processes import all_batches, one_for_all, several, share_of
from .refit import refit
from .report import SiteSpectrum, SpectralReport
from .sites import Anatomy, Point, Site, Unit, get_module, linear_layers, select_sites
from .tracing import with_traced_reads
from .tryout import checked_batches


__all__ = ["Surgeon", "anatomy_of", "check_data", "check_recipe"]

TOO_NARROW = 12  # features under which no edge estimator finds a bulk to fit


def anatomy_of(model: PreTrainedModel, config: RMTKDConfig) -> Anatomy:
    """Sites and units of a model in the form of the recipe; raises UnsupportedArchitectureError."""
    if config.form == "factored":
        return factored_anatomy(model)
    return family_of(model).layout.anatomy(model)


def check_recipe(model: PreTrainedModel, config: RMTKDConfig) -> None:
    """Refuse what cannot work before anything is computed.

    Raises:
        UnsupportedArchitectureError, RMTKDError: a model that its class and config do not describe
            (`models.check_structure`); no family; an unknown site or edge estimator.
        CalibrationError: weights that are not finite; names the first tensor.
        BudgetError: a model that is already as small as asked for, or cannot get so small.
    """
    check_structure(model)
    anatomy = anatomy_of(model, config)
    sites = select_sites(anatomy, config.sites)
    find_estimator(config.edge_estimator)
    _check_finite(model)
    _check_parameters(model, anatomy, sites, config, config.target_reduction)


def _check_finite(model: PreTrainedModel) -> None:
    broken = [name for name, tensor in model.named_parameters() if not bool(tensor.isfinite().all())]
    if broken:
        raise CalibrationError(
            f"{len(broken)} tensor(s) of {type(model).__name__} hold NaN or infinite values, the first is "
            f"{broken[0]}: expected finite weights. The training diverged, or the file is damaged; take another "
            "checkpoint."
        )


def check_data(model: PreTrainedModel, dataloader: Iterable, config: RMTKDConfig) -> None:
    """Refuse data that cannot calibrate a cut of `model`, by its first batches and forward passes over a few of them;
    and a model that on these does something else than its class and config describe.

    Raises:
        CalibrationError, UnsupportedArchitectureError: names what the data holds, what was expected, what to do.
        BudgetError: no widths have as few FLOPs as `target_flops` leaves.
    """
    anatomy = anatomy_of(model, config)
    sites = select_sites(anatomy, config.sites)
    batches = checked_batches(model, dataloader, config.calibration_samples, anatomy, sites)
    check_behaviour(model, batches[0])
    if config.target_flops is not None:
        with evaluating(model):
            batches = by_length(model, batches, points_of(anatomy, sites))
            _check_flops(model, anatomy, sites, batches, config, config.target_flops)


def _check_parameters(
    model: PreTrainedModel, anatomy: Anatomy, sites: list[Site], config: RMTKDConfig, target: float | None
) -> None:
    if target is not None:
        whole = uncut_parameters(model)
        check_reachable(sites, parameters_of(model, anatomy), (1 - target) * whole, whole, config, "parameters")


def _check_flops(
    model: PreTrainedModel,
    anatomy: Anatomy,
    sites: list[Site],
    batches: list[dict[str, Any]],
    config: RMTKDConfig,
    target: float | None,
) -> None:
    if target is not None:
        flops = flops_of(model, anatomy, _positions(model, batches))
        check_reachable(sites, flops, (1 - target) * flops({}), flops({}), config, "FLOPs")


class Surgeon:
    """Everything known about one model before it is cut; `plan` and `operate` are the two things to do with it.

    `thorough` adds the diagnostics that cost more time: the overlap of two halves of the data, and the null moments
    that the estimator "signflip" needs. A `target_reduction` that is out of reach is refused (BudgetError) before any
    data is read, a `target_flops` before the calibration; `plan` is asked for them again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dataloader: Iterable,
        config: RMTKDConfig,
        sites: Iterable[str] | None = None,
        accelerator: Any = None,
        progress: bool = True,
        thorough: bool = False,
        target_reduction: float | None = None,
        target_flops: float | None = None,
    ):
        check_structure(model)
        find_estimator(config.edge_estimator)
        self.source, self.config, self.progress, self.thorough = model, config, progress, thorough
        self.anatomy = anatomy_of(model, config)
        wanted = config.sites if sites is None else tuple(sites)
        self.sites = select_sites(self.anatomy, wanted)
        _check_parameters(model, self.anatomy, self.sites, config, target_reduction)
        with one_for_all(accelerator):
            _check_finite(model)
            share = share_of(config.calibration_samples, accelerator)
            batches = checked_batches(model, dataloader, share, self.anatomy, self.sites)
            check_behaviour(model, batches[0])
            twin = twin_of(model)
            if any(site.kind == "hidden" for site in self.sites):
                self.anatomy = with_traced_reads(twin, self.anatomy, batches[0])
                self.sites = select_sites(self.anatomy, wanted)
            self.teacher = fold_norms(twin, self.anatomy)
            points = points_of(self.anatomy, self.sites)
            self.batches = by_length(self.teacher, batches, points)
            _check_flops(self.teacher, self.anatomy, self.sites, self.batches, config, target_flops)
            self.calibration = Calibration(points, self._gradient_points(), config, null_moments=thorough)
            calibrate(self.teacher, self.batches, self.calibration, progress=progress)
        if several(accelerator):
            self.calibration.all_reduce(accelerator)
        self.batches = all_batches(self.batches, model.device, accelerator)
        self.directions: dict[str, Directions] = {}
        self.subspaces: dict[str, SignalSubspace] = {}

    def _gradient_points(self) -> list[Point]:
        hidden = self.anatomy.sites.get("hidden")
        importance = self.config.importance
        if importance == "variance" or hidden is None:
            if importance == "fisher":
                raise RMTKDError(
                    f"importance='fisher' was asked for, but {type(self.source).__name__} in form "
                    f"{self.config.form!r} has no residual stream whose loss gradient could weigh directions; use "
                    "'auto' or 'variance'."
                )
            return []
        if gives_likelihood(self.teacher, self.batches[0]):
            return list(hidden.points)
        if importance == "fisher":
            raise CalibrationError(
                f"importance='fisher' needs a model with logits to draw labels from; {type(self.source).__name__} "
                "returns none. Use importance='variance' for a bare encoder, or add a task head."
            )
        return []

    def directions_of(self, site: Site) -> Directions:
        """Directions of a site, computed once."""
        if site.name not in self.directions:
            with _naming(site):
                self.directions[site.name] = site_directions(
                    self.teacher, site, self.anatomy, self.calibration, self.config.basis
                )
        return self.directions[site.name]

    def subspace_of(self, site: Site) -> SignalSubspace:
        """Spectral diagnosis of a site, computed once."""
        if site.name not in self.subspaces:
            config, moments = self.config, self._observed(site)
            common = {
                "n_effective": config.n_effective,
                "tracy_widom_alpha": config.tracy_widom_alpha,
                "min_rank": config.min_rank,
                "split_half": self.thorough,
            }
            if site.width < TOO_NARROW:
                found = signal_subspace(moments, estimator="energy", share=1.0, **common)
                text = f"too narrow for a bulk: {site.width} features (< {TOO_NARROW}), all taken as signal"
                found = dataclasses.replace(found, warnings=(*found.warnings, text))
            else:
                try:
                    found = signal_subspace(moments, estimator=config.edge_estimator, **common, **config.edge_options)
                except RMTKDError as error:
                    raise type(error)(f"Site {site.name!r}, {moments.count} samples: {error}") from error
            self.subspaces[site.name] = found
        return self.subspaces[site.name]

    def _observed(self, site: Site) -> SecondMoments:
        """Moments of the place that stands for a site: for the stream, behind the norm at half its depth. Several
        places together would count the same tokens as independent samples."""
        points = [p for p in site.points if p.side == "output"] or [p for p in site.points if not p.whole]
        return self.calibration.moments[points[len(points) // 2]]

    def couples(self) -> list[Couple]:
        """The widths there are to decide, each with what it costs to narrow it."""
        grouped: dict[str, list[Site]] = {}
        for site in self.sites:
            grouped.setdefault(site.couple, []).append(site)
        return [self._couple(name, tuple(members)) for name, members in grouped.items()]

    def _couple(self, name: str, members: tuple[Site, ...]) -> Couple:
        lead = next(site for site in members if site.kind != "pooled")
        floor, step, stride = couple_grid(lead, self.config)
        damage = sum(self.directions_of(site).damage for site in members if site.kind != "pooled")
        subspaces = [self.subspace_of(site) for site in members if site.kind != "pooled"]
        score = torch.stack([_group_means(_over_edge(s), lead) for s in subspaces]).mean(0)
        rank = max(math.ceil(s.rank / lead.groups) for s in subspaces)
        rank = min(lead.group_width, max(floor, -(-rank // step) * step))
        return Couple(name, members, lead.group_width, floor, step, stride, damage, score, rank)

    def plan(self, target_reduction: float | None = None) -> Plan:
        """Widths by budget where there is a target, else by the spectral edges.

        Raises:
            BudgetError: the target cannot be reached, or already is.
        """
        couples = self.couples()
        parameters = parameters_of(self.teacher, self.anatomy)
        target = self.config.target_reduction if target_reduction is None else target_reduction
        if target is None and self.config.target_flops is None:
            # two factors of a rank near the full one hold more parameters than the layer they replace
            whole = parameters({})
            widths = {c.name: c.rank if parameters({c.name: c.rank}) < whole else c.width for c in couples}
            return Plan(widths, [], self.config.round_to)
        positions = _positions(self.teacher, self.batches)
        flops = flops_of(self.teacher, self.anatomy, positions)
        if target is not None:
            whole = float(uncut_parameters(self.source))
            goal, cost, what = (1 - target) * whole, parameters, "parameters"
        else:
            whole = flops({})
            goal, cost, what = (1 - self.config.target_flops) * whole, flops, "FLOPs"
        worth = self._worth(parameters({}), flops({}), positions)
        return allocate(couples, cost, worth, goal, whole, self.config, what)

    def _worth(
        self, parameters: float, flops: float, positions: Mapping[str, float]
    ) -> Callable[[Couple], Callable[[Mapping[str, int]], float]]:
        """couple -> widths -> share of the parameters and, times `speed_weight`, of the FLOPs that its layers make
        up."""

        def worth(couple: Couple) -> Callable[[Mapping[str, int]], float]:
            units = self._units_of(couple)
            size = parameters_of(self.teacher, self.anatomy, units)
            work = flops_of(self.teacher, self.anatomy, positions, units)
            weight = speed_weight_of(self.config) / max(flops, 1.0)
            return lambda widths: size(widths) / parameters + weight * work(widths)

        return worth

    def _units_of(self, couple: Couple) -> list[Unit]:
        names = {site.name for site in couple.sites} | ({"pooler"} if couple.name == "hidden" else set())
        return [u for u in self.anatomy.units if names & {u.reads, u.writes, u.factor}]

    def report(self, couples: dict[str, int], curve: list[BudgetPoint], round_to: int | None = None) -> SpectralReport:
        """The spectra of all sites in question and what a `Plan` makes of them."""
        widths = site_widths(couples, self.anatomy)
        spectra = [
            SiteSpectrum(s.name, s.kind, s.width, widths.get(s.name, s.width), self.subspace_of(s))
            for s in self.sites
            if s.kind != "pooled"
        ]
        after = parameters_of(self.teacher, self.anatomy)(couples)
        return SpectralReport(
            tuple(spectra), count_parameters(self.source), int(after), tuple(curve), self.config.to_dict(), round_to
        )

    def operate(self, couples: dict[str, int]) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
        """The narrow model for {couple: features of a group}, and its projections."""
        cuts = self._cuts(couples)
        former = provenance_of(self.source)
        provenance = {
            "base_model": former.get("base_model", _origin(self.source.config._name_or_path)),
            "parameters_before": uncut_parameters(self.source),
            "rounds": former.get("rounds", 0) + 1,
        }
        student = build_student(self.teacher, self.anatomy, couples, self.config.to_dict(), provenance)
        initialise(student, self.teacher, self.anatomy, cuts)
        student.tie_weights()
        self._try_out(student)
        if self.config.refit and self.config.form == "absorbed":
            refit(student, self.teacher, self.anatomy, cuts, self.batches, self.config.ridge, self.progress)
        return carry_over(self.source, student), self._stream_projection(cuts)

    def _try_out(self, student: PreTrainedModel) -> None:
        """A head that reads the stream but is not declared shows at its first forward pass."""
        try:
            with torch.no_grad():
                run(student, self.batches[0])
        except RuntimeError as error:
            raise UnsupportedArchitectureError(
                f"The narrowed {type(self.source).__name__} cannot run ({error}): it has a layer at the cut widths "
                "that its family does not declare. Register a layout that names it (head_reads), or use "
                "form='factored'."
            ) from error

    def _cuts(self, couples: dict[str, int]) -> Cuts:
        chosen, stream, cut = {}, None, site_widths(couples, self.anatomy)
        order = sorted(self.anatomy.sites.values(), key=lambda site: site.kind != "hidden")
        for site in order:
            if site.name in cut:
                with _naming(site):
                    chosen[site.name] = self.directions_of(site).cut(couples[site.couple], stream)
                if site.kind == "hidden":
                    stream = chosen[site.name][""]
        return Cuts(chosen)

    def _stream_projection(self, cuts: Cuts) -> dict[str, torch.Tensor]:
        cut = cuts.of("hidden", "")
        if cut is None:
            return {}
        # the folded stream of a pre-norm model is the old one less its mean over features
        basis = cut.encode - cut.encode.mean(0) if self.anatomy.pre_norm else cut.encode
        return {"hidden": basis.float().to(self.source.device)}


def _positions(model: PreTrainedModel, batches: list[dict[str, Any]]) -> dict[str, float]:
    """{spec path: positions of a sample it is applied at} of all linear layers, from a batch of middling length."""
    positions: dict[str, float] = {}
    batch = batches[len(batches) // 2]
    size = batch_size(batch)

    def see(point: Point, x: torch.Tensor) -> None:
        features = features_last(x, get_module(model, point.path)).shape[-1]
        positions[point.path] = x.numel() / features / size

    with observed(model, [Point(p) for p in linear_layers(model)], see), torch.no_grad():
        run(model, batch)
    return positions


@contextlib.contextmanager
def _naming(site: Site) -> Iterator[None]:
    """Failures of decompositions say of which site."""
    try:
        yield
    except CalibrationError as error:
        if repr(site.name) in str(error):
            raise
        raise CalibrationError(f"Site {site.name!r}: {error}") from error


def _origin(name: str) -> str:
    """Name of the uncut model; of a folder its last part, for paths of somebody's machine do not belong on the Hub."""
    return Path(name).name if Path(name).exists() else name


def _over_edge(subspace: SignalSubspace) -> torch.Tensor:
    """(width,) eigenvalues in units of the noise edge. Where there is no edge (a site too narrow for a bulk, or a rule
    that takes everything as signal) the mean variance stands for it, which an edge lies a little above."""
    values = subspace.eigenvalues
    return values / (subspace.edge if subspace.edge > 0 else values.mean())


def _group_means(values: torch.Tensor, site: Site) -> torch.Tensor:
    """(width,) descending values -> (group_width,): heads are cut alike, so their k-th directions go together."""
    return values[: site.width].reshape(site.group_width, site.groups).mean(1)
