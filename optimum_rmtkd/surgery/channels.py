"""Channels of convolutional networks: which go first, what that costs, and the cut.

A channel has a unit of its own: convolution, batch norm and what stands behind them can be rescaled against each other
without changing the function, through ReLU as well. So nothing here depends on it. Variances are taken where the
channels are read; each is weighed by the mean square of the gradient there; redundance is measured in shares of a
channel's own variance. Where several layers read the same channels (a stage whose blocks are summed), one index serves
all of them, and each makes up for what is cut by what it reads itself.

The price of a cut is what it changes in the model's answers, to first order: with g the gradient of an observation of
the answers at one reader's input, and x that input less its prediction from the channels that stay,

    E[(sum over readers and positions of g . x)^2],

the sum over a sample before it is squared, because an image gives one answer. Observed is either the log-likelihood of
labels drawn from the model (half of the expectation is then a loss in nats), or white noise times the answers: then
the expectation over their energy is the share of it that is lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..batches import batch_size, evaluating, run
from ..errors import CalibrationError
from ..spectra import SecondMoments
from .bases import Selection
from .calibration import Calibration, features_last, frozen
from .directions import Directions
from .likelihood import answers, content_uniforms, log_likelihood
from .linalg import check_finite
from .sites import CHANNELS, Anatomy, Point, Site, Unit, get_module, is_layer


__all__ = ["channel_directions", "channel_prices", "joint_pivots", "reading_effects"]

REDUNDANT = 1e-6  # share of a channel's own variance that products in fp32 cannot tell from zero


# -- which go first ---------------------------------------------------------------------------------------------------


def joint_pivots(
    grams: torch.Tensor, worth: torch.Tensor, each: int = 1, order: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Greedy choice of features that span the rest in several places at once: a pivoted Cholesky decomposition in each
    place (Harbrecht, Peters and Schneider 2012), with common pivots.

    Args:
        grams: (places, m, m) fp64, correlations: a diagonal of ones.
        worth: (places, m) what the whole of a feature is worth there.
        each: features go in neighbouring groups of so many.
        order: (m,) takes them in this order instead.

    Returns:
        (order (m,), residual (m + 1,): the worth of what the first 0, 1, ... m leave unexplained, factors
        (places, m, m)): lower triangular with a diagonal of ones; x[order] = factor @ z with uncorrelated z.
    """
    places, size = worth.shape
    rows = torch.zeros(places, size, size, dtype=grams.dtype)
    left, chosen = torch.ones_like(worth), torch.zeros(size, dtype=torch.bool)
    pivots, residual = [], [worth.sum().item()]
    while len(pivots) < size:
        if order is None:
            score = (left * worth).sum(0).reshape(-1, each).sum(1).masked_fill(chosen[::each], -1.0)
            first = int(score.argmax()) * each
            group = range(first, first + each)
        else:
            group = order[len(pivots) : len(pivots) + 1].tolist()
        for pivot in group:
            step, usable = len(pivots), left[:, pivot] > REDUNDANT
            row = grams[:, pivot] - torch.einsum("ps,psm->pm", rows[:, :step, pivot], rows[:, :step])
            root = left[:, pivot].clamp_min(REDUNDANT).sqrt()
            rows[:, step] = torch.where(usable[:, None], row / root[:, None], 0.0)
            left = (left - rows[:, step].square()).clamp_min(0)
            left[:, pivot], chosen[pivot] = 0.0, True
            pivots.append(pivot)
            residual.append((left * worth).sum().item())
    found = torch.tensor(pivots)
    lower = rows[:, :, found].mT
    scale = lower.diagonal(dim1=1, dim2=2)[:, None]
    lower = torch.where(scale > 0, lower / scale.clamp_min(1e-300), 0.0).tril(-1)
    residual = torch.tensor(residual, dtype=torch.float64).cummin(0).values
    return found, residual, lower + torch.eye(size, dtype=grams.dtype)


@dataclass(frozen=True)
class _Reader:
    """One place at which the channels of a site are read.

    Attributes:
        path: of what reads them.
        point: where its input is observed.
        size, mean: (m,) fp64 root of the variance of each channel (1 where it never varied), and what a shift behind
            the reader makes up for (zeros where there is none).
        worth: (m,) fp64 product of the variance and the mean square of the gradient, summed over positions.
    """

    path: str
    point: Point
    size: torch.Tensor
    mean: torch.Tensor
    worth: torch.Tensor


def _shifts(model: nn.Module, unit: Unit | None) -> bool:
    """Whether a constant at a reader's input can be made up for: by its bias, or by the batch norm behind it."""
    if unit is None:
        return False
    norm = get_module(model, unit.norm) if unit.norm and is_layer(model, unit.norm) else None
    return get_module(model, unit.path).bias is not None or (norm is not None and norm.running_mean is not None)


def _correlations(moments: SecondMoments, shifts: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(m, m) correlations, (m,) root of variances with ones for channels that never varied, (m,) bool: which."""
    moment = (moments.covariance if shifts else moments.second_moment).cpu().double()
    check_finite(moment, "Choice of channels")
    variance = moment.diagonal().clamp_min(0)
    silent = variance <= 1e-9 * moments.second_moment.diagonal().cpu().double()
    size = torch.where(silent, 1.0, variance.sqrt())
    gram = moment / torch.outer(size, size)
    gram = torch.where(silent[:, None] | silent[None], 0.0, gram)
    return gram.fill_diagonal_(1.0), size, silent


def channel_directions(
    model: nn.Module, site: Site, anatomy: Anatomy, calibration: Calibration, basis: str
) -> Directions:
    """Channels of one site: selected by pivots in all places where they are read; each reader is compensated.

    `calibration.effects` holds what `reading_effects` found. The damage is that of single channels at independent
    positions, until `channel_prices` has looked at the data.
    """
    units = {u.path: u for u in anatomy.units if u.reads == site.name and u.writes != site.name}
    readers, grams = [], []
    for point in (point for point in site.points if point.whole):
        moments, shifts = calibration.moments[point], _shifts(model, units.get(point.path))
        gram, size, silent = _correlations(moments, shifts)
        effect = calibration.effects.get(point, torch.ones(site.width, dtype=torch.float64))
        worth = _never_free(torch.where(silent, 0.0, size.square()) * effect, silent & (effect > 0), moments.count)
        mean = moments.mean.cpu().double() if shifts else torch.zeros_like(size)
        readers.append(_Reader(point.path, point, size, mean, worth))
        grams.append(gram)
    each = site.parts[0] if site.parts else 1
    order = None
    if basis == "random":
        generator = torch.Generator().manual_seed(calibration.config.seed + site.depth)
        groups = torch.randperm(site.width // each, generator=generator)
        order = (groups[:, None] * each + torch.arange(each)).flatten()
    worth = torch.stack([reader.worth for reader in readers])
    order, residual, factors = joint_pivots(torch.stack(grams), worth, each, order)
    places = {reader.path: (reader, factor) for reader, factor in zip(readers, factors, strict=True)}

    def cut(width: int, stream: Any = None) -> dict[str, Selection]:
        kept = order[: width * site.groups]
        cuts = {path: _selection(*place, order, len(kept)) for path, place in places.items()}
        return {"": Selection(torch.empty(0, dtype=torch.float64), kept.sort().values, site.width), **cuts}

    def changes(x: torch.Tensor, gradient: torch.Tensor, path: str) -> torch.Tensor:
        """What a reader sees, (samples, positions, m) twice -> (samples, m)."""
        return _changes(*places[path], order, x, gradient)

    return Directions(site, residual[:: site.groups], cut, changes)


def _never_free(energy: torch.Tensor, silent: torch.Tensor, samples: int) -> torch.Tensor:
    """(m,) energies with one for features that were `silent` in so many samples: by the rule of succession they vary
    in one of samples + 2 cases, and what was seen to vary comes first (see `bases.never_free`)."""
    seen = energy[energy > 0]
    if not len(seen):
        return energy
    return torch.where(silent, torch.minimum(seen.mean() / (samples + 2), seen.min() / 2), energy)


def _selection(reader: _Reader, factor: torch.Tensor, order: torch.Tensor, width: int) -> Selection:
    """The first `width` channels of the order, and the best linear prediction of all from them."""
    size = len(order)
    head, tail = factor[:width, :width], factor[width:, :width]
    inside = torch.linalg.solve_triangular(head, tail, upper=False, left=False, unitriangular=True)
    decode = torch.zeros(size, width, dtype=torch.float64)
    decode[order[:width]] = torch.eye(width, dtype=torch.float64)
    decode[order[width:]] = inside * reader.size[order[width:], None] / reader.size[order[:width]]
    kept = order[:width].sort()
    decode = decode[:, kept.indices]
    return Selection(decode, kept.values, size, reader.mean - decode @ reader.mean[kept.values])


def _changes(
    reader: _Reader, factor: torch.Tensor, order: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """(samples, m): what the observation loses with each pivot, to first order."""
    size, mean, lower = reader.size[order].to(x), reader.mean[order].to(x), factor.to(x)
    scaled = (x[..., order] - mean) / size
    # in fp64: the inverse of a factor of nearly redundant channels has large entries
    z = torch.linalg.solve_triangular(lower, scaled.flatten(0, 1).T, upper=False, unitriangular=True).T
    return (z.unflatten(0, x.shape[:2]) * ((gradient[..., order] * size) @ lower)).sum(1)


# -- what the model answers -------------------------------------------------------------------------------------------


def _observed(
    model: nn.Module, outputs: Any, batch: Mapping[str, Any], seed: int, nats: bool
) -> tuple[torch.Tensor, float]:
    """(scalar whose gradient is taken, energy of what it observes).

    Of energies: white noise, drawn by each sample's own content, times the answers (log-probabilities up to what
    softmax does not see), or of a model without a head times the features that it gives.
    """
    if nats:
        return log_likelihood(model, outputs, batch, seed), 0.0
    given = answers(model, outputs, batch)
    if given is not None:
        values = given.logits
        values = values - values.mean(-1, keepdim=True) if given.kind == "classes" else values
    else:
        named = "pooler_output" in outputs and outputs["pooler_output"] is not None
        values = outputs["pooler_output"] if named else outputs[0]
        values = (values[-1] if isinstance(values, (tuple, list)) else values).float()
    noise = torch.special.ndtri(content_uniforms(batch, values.shape[1:], seed)).to(values)
    return (noise * values).sum(), float(values.detach().double().square().sum())


@contextmanager
def _branches(model: nn.Module, paths: Iterable[str], add: Any) -> Iterator[None]:
    """Call `add(path, x, gradient)`, each (samples, positions, m), with what a layer reads and the gradient that comes
    back through this layer alone, whatever else reads the same."""
    handles = []
    for path in paths:
        module = get_module(model, path)

        def enter(module: nn.Module, args: tuple, path: str = path) -> tuple:
            x = args[0].clone() if args[0].requires_grad else args[0].detach().clone().requires_grad_()
            rows = _by_sample(x.detach(), module)
            x.register_hook(lambda g: add(path, rows, _by_sample(g.detach(), module)))
            return (x, *args[1:])

        handles.append(module.register_forward_pre_hook(enter))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_sample(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """(samples, positions, m)"""
    return x[:, None] if x.dim() == 2 else features_last(x, module)


def _passes(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], paths: Iterable[str], seed: int, nats: bool, see: Any
) -> tuple[int, float]:
    """Run all batches forward and backward; `see(path, x, gradient)` as in `_branches`, `see(None, None, None)` behind
    each batch. Gives the number of samples, and the energy of what was observed."""
    samples, energy = 0, 0.0
    with evaluating(model), frozen(model), _branches(model, paths, see), torch.enable_grad():
        for batch in batches:
            observation, own = _observed(model, run(model, batch), batch, seed, nats)
            observation.backward()
            samples, energy = samples + batch_size(batch), energy + own
            see(None, None, None)
    return samples, energy


def _share(samples: int, energy: float, nats: bool) -> float:
    """What a sum of squares over samples is multiplied with to be a loss."""
    if nats:
        return 0.5 / max(samples, 1)
    if not energy > 0:
        raise CalibrationError(
            "The answers of the model are zero for all calibration samples: nothing says what channels are worth. "
            "Expected outputs that vary; check the weights and the data."
        )
    return 1.0 / energy


def reading_effects(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], sites: Iterable[Site], seed: int, nats: bool
) -> dict[Point, torch.Tensor]:
    """{where channels are read: (m,) fp64, what a unit of variance of each channel costs there}, in the unit of the
    prices and with positions taken as independent."""
    points = {point.path: point for site in sites for point in site.points if point.whole}
    sums: dict[str, torch.Tensor] = {}

    def see(path: str | None, x: torch.Tensor, gradient: torch.Tensor) -> None:
        if path is not None:
            here = gradient.double().square().sum((0, 1)).cpu()
            sums[path] = sums[path] + here if path in sums else here

    share = _share(*_passes(model, batches, points, seed, nats, see), nats)
    return {points[path]: share * total for path, total in sums.items()}


def channel_prices(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], found: Mapping[str, Directions], seed: int, nats: bool
) -> dict[str, Directions]:
    """The same directions, those of channels with what their loss costs (see the module's text)."""
    priced = {name: d for name, d in found.items() if d.site.kind in CHANNELS and d.changes is not None}
    owner = {point.path: name for name, d in priced.items() for point in d.site.points if point.whole}
    sums = {name: torch.zeros(d.site.width, dtype=torch.float64) for name, d in priced.items()}
    batch: dict[str, torch.Tensor] = {}

    def see(path: str | None, x: torch.Tensor, gradient: torch.Tensor) -> None:
        if path is not None:
            changes = priced[owner[path]].changes(x.double(), gradient.double(), path)
            batch[owner[path]] = batch.get(owner[path], 0.0) + changes
            return
        for name, changes in batch.items():
            sums[name] += changes.flip(1).cumsum(1).flip(1).square().sum(0).cpu()
        batch.clear()

    share = _share(*_passes(model, batches, owner, seed, nats, see), nats)
    prices = {}
    for name, total in sums.items():
        d, total = priced[name], share * total[:: priced[name].site.groups]
        # what the data does not show at all is worth what was guessed for it
        unseen = torch.where(total > 0, 0.0, d.damage.diff().neg().clamp_min(0)).flip(0).cumsum(0).flip(0)
        damage = torch.cat([(total + unseen).cummin(0).values, total.new_zeros(1)])
        prices[name] = dataclasses.replace(d, damage=damage, changes=None)
    return {name: prices.get(name, d) for name, d in found.items()}
