"""Everything known about one model before it is cut: moments, directions, spectra, a plan; and the operation
itself."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..batches import evaluating, first_samples, run
from ..config import RMTKDConfig
from ..errors import CalibrationError, RMTKDError, UnsupportedArchitectureError
from ..modeling_rmtkd import resolve_path
from ..models import (
    KEPT,
    UNCUT,
    Scratch,
    carry_over,
    check_behaviour,
    check_structure,
    count_parameters,
    kept_blocks,
    match_precision,
    provenance_of,
    released,
    twin_of,
    uncut_parameters,
)
from ..spectra import SecondMoments, SignalSubspace, signal_subspace
from ..spectra.edges import find_estimator
from ..spectra.separation import doubt
from ..spectra.subspace import check_varies
from .bases import kept_in
from .block_prices import block_prices, whole_block
from .budget import (
    BudgetPoint,
    Couple,
    Plan,
    couple_grid,
    parameters_of,
    predicted,
    site_widths,
)
from .calibration import Calibration, calibrate, gradient_points, points_of
from .channels import channel_directions, channel_prices, reading_effects
from .checks import (
    LOOKED_AT,
    anatomy_of,
    check_data,
    check_finite,
    check_flops,
    check_parameters,
    check_recipe,
    check_scratch,
    check_shape,
)
from .couples import group_means
from .depth import former_blocks, removed_blocks, without_blocks
from .directions import Directions, parted_projection, site_directions
from .divergence import Remembered, answers_per_sample, mean_divergence
from .grouping import by_length
from .latency import Stopwatch
from .likelihood import answers
from .narrowing import Cuts, build_student, fold_norms, initialise, origin_of
from .native import check_expressible, plain_form
from .planning import planned
from .prices import directional_prices
from .processes import all_batches, one_for_all, several, share_of
from .recomputing import inside, recomputed
from .refit import Pairs, refit
from .report import SiteSpectrum, SpectralReport
from .sites import BLOCK, CHANNELS, Anatomy, Point, Site, get_module, has_module, select_sites
from .tracing import with_traced_reads
from .tryout import checked_batches
from .untargeted import asks_for_edges
from .variety import check_variety, enough_rows, extent_of, warn_of_few


__all__ = ["Surgeon", "anatomy_of", "check_data", "check_recipe"]

TOO_NARROW = 12  # features under which no edge estimator finds a bulk to fit


class Surgeon:
    """Everything known about one model before it is cut; `plan` and `operate` are the two things to do with it.

    Spectra cost an eigendecomposition a site and more, which is most of a plan's time. They are computed where they
    decide (widths by the edge, allocation="edge") and where they are reported, and once.

    `thorough` adds the diagnostics that cost more time: the overlap of two halves of the data, and the null moments
    that the estimator "signflip" needs (`null_moments`: those alone). A `target_reduction` that is out of reach is
    refused (BudgetError) before any data is read, before the calibration a `target_flops` and, `timed`, the recipe's
    `target_latency`; `plan` is asked for them again. With `trust_edges` a plan without a target takes every spectral
    edge as it is; default: where the recipe names an estimator.

    With `scratch`, copies of the model, moments and what is made of them lie in its files, backward passes run each
    block twice: what has to be in memory is that of one block.
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
        timed: bool = False,
        trust_edges: bool | None = None,
        null_moments: bool = False,
        scratch: Scratch | None = None,
    ):
        check_structure(model)
        if scratch is not None:
            check_scratch(config)
        find_estimator(config.edge_estimator)
        self.source, self.config, self.progress, self.thorough = model, config, progress, thorough
        self.scratch = scratch
        self.trust_edges = asks_for_edges(config) if trust_edges is None else trust_edges
        self.anatomy = anatomy_of(model, config)
        wanted = config.sites if sites is None else tuple(sites)
        self.sites = select_sites(self.anatomy, wanted)
        check_shape(model, self.anatomy, self.sites, config)
        check_parameters(model, self.anatomy, self.sites, config, target_reduction)
        with one_for_all(accelerator):
            check_finite(model, scratch)
            share = share_of(config.calibration_samples, accelerator)
            batches = checked_batches(model, dataloader, share, self.anatomy, self.sites)
        check_variety(batches, accelerator=accelerator)
        calibrating = self._calibrating(batches, accelerator)
        with one_for_all(accelerator):
            check_behaviour(model, first_samples(batches[0], LOOKED_AT))
            twin = twin_of(model)
            if any(site.kind == "hidden" for site in self.sites):
                self.anatomy = with_traced_reads(twin, self.anatomy, first_samples(batches[0], LOOKED_AT))
                self.sites = select_sites(self.anatomy, wanted)
                check_shape(twin, self.anatomy, self.sites, config)
            self.teacher = fold_norms(twin, self.anatomy, scratch, any(s.kind == "hidden" for s in self.sites))
            points = points_of(self.anatomy, self.sites)
            self.batches = by_length(self.teacher, batches, points)
            check_flops(self.teacher, self.anatomy, self.sites, self.batches, config, target_flops)
            main = accelerator is None or accelerator.is_main_process
            # processes that measure at once disturb each other, and only one of them decides
            self.stopwatch = Stopwatch(model, self.anatomy, self.sites, config) if timed and main else None
            # several processes look at all batches, and have run over their own alone
            self.remembered = None if several(accelerator) else Remembered(len(self.batches), model.device)
            options = {"null_moments": thorough or null_moments, "halves": thorough, "remembered": self.remembered}
            options["scratch"] = None if scratch is None else scratch.part()
            self.calibration = Calibration(points, self._with_gradients(), calibrating, **options)
            with recomputed(self.teacher, self.anatomy.blocks, scratch):
                calibrate(self.teacher, self.batches, self.calibration, progress=progress)
        if several(accelerator):
            self.calibration.all_reduce(accelerator)
        self.sites = self._alive()
        self.batches = all_batches(self.batches, model.device, accelerator)
        if sites is None and (accelerator is None or accelerator.is_main_process):  # once, not of each layer of many
            widths = {site.kind: site.width for site in sorted(self.sites, key=lambda site: site.width)}
            warn_of_few(self.batches, calibrating, widths.get("hidden", max(widths.values(), default=0)))
        self.blocks: torch.Tensor | None = None  # what leaving them out costs, see `block_prices`
        self.directions: dict[str, Directions] = {}
        self.subspaces: dict[str, SignalSubspace] = {}
        self._priced = False  # are the directions of a language model priced from the data?

    def _calibrating(self, batches: Sequence[dict[str, Any]], accelerator: Any) -> RMTKDConfig:
        """The recipe with as many rows as the widest site needs, where each token is an answer of its own."""
        if not self.anatomy.answers:
            return self.config
        widest, extent = max(site.width for site in self.sites if site.chosen), extent_of(batches, accelerator)
        with one_for_all(accelerator):
            return enough_rows(self.config, widest, *extent)

    def _with_gradients(self) -> list[Point]:
        return gradient_points(self.teacher, self.anatomy, self.config, self.batches[0])

    def directions_of(self, site: Site) -> Directions:
        """Directions of a site, computed once."""
        if site.name not in self.directions:
            if site.kind in CHANNELS and not self.calibration.effects:
                self.calibration.effects = reading_effects(
                    self.teacher, self.batches, self._channels(), *self._drawn()
                )
            find = channel_directions if site.kind in CHANNELS else site_directions
            with _naming(site):
                self.directions[site.name] = find(
                    self.teacher, site, self.anatomy, self.calibration, self.config.basis
                )
            self.calibration.rest()
        return self.directions[site.name]

    def _alive(self) -> list[Site]:
        """The sites without those of channels which never varied, as the gates of a squeeze-and-excitation may: there
        is nothing to choose by, and they stay. Where none varies, all are kept, for the error to name the first."""

        def varies(site: Site) -> bool:
            return bool((self._observed(site).variance > 0).any())

        found = [site for site in self.sites if site.kind not in CHANNELS or varies(site)]
        return found or self.sites

    def _channels(self) -> list[Site]:
        return [site for site in self.sites if site.kind in CHANNELS]

    def _drawn(self) -> tuple[int, bool]:
        """The seed of what is observed of the answers, and whether losses of channels are in nats."""
        return self.config.seed, self.config.importance == "fisher"

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

    def couples(self, spectra: bool = False) -> list[Couple]:
        """The widths there are to decide, each with what it costs to narrow it; with `spectra` also what these say."""
        if self.anatomy.answers and self.calibration.gradients and not self._priced:
            found = {site.name: self.directions_of(site) for site in self._with_widths()}
            again = inside(self.teacher, self.anatomy.blocks, self.calibration.points) if self.scratch else ()
            with recomputed(self.teacher, self.anatomy.blocks, self.scratch):
                self.directions |= directional_prices(
                    self.teacher, self.batches, found, self.config.seed, self.anatomy.stack_of, again
                )
            self._priced = True
        if (channels := self._channels()) and not self._priced:
            found = {site.name: self.directions_of(site) for site in channels}
            self.directions |= channel_prices(self.teacher, self.batches, found, *self._drawn())
            self._priced = True
        for site in self._with_widths():
            self._check_varies(site)
        return [self._couple(name, members, spectra) for name, members in self._members().items()]

    def _with_widths(self) -> list[Site]:
        """The sites whose width is a decision; of a block it is all or nothing."""
        return [site for site in self.sites if site.chosen and site.kind != BLOCK]

    def _members(self) -> dict[str, tuple[Site, ...]]:
        """{couple: its sites}"""
        grouped: dict[str, list[Site]] = {}
        for site in self.sites:
            grouped.setdefault(site.couple, []).append(site)
        return {name: tuple(sites) for name, sites in grouped.items()}

    def _damage(self, members: tuple[Site, ...]) -> torch.Tensor:
        return sum(self.directions_of(site).damage for site in members if site.chosen)

    def _whole_block(self, site: Site) -> Couple:
        if self.blocks is None:
            fisher = bool(self.calibration.gradients)
            blocks = self.anatomy.blocks
            with recomputed(self.teacher, blocks, self.scratch):
                self.blocks = block_prices(self.teacher, self.batches, self.anatomy, self.config.seed, fisher)
        return whole_block(self.anatomy, site, self.blocks)

    def _couple(self, name: str, members: tuple[Site, ...], spectra: bool) -> Couple:
        own = [site for site in members if site.chosen]
        lead, score, rank = own[0], torch.empty(0), None
        if lead.kind == BLOCK:
            return self._whole_block(lead)
        floor, step, stride = couple_grid(lead, self.config)
        damage = self._damage(members)
        if spectra:
            subspaces = [self.subspace_of(site) for site in own]
            score = torch.stack([group_means(s.over_edge, lead) for s in subspaces]).mean(0)
            rank = max(math.ceil(s.rank / lead.groups) for s in subspaces)
            rank = min(lead.group_width, max(floor, -(-rank // step) * step))
        blocks = [site for site in self.anatomy.block_sites.values() if site in self.sites]
        parts = {b.couple: tuple(site for site in own if site.depth == b.depth) for b in blocks}
        inside = {block: self._damage(sites) for block, sites in parts.items() if sites}
        return Couple(name, members, lead.group_width, floor, step, stride, damage, score, rank, inside)

    def _check_varies(self, site: Site) -> None:
        """A constant activation is refused whether or not its spectrum is asked for."""
        moments = self._observed(site)
        try:
            check_varies(moments)
        except CalibrationError as error:
            raise CalibrationError(f"Site {site.name!r}, {moments.count} samples: {error}") from error
        self.calibration.rest()

    def plan(self, target_reduction: float | None = None) -> Plan:
        """Widths by budget where there is a target, else by the spectral edges that mean something.

        Raises:
            BudgetError: the target cannot be reached, or already is.
            NoTargetError: no target, and no edge that says how far to cut.
        """
        return planned(self, target_reduction)

    def doubts(self) -> dict[str, str | None]:
        """{site: why its spectral edge does not say how far to cut}; None where it does, or is trusted."""

        def of(site: Site) -> str | None:
            narrow = f"too narrow for a bulk, {site.width} features" if site.width < TOO_NARROW else None
            return None if self.trust_edges else narrow or doubt(self.subspace_of(site))

        return {site.name: of(site) for site in self._with_widths()}

    @property
    def loss_unit(self) -> str | None:
        """What a predicted loss is counted in: "nats" of the model's own likelihood, an answer; "energy", the sum over
        sites of the share of the energy of the stream (of convolutional networks: of the answers); None for factors,
        where each layer is weighed by itself."""
        if self.config.form == "factored":
            return None
        channels = self._channels() and self._drawn()[1]
        return "nats" if self.calibration.gradients or channels else "energy"

    @functools.cached_property
    def answers(self) -> float:
        """Answers a sample, in a batch of middling length: 1 for a classifier, the tokens of a language model."""
        middle = len(self.batches) // 2
        if self.remembered is not None and middle in self.remembered.per_sample:
            return max(1.0, self.remembered.per_sample[middle])
        batch = self.batches[middle]
        with evaluating(self.teacher), torch.no_grad():
            given = answers(self.teacher, run(self.teacher, batch), batch)
        return 1.0 if given is None else max(1.0, answers_per_sample(given))

    def predicted_loss(self, couples: Mapping[str, int]) -> float | None:
        """What a cut to {couple: features of a group} is predicted to cost, in `loss_unit`; None without a unit."""
        if self.loss_unit is None:
            return None
        known = [self._couple(name, members, False) for name, members in self._members().items()]
        lost = predicted(known, {couple.name: couples.get(couple.name, couple.width) for couple in known})
        return lost / (self.answers if self.loss_unit == "nats" else 1.0)

    def divergence(self, student: PreTrainedModel) -> float | None:
        """Measured: see `mean_divergence`. Of a twin: what the user hung on the model does not run here."""
        twin = twin_of(student)
        with released(self.scratch, self._blocks_of(self.teacher, twin)):
            return mean_divergence(self.teacher, twin, self.batches, self.remembered)

    def _blocks_of(self, *models: PreTrainedModel) -> list[torch.nn.Module]:
        paths = self.anatomy.blocks
        return [get_module(model, path) for model in models for path in paths if has_module(model, path)]

    def report(self, couples: dict[str, int], curve: list[BudgetPoint], round_to: int | None = None) -> SpectralReport:
        """The spectra of all sites in question and what a `Plan` makes of them."""
        widths, gone = site_widths(couples, self.anatomy), set(removed_blocks(self.anatomy, couples))

        def width_of(site: Site) -> int:
            inside = site.kind != "hidden" and site.depth in gone
            return 0 if inside else widths.get(site.name, site.width)

        spectra = [
            SiteSpectrum(s.name, s.kind, s.width, width_of(s), self.subspace_of(s)) for s in self._with_widths()
        ]
        after = parameters_of(self.teacher, self.anatomy)(couples)
        blocks = [site for site in self.sites if site.kind == BLOCK]
        return SpectralReport(
            tuple(spectra),
            *(count_parameters(self.source), int(after), tuple(curve), self.config.to_dict(), round_to),
            blocks={s.name: (float(self._whole_block(s).damage[0]), s.depth not in gone) for s in blocks},
        )

    def operate(self, couples: dict[str, int], last: bool = False) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
        """The narrow model for {couple: features of a group}, and its projections.

        Args:
            last: nothing else will be asked of the moments: they are let go on the way, before the student and the
                refit need memory.
        """
        if self.config.shape == "native":
            check_expressible(self.source, self.anatomy, couples)
        shallow, anatomy = without_blocks(self.teacher, self.anatomy, couples)
        cuts = self._cuts(anatomy, couples, last)
        former = provenance_of(self.source)
        provenance = {
            "base_model": former.get("base_model", origin_of(self.source.config._name_or_path)),
            "parameters_before": uncut_parameters(self.source),
            "rounds": former.get("rounds", 0) + 1,
        }
        recipe, scratch = self.config.to_dict(), self.scratch
        student = build_student(shallow, anatomy, couples, recipe, provenance, scratch)
        initialise(student, shallow, anatomy, cuts, scratch)
        del shallow
        student.tie_weights(recompute_mapping=False)
        cuts = cuts.encodings()
        pairs = Pairs(self.anatomy.blocks, former_blocks(self.anatomy, anatomy))
        with released(scratch, self._blocks_of(student, self.teacher)):
            self._try_out(student)
            if self.config.refit and self.config.form == "absorbed":
                late = cuts.with_whole("hidden", anatomy.sites["hidden"].width) if pairs.missing else cuts
                batches, ridge = self.batches, self.config.ridge
                refit(student, self.teacher, anatomy, cuts, batches, ridge, self.progress, pairs, late)
        student = match_precision(student, self.source, scratch)
        if self.config.shape == "native":
            student = self._plain(student)
        student.config._attn_implementation = self.source.config._attn_implementation  # see `fold_norms`
        return carry_over(self.source, student), self._stream_projection(cuts)

    def _plain(self, student: PreTrainedModel) -> PreTrainedModel:
        """The same as an instance of the stock class, whose config remembers the size before."""
        plain = plain_form(student, first_samples(self.batches[0], LOOKED_AT)).model
        setattr(plain.config, UNCUT, uncut_parameters(self.source))
        if kept := kept_blocks(student):
            setattr(plain.config, KEPT, kept)
        return plain

    def _try_out(self, student: PreTrainedModel) -> None:
        """A head that reads the stream but is not declared shows at its first forward pass."""
        try:
            with torch.no_grad():
                run(student, first_samples(self.batches[0], LOOKED_AT))
        except RuntimeError as error:
            raise UnsupportedArchitectureError(
                f"The narrowed {type(self.source).__name__} cannot run ({error}): it has a layer at the cut widths "
                "that its family does not declare. Register a layout that names it (head_reads), or use "
                "form='factored'."
            ) from error

    def _cuts(self, anatomy: Anatomy, couples: dict[str, int], last: bool) -> Cuts:
        """The cuts of the sites of `anatomy`, which may lack blocks; of units by their paths there."""
        chosen, stream, cut = {}, None, site_widths(couples, anatomy)
        order = sorted(self.anatomy.sites.values(), key=lambda site: site.kind != "hidden")
        order = [site for site in order if site.name in cut and site.kind != "parted"]
        for site in order:
            self.directions_of(site)
        for at, site in enumerate(order):
            if last:
                still = {point for other in order[at:] for point in other.points}
                self.calibration.keep(still)
            with _naming(site):
                found = self.directions_of(site).cut(couples[site.couple], stream)
            chosen[site.name] = kept_in(self.scratch, found)
            if site.kind == "hidden":
                stream = chosen[site.name][""]
        if last:
            self.calibration.keep(())
        for site in self.anatomy.sites.values():
            if site.kind == "parted" and site.name in cut:
                lead = self.anatomy.sites[site.follows]
                chosen[site.name] = {"": parted_projection(site, lead, chosen[lead.name][""])}
        return Cuts(chosen).renamed(former_blocks(self.anatomy, anatomy))

    def _stream_projection(self, cuts: Cuts) -> dict[str, torch.Tensor]:
        cut = cuts.of("hidden", "")
        if cut is None:
            return {}
        matrix = cut.encode.float().to(self.source.device)
        if len(turned := self.anatomy.turned_blocks) == len(self.anatomy.blocks):
            return {"hidden": matrix}
        return {resolve_path(self.source, path): matrix for path in turned}


@contextlib.contextmanager
def _naming(site: Site) -> Iterator[None]:
    """Failures of decompositions say of which site."""
    try:
        yield
    except CalibrationError as error:
        if repr(site.name) in str(error):
            raise
        raise CalibrationError(f"Site {site.name!r}: {error}") from error
