"""A target in milliseconds: layers are timed, the times price the budget's moves, and the narrow model is measured.

The table of layers (`layertimes`) says how the time falls with the widths; what a pass costs beside them, and how much
of a layer's time is hidden or added in a whole model, is measured at both ends, of the model at hand and of the
narrowest one, and lies on a line between. A plan's own architecture is then measured before its weights are computed;
where it is off, the line is drawn through that third point (a secant step) and the plan made once more.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..batches import explained
from ..batches.examples import longest_text, unpadded_inputs
from ..config import RMTKDConfig, milliseconds
from ..errors import BudgetError, LatencyError, RMTKDError
from ..models import twin_of
from ..models.timing import Latency, compare_latency
from .budget import Couple, Plan, allocate, couple_grid, smallest_widths
from .calibration import observed
from .checks import anatomy_of
from .costs import Additive, site_widths
from .depth import without_blocks
from .layertimes import Kind, LayerTimes, grid
from .narrowing import build_student
from .sites import Anatomy, Point, Site, Unit, get_module, is_layer, select_sites
from .timecache import cache_file, read_times, write_times
from .timeparts import parts_of


__all__ = ["WITHIN", "Measurement", "Setting", "Stopwatch", "check_latency", "setting_of"]

logger = logging.getLogger(__name__)

WITHIN = 0.10  # of the target, that the measured time may be off
MANY = 48  # pairs of blocks, on a machine that is not quiet
NEAR = 0.05  # the same of a plan, before its weights are computed
USUAL_LENGTH = 128  # of a text, as in `bench`


@dataclass(frozen=True)
class Setting:
    """What one pass is.

    Attributes:
        batch, length: samples, and tokens of each; None for images.
        device: "cpu" or "cuda". threads: of the CPU. dtype: of the weights.
    """

    batch: int
    length: int | None
    device: str
    threads: int
    dtype: torch.dtype

    def __str__(self) -> str:
        length = "" if self.length is None else f", length {self.length}"
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.device == "cpu" else ""
        return f"batch {self.batch}{length}, {self.device}{threads}, {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Measurement:
    """A narrow model's time beside the wide one's, by `models.timing.compare_latency`, in milliseconds.

    Attributes:
        target: asked for: of a share, that share of `before`.
        before, after: medians of one pass.
        ratio, low, high: before / after: median and quartiles of neighbouring blocks.
        predicted: by the table, in the unit of `after`.
        again: the plan was made once more after a first one was measured.
        setting: at which.
    """

    target: float
    before: float
    after: float
    ratio: float
    low: float
    high: float
    predicted: float
    again: bool
    setting: str

    @property
    def off(self) -> float:
        """Share of the target that is missing (above 0) or left over."""
        return self.after / self.target - 1

    @property
    def met(self) -> bool:
        """Within a tenth."""
        return abs(self.off) <= WITHIN

    def words(self) -> str:
        """One line, with the reason where the target is not met."""
        told = (
            f"latency {self.after:.3g} ms, asked for {self.target:.3g} ms ({self.off:+.1%}); before {self.before:.3g} "
            f"ms, {self.ratio:.2f}x ({self.low:.2f} to {self.high:.2f}); {self.setting}"
        )
        return told if self.met else f"{told}. More than {WITHIN:.0%} off: {self._why()}"

    def _why(self) -> str:
        noise = (self.high - self.low) / self.ratio
        if noise > WITHIN:
            return f"the middle half of the measurements alone differs by {noise:.0%}; a quiet machine would tell"
        if abs(self.predicted / self.target - 1) > NEAR:
            return (
                f"no plan came nearer, this one was predicted at {self.predicted:.3g} ms; smaller steps (round_to) or "
                "more sites would"
            )
        return f"{self.predicted:.3g} ms were predicted from the times of its layers, which other work disturbed"


def setting_of(model: nn.Module, config: RMTKDConfig) -> Setting:
    """The recipe's, with what the model and the machine say where it leaves that open.

    Raises:
        RMTKDError: a GPU that is not there; texts longer than the model takes; a length of images.
    """
    device = config.latency_device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RMTKDError("latency_device='cuda': torch sees no GPU; expected 'cpu' or 'auto'.")
    length, images = config.latency_length, model.main_input_name == "pixel_values"
    if images and length is not None:
        raise RMTKDError(f"latency_length={length}: the model reads images, which have one size. Leave it out.")
    if not images:
        longest = longest_text(model) or max(length or 0, USUAL_LENGTH)
        if (length or 0) > longest:
            raise RMTKDError(f"latency_length={length}: the model takes at most {longest} tokens.")
        length = length or min(USUAL_LENGTH, longest)
    threads = config.latency_threads or torch.get_num_threads()
    return Setting(config.latency_batch_size, length, device, threads, getattr(torch, config.latency_dtype))


@contextlib.contextmanager
def _threads(setting: Setting) -> Iterator[None]:
    """So many while open."""
    before = torch.get_num_threads()
    torch.set_num_threads(setting.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_latency(model: PreTrainedModel, config: RMTKDConfig) -> None:
    """Refuse a time that no widths can give; it costs the timing of layers, which the cut will then find done.

    Raises:
        LatencyError: names the shortest one.
        RMTKDError: a setting that this model or machine cannot have; and as for `check_recipe`.
    """
    if config.target_latency is not None:
        anatomy = anatomy_of(model, config)
        Stopwatch(model, anatomy, select_sites(anatomy, config.sites), config)


class Stopwatch:
    """Milliseconds of a pass of a model by its widths, and the plan that meets a time.

    Args:
        model: at hand; a copy of it is timed.
        sites: those that may be cut.

    Attributes:
        before: milliseconds of the model at hand. target: those asked for.

    Raises:
        LatencyError: the target cannot be reached, or already is.
        RMTKDError: see `setting_of`.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, sites: list[Site], config: RMTKDConfig):
        self.config, self.anatomy, self.setting = config, anatomy, setting_of(model, config)
        self.dense = self._moved(twin_of(model))
        self.inputs = unpadded_inputs(self.dense, self.setting.batch, self.setting.length)
        self._terms = _Terms(self.dense, anatomy, self.inputs, sites, config)
        with _threads(self.setting):
            self._time_layers()
        self._offset, self._scale = 0.0, 1.0
        smallest = smallest_widths(sites, self.price(), config)
        found = self._measured(self._outline(smallest))
        self.before = 1e3 * found.before
        self.shortest = self.before / found.ratio
        target = config.target_latency
        self.target = milliseconds(target) if isinstance(target, str) else target * self.before
        self._check_reachable()
        self._through(({}, self.before), (smallest, self.shortest))
        self.again = False

    def _check_reachable(self) -> None:
        if self.target >= self.before:
            raise LatencyError(
                f"{self._asked()}, so nothing is left to narrow. Ask for less, or leave the model as it is."
            )
        if self.target < self.shortest:
            raise self._out_of_reach()

    def _asked(self) -> str:
        return (
            f"target_latency={self.config.target_latency!r} asks for {self.target:.3g} ms a pass ({self.setting}); "
            f"the model takes {self.before:.3g} ms"
        )

    def _out_of_reach(self) -> LatencyError:
        if self.shortest >= self.before:
            return LatencyError(
                f"{self._asked()}, and the narrowest (min_width={self.config.min_width}, the chosen sites) "
                f"{self.shortest:.3g} ms (measured): narrower layers save no time in this setting, or the machine was "
                "busy. Ask for a size (target_reduction), time a larger pass (latency_batch_size, latency_length), or "
                "try again on a quiet machine."
            )
        return LatencyError(
            f"{self._asked()}, and with min_width={self.config.min_width} and the chosen sites at least "
            f"{self.shortest:.3g} ms (measured; {self.shortest / self.before:.2f} of that): what is left is not in "
            "the widths. Ask for at least that, allow more sites, or take a model of fewer layers."
        )

    def _time_layers(self) -> None:
        setting, wanted = self.setting, self._terms.points()
        file, about = cache_file(setting.device, setting.threads if setting.device == "cpu" else None, setting.dtype)
        times = LayerTimes(setting.device, setting.dtype, read_times(file, about))
        if count := times.measure(wanted):
            logger.info("Timed %d layers (spread %.1f %%).", count, 100 * times.spread)
            write_times(file, about, times.times)
        self._terms.read(times)

    # -- prices -------------------------------------------------------------------------------------------------------

    def price(self) -> Additive:
        """{couple: width} -> milliseconds of a pass."""
        return self._terms.sum(self._scale, self._offset)

    def within(self, names: Collection[str]) -> Callable[[Mapping[str, int]], float]:
        """{couple: width} -> milliseconds of the layers that touch these sites."""
        return self._terms.sum(self._scale, 0.0, names)

    def _through(self, first: tuple[Mapping[str, int], float], second: tuple[Mapping[str, int], float]) -> bool:
        """Draw the line from the layers' sum to a pass through two measured models, ({couple: width}, milliseconds);
        False where they do not say how it falls."""
        bare = self._terms.sum(1.0, 0.0)
        (x, y), (u, v) = ((bare(widths), value) for widths, value in (first, second))
        if x <= u or y <= v:
            return False
        self._scale = (y - v) / (x - u)
        self._offset = y - self._scale * x
        return True

    # -- plans --------------------------------------------------------------------------------------------------------

    def plan(self, couples: list[Couple], worth: Callable[[Couple], Callable[[Mapping[str, int]], float]]) -> Plan:
        """The widths that meet the target, by a measurement of their architecture; `worth` as for `allocate`.

        Raises:
            LatencyError: by the layers' times no widths do.
        """
        try:
            first = self._allocate(couples, worth)
        except BudgetError as error:
            raise self._out_of_reach() from error
        time = self._time_of(first)
        if abs(time / self.target - 1) <= NEAR or not self._through(({}, self.before), (first.couples, time)):
            return first
        self.again = True
        try:
            second = self._allocate(couples, worth)
        except BudgetError:  # by the corrected line; the check has measured that there are widths
            return first
        return min((first, time), (second, self._time_of(second)), key=lambda pair: abs(pair[1] / self.target - 1))[0]

    def _allocate(self, couples: list[Couple], worth: Any) -> Plan:
        near = NEAR * self.target / self.before
        return allocate(couples, self.price(), worth, self.target, self.before, self.config, "time of a pass", near)

    def _time_of(self, plan: Plan) -> float:
        """Milliseconds, on the scale of `before`: the ratio is what a slow moment leaves as it is."""
        found = self._measured(self._outline(plan.couples))
        return self.before / found.ratio

    def _outline(self, couples: Mapping[str, int]) -> PreTrainedModel:
        """The narrow architecture with any weights."""
        shallow, anatomy = without_blocks(self.dense, self.anatomy, couples)
        return build_student(shallow, anatomy, couples, self.config.to_dict(), {})

    def _measured(self, narrow: PreTrainedModel) -> Latency:
        """By the medians of a few pairs of blocks; of more, where the middle half of them differs by more than the
        target may be missed by."""
        with _threads(self.setting):
            found = compare_latency(self.dense, narrow, self.inputs)
            if (found.high - found.low) / found.ratio > WITHIN:
                found = compare_latency(self.dense, narrow, self.inputs, MANY)
            return found

    def verify(self, student: PreTrainedModel, couples: Mapping[str, int]) -> Measurement:
        """The finished model, measured as `bench` does."""
        found = self._measured(self._moved(twin_of(student)))
        before, after = 1e3 * found.before, 1e3 * found.after
        share = self.config.target_latency
        target = self.target if isinstance(share, str) else share * before
        if not isinstance(share, str):
            after = before / found.ratio
        predicted = self.price()(couples) * (1.0 if isinstance(share, str) else before / self.before)
        ratios = found.ratio, found.low, found.high
        return Measurement(target, before, after, *ratios, predicted, self.again, str(self.setting))

    def _moved(self, model: PreTrainedModel) -> PreTrainedModel:
        there = model.device.type == self.setting.device
        if there and all(p.dtype == self.setting.dtype for p in model.parameters()):
            return model
        return copy.deepcopy(model).to(self.setting.device, self.setting.dtype)


class _Terms:
    """The layers of a model whose time depends on widths."""

    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, inputs: Mapping, sites: list[Site], config: RMTKDConfig
    ):
        self.anatomy = anatomy
        shapes = _input_shapes(model, anatomy, inputs)
        self.parts = parts_of(model, anatomy, shapes)
        self.axes: dict[int, dict[Kind, list[set[int]]]] = {}
        corners = _corners(sites, anatomy, config)
        for number, (_, value) in enumerate(self.parts):
            seen = self.axes.setdefault(number, {})
            for corner in corners:
                for kind, widths in value(corner):
                    known = seen.setdefault(kind, [set() for _ in widths])
                    for axis, width in zip(known, widths, strict=True):
                        axis.add(width)
        self.surfaces: dict[tuple[int, Kind], Any] = {}

    def _grids(self) -> Iterator[tuple[int, Kind, list[tuple[int, ...]]]]:
        for number, kinds in self.axes.items():
            for kind, axes in kinds.items():
                yield number, kind, [grid(min(axis), max(axis)) for axis in axes]

    def points(self) -> list[tuple[Kind, tuple[int, ...]]]:
        """All that has to be timed."""
        grids = ((kind, axes) for _, kind, axes in self._grids())
        return [(kind, widths) for kind, axes in grids for widths in itertools.product(*axes)]

    def read(self, times: LayerTimes) -> None:
        """Take the times up."""
        self.surfaces = {(number, kind): times.surface(kind, axes) for number, kind, axes in self._grids()}

    def sum(self, scale: float, offset: float, names: Collection[str] | None = None) -> Additive:
        """offset + scale times the milliseconds of all layers, or of those that touch the sites `names`."""

        def time(number: int, value: Callable, widths: Mapping[str, int]) -> tuple[float, ...]:
            if self.anatomy.is_gone(self.parts[number][0].block, widths):
                return ()
            return tuple(1e3 * scale * self.surfaces[number, kind](*found) for kind, found in value(widths))

        chosen = [
            (unit, lambda widths, n=n, v=value: time(n, v, widths))
            for n, (unit, value) in enumerate(self.parts)
            if names is None or set(names) & {unit.reads, unit.writes, unit.factor, self._block_of(unit)}
        ]
        return Additive(self.anatomy, offset, chosen)

    def _block_of(self, unit: Unit) -> str | None:
        """Name of the site that is the whole block of a unit."""
        site = self.anatomy.block_sites.get(unit.block)
        return None if site is None else site.name


def _input_shapes(model: nn.Module, anatomy: Anatomy, inputs: Mapping[str, Any]) -> dict[str, list[tuple[int, ...]]]:
    """{spec path: shapes of what the layer reads, call by call} of all layers of the anatomy that are called."""
    paths = [u.path for u in anatomy.units if is_layer(model, u.path)]
    modules = [path for path in paths if isinstance(get_module(model, path), nn.Module)]
    shapes: dict[str, list[tuple[int, ...]]] = {}

    def see(point: Point, x: torch.Tensor) -> None:
        shapes.setdefault(point.path, []).append(tuple(x.shape))

    looked_at = [Point(path, "input") for path in dict.fromkeys(modules)]
    with observed(model, looked_at, see), torch.inference_mode(), explained(model, inputs, 0):
        model(**inputs)
    return shapes


def _corners(sites: list[Site], anatomy: Anatomy, config: RMTKDConfig) -> list[dict[str, int]]:
    """{site: features} at the ends of what a plan may choose: full, all at their floors, each alone there and one
    feature below its full width (where a second factor begins)."""
    finest = config.replace(round_to=1)
    leads = {site.couple: site for site in sites if site.chosen}
    floors = {name: couple_grid(site, finest)[0] for name, site in leads.items()}
    alone = [{name: width} for name, width in floors.items()]
    almost = [{name: max(1, site.group_width - 1)} for name, site in leads.items()]
    return [site_widths(couples, anatomy) for couples in ({}, floors, *alone, *almost)]
