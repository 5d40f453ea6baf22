"""For every site: its directions in the order they should go, what their loss is predicted to cost, and the cut
itself.

Predicted loss, in nats of the model's likelihood a sample: half the product of the covariance of what is removed and
the Fisher information of the place in the stream where it lands (to second order, positions taken as independent).
Without gradients: the share of the stream's energy there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..models import Scratch
from ..spectra import SecondMoments
from ..spectra.products import symmetric_product
from .bases import (
    Projection,
    Rescaled,
    Selection,
    fisher_directions,
    head_projection,
    natural_gauge,
    neuron_order,
    neuron_projection,
    never_free,
    polar_alignment,
    query_key_directions,
    rotate_onto_ones,
    value_directions,
)
from .calibration import Calibration
from .linalg import JITTERS, cholesky, eigh, qr
from .norms import norm_of
from .sites import Anatomy, Point, Site, Unit, get_module, is_layer
from .weights import dense_table, dense_weight


__all__ = ["Directions", "parted_projection", "site_directions", "stream_metric"]


LOGIT_SHARE = 0.2  # of 1, 0.3, 0.2 and 0.1 on a 6-layer encoder: the largest that lets heads go as early as neurons do


@dataclass(frozen=True)
class Directions:
    """What a site offers to a budget and to the surgery.

    Attributes:
        site: the site.
        damage: (group_width + 1,) fp64; predicted loss when w features of each group stay. Falls to 0 at full width.
        cut: (width of a group, Projection of the stream or None) -> {unit path or "": Projection}; "" serves the units
            that have no entry of their own.
        changes: activations (tokens, width) and loss gradients there -> (tokens, group_width): what each direction
            adds to the log-likelihood, to first order, see `prices`; of channels (x, gradient, path), see `channels`.
            None: the product rule stands.
        priced_at: where those are taken; None: at all points of the site.
    """

    site: Site
    damage: torch.Tensor
    cut: Callable[[int, Projection | None], dict[str, Projection]]
    changes: Callable[..., torch.Tensor] | None = None
    priced_at: tuple[Point, ...] | None = None


def stream_metric(calibration: Calibration, point: Point | None, dim: int) -> torch.Tensor:
    """(dim, dim) fp64 M such that tr(M C) is the predicted loss of an error of covariance C at a point of the
    stream."""
    moments = calibration.moments.get(point) if point else None
    if moments is None:
        return torch.eye(dim, dtype=torch.float64) / dim
    if moments.gradient_moment is None:
        return torch.eye(dim, dtype=torch.float64) / moments.second_moment.trace().cpu().clamp_min(1e-30)
    return 0.5 * calibration.positions_per_sample(point) * moments.gradient_moment.cpu()


def _tail_sums(scores: torch.Tensor) -> torch.Tensor:
    """(w,) -> (w + 1,): what is left out when the first 0, 1, ... w are kept."""
    return torch.cat([scores.flip(0).cumsum(0).flip(0), scores.new_zeros(1)])


def _unit_reading(model: nn.Module, anatomy: Anatomy, site: Site) -> Unit | None:
    return next((u for u in anatomy.units if u.reads == site.name and is_layer(model, u.path)), None)


def _weight_behind(model: nn.Module, unit: Unit) -> torch.Tensor:
    """(out, in, positions) fp64 weight of a unit."""
    weight = dense_weight(get_module(model, unit.path)).cpu()
    return unit.scale * (weight.flatten(2) if weight.dim() == 4 else weight[..., None])


def _moment(model: nn.Module, reader: Unit | None, moments: SecondMoments) -> torch.Tensor:
    """What varies about an activation: its mean is no loss where the layer behind it has a bias to keep it in."""
    if reader is not None and get_module(model, reader.path).bias is not None:
        return moments.covariance.cpu()
    return moments.second_moment.cpu()


def _centred(model: nn.Module, anatomy: Anatomy) -> bool:
    """Whether the norms that read the stream centre it: the first is asked, for not every stream ends in one."""
    asked = (norm_of(get_module(model, u.path)) for u in anatomy.units if u.block and is_layer(model, u.path))
    return next((norm.centres for norm in asked if norm is not None), False)


def _joint(at: Sequence[SecondMoments], rest: Callable[[], None]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Means of the second moments of several places and of those of their gradients, each of trace 1; a matrix at a
    time."""
    joint, fisher, count = 0.0, 0.0, 0
    for moments in at:
        second, gradient = moments.second_moment.cpu(), moments.gradient_moment
        joint = joint + second / second.trace()
        if gradient is not None and gradient.trace() > 0:
            fisher, count = fisher + gradient.cpu() / gradient.trace().cpu(), count + 1
        rest()
    return joint / len(at), fisher / count if count else None


def hidden_directions(
    model: nn.Module, site: Site, anatomy: Anatomy, calibration: Calibration, basis: str
) -> Directions:
    """The residual stream: one basis for its whole depth, from trace-normalised moments before and after each norm."""
    at = [calibration.moments[point] for point in site.points]
    joint, fisher = _joint(at, calibration.rest)
    dim = site.width
    ones = torch.full((dim, 1), dim**-0.5, dtype=torch.float64)
    keeps_ones = anatomy.pre_norm and _centred(model, anatomy)
    if keeps_ones:  # what lies along them no layer reads
        joint = joint - ones @ (ones.T @ joint)
        joint = joint - (joint @ ones) @ ones.T
    if basis == "random":
        generator = torch.Generator().manual_seed(calibration.config.seed)
        ranked = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    else:
        ranked, _ = fisher_directions(joint, fisher)
    if keeps_ones:
        # Layer norm subtracts the mean over features: that direction stays, for the narrow one to subtract the same.
        ranked = torch.cat([ones, (ranked - ones @ (ones.T @ ranked))], dim=1)
    nested = qr(ranked, "Basis of the stream")[0]
    # tr(M (1 - P) S (1 - P)) for every nested P at once: sums over the lower right corner of a Hadamard product
    corner = torch.zeros(dim, dim, dtype=torch.float64)
    for point, moments in zip(site.points, at, strict=True):
        metric = nested.T @ stream_metric(calibration, point, dim) @ nested
        corner += metric * (nested.T @ moments.second_moment.cpu() @ nested) / len(at)
        calibration.rest()
    sums = corner.flip(0, 1).cumsum(0).cumsum(1).flip(0, 1).diagonal()
    # The stream is cut anew at each of its two sums a block, each time of what that block adds. Half as many whole
    # cuts fitted best: of 1, L/2, 2L/3 and 5L/3 for L = 6 blocks (docs/surgery.md). What runs again and again is seen
    # as often: the mean is one of all calls.
    runs, calls = len(anatomy.blocks) * anatomy.repeats, _calls(site.points, anatomy)
    damage = torch.cat([sums, sums.new_zeros(1)]).clamp_min(0) * max(1.0, runs / 2) * len(at) / calls

    def cut(width: int, stream: Projection | None = None) -> dict[str, Projection]:
        kept = polar_alignment(nested[:, :width])
        if width < dim and (keeps_ones or not anatomy.pre_norm):
            inside = kept.T @ joint @ kept
            quiet = (kept.T @ ones)[:, 0] if keeps_ones else eigh(inside, "Rotation of the stream")[1][:, 0]
            kept = rotate_onto_ones(kept, quiet / quiet.norm())
        return {"": Projection(kept, kept), **_before_norms(model, anatomy, kept)}

    def changes(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        basis = nested.to(x)
        return (x @ basis) * (gradient @ basis)

    # where norms stand behind the sums, a later one sees what an earlier cut has removed already
    return Directions(site, damage.cummin(0).values, cut, changes if anatomy.answers and anatomy.pre_norm else None)


def _calls(points: Sequence[Point], anatomy: Anatomy) -> float:
    """How often modules are called at these points, all together."""
    blocks = tuple(f"{block}." for block in anatomy.blocks)
    return sum(anatomy.repeats if f"{point.path}.".startswith(blocks) else 1.0 for point in points)


def _before_norms(model: nn.Module, anatomy: Anatomy, basis: torch.Tensor) -> dict[str, Projection]:
    """Cuts of layers whose output goes through a norm before it is added to the stream, and of these norms."""
    found = {}
    for unit in anatomy.units:
        if unit.behind is not None:
            norm = norm_of(get_module(model, unit.behind))
            before = Rescaled(basis, norm.scale.cpu(), norm.centres)
            found |= {unit.path: before, unit.behind: Projection(basis, basis, scale=before.scale)}
    return found


def neuron_directions(
    model: nn.Module, site: Site, anatomy: Anatomy, calibration: Calibration, basis: str
) -> Directions:
    """Element-wise sites (feed-forward neurons, a pooler): select by pivoted Cholesky, compensate."""
    reader = _unit_reading(model, anatomy, site)
    point, count = site.points[0], calibration.moments[site.points[0]].count
    if reader is None:
        effect = torch.ones(site.width, dtype=torch.float64)
    else:
        weight = _weight_behind(model, reader)
        metric = stream_metric(calibration, reader.lands, len(weight))
        effect = torch.einsum("oik,op,pik->i", weight, metric, weight).clamp_min(0)

    def whole() -> torch.Tensor:
        # made twice rather than held until the cut: these are the largest matrices of a network
        return never_free(_moment(model, reader, calibration.moments[point]), effect, count)

    moment = whole()
    if basis == "random":
        generator = torch.Generator().manual_seed(calibration.config.seed + site.depth)
        order = torch.randperm(site.width, generator=generator)
        residual = _tail_sums((moment.diagonal() * effect)[order])
    else:
        order, residual = neuron_order(moment, effect.sqrt())

    mean = _mean(model, reader, calibration.moments[point])

    def cut(width: int, stream: Projection | None = None) -> dict[str, Projection]:
        return {"": neuron_projection(whole(), order[:width].sort().values, mean)}

    if not anatomy.answers or not calibration.gradients:
        return Directions(site, residual, cut)
    return Directions(site, residual, cut, _neuron_changes(moment, effect, order, mean, calibration.scratch))


def _mean(model: nn.Module, reader: Unit | None, moments: SecondMoments) -> torch.Tensor | None:
    """What a bias makes up for, see `_moment`."""
    return moments.mean.cpu() if reader is not None and get_module(model, reader.path).bias is not None else None


def _less(x: torch.Tensor, mean: torch.Tensor | None) -> torch.Tensor:
    return x if mean is None else x - mean.to(x)


def _neuron_changes(
    moment: torch.Tensor,
    effect: torch.Tensor,
    order: torch.Tensor,
    mean: torch.Tensor | None,
    scratch: Scratch | None,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """With M = L L^T the moment in the order of the pivots, the activation is L z: without neuron j, predicted from
    those before it, it loses z_j times the column j of L."""
    size = effect.clamp_min(1e-30).sqrt()[order]
    scaled = moment[order][:, order] * torch.outer(size, size)
    factor = cholesky(scaled, "Prices of features", (1e-8, *JITTERS[2:])).float()
    factor = factor if scratch is None else scratch.part().keep(factor)  # a file of its own: it goes before the rest

    def changes(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        by, lower = size.to(x), factor.to(x)
        inside = torch.linalg.solve_triangular(lower, (_less(x, mean)[:, order] * by).T, upper=False).T
        return inside * (gradient[:, order] / by @ lower)

    return changes


def _per_head(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """Diagonal blocks (heads, w, w) of a (heads * w, heads * w) matrix."""
    width = len(matrix) // heads
    return torch.stack([matrix[h * width : (h + 1) * width, h * width : (h + 1) * width] for h in range(heads)])


def _random_head_bases(site: Site, calibration: Calibration) -> torch.Tensor:
    generator = torch.Generator().manual_seed(calibration.config.seed + site.depth)
    shape = (site.groups, site.group_width, site.group_width)
    return torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))[0]


def _values(model: nn.Module, site: Site, anatomy: Anatomy, calibration: Calibration):
    unit = next(u for u in anatomy.units if u.reads == site.name)
    weight = dense_weight(get_module(model, unit.path)).cpu()
    effect = weight.T @ stream_metric(calibration, unit.lands, len(weight)) @ weight
    context = _moment(model, unit, calibration.moments[site.points[0]])
    return value_directions(_per_head(context, site.groups), _per_head(effect, site.groups))


def value_site_directions(
    model: nn.Module, site: Site, anatomy: Anatomy, calibration: Calibration, basis: str
) -> Directions:
    """Values, per head, by their effect on the stream."""
    encode, decode, scores = _values(model, site, anatomy, calibration)
    if basis == "random":
        encode = decode = _random_head_bases(site, calibration)

    mean = _mean(model, _unit_reading(model, anatomy, site), calibration.moments[site.points[0]])

    def cut(width: int, stream: Projection | None = None) -> dict[str, Projection]:
        return {"": head_projection(*natural_gauge(encode[..., :width], decode[..., :width]), width, mean)}

    changes = _head_changes(encode, decode, mean) if anatomy.answers and calibration.gradients else None
    return Directions(site, _tail_sums(scores.sum(0)), cut, changes)


def _head_changes(
    encode: torch.Tensor, decode: torch.Tensor, mean: torch.Tensor | None = None
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Of heads (heads, w, w), what those of one number are in all of them together."""
    heads = len(encode)

    def changes(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        x, gradient = (y.unflatten(1, (heads, -1)) for y in (_less(x, mean), gradient))
        inside = torch.einsum("nhi,hij->nhj", x, encode.to(x))
        return (inside * torch.einsum("nhi,hij->nhj", gradient, decode.to(x))).sum(1)

    return changes


def query_key_site_directions(
    model: nn.Module, site: Site, anatomy: Anatomy, calibration: Calibration, basis: str
) -> Directions:
    """Queries and keys, per head and jointly.

    An error e of an attention logit moves the output by about e times the spread of the values, so the predicted loss
    is the variance of the lost logits times the loss carried by the head's whole output (at most all of it), times
    LOGIT_SHARE: independent errors partly cancel in the sum over keys.
    """
    makers = [u for u in anatomy.units if u.writes == site.name and is_layer(model, u.path)]
    sides = [[calibration.moments[Point(u.path)] for u in makers if u.keys == keys] for keys in (False, True)]
    if not any(u.entrance for u in makers):
        # what all keys have in common adds the same to every logit of a query, which softmax does not see
        moments = [sides[0][0].second_moment.cpu(), sides[1][0].covariance.cpu()]
    else:
        # relative positions: terms of a logit are added, of queries and keys by themselves and with positions, which
        # read the mean key of what they share a layer with
        moments = [sum(each.second_moment.cpu() for each in side) for side in sides]
    query, key = (_per_head(moment, site.groups) for moment in moments)
    encode_q, encode_k, scores = query_key_directions(query, key)
    if basis == "random":
        encode_q = encode_k = _random_head_bases(site, calibration)
    partner = next(s for s in anatomy.sites.values() if s.couple == site.couple and s.kind == "attention_vo")
    carried = _values(model, partner, anatomy, calibration)[2].sum(-1)
    attention = _attention_of(anatomy, partner)
    lost = torch.stack([_tail_sums(s) for s in scores]) * anatomy.softmax_scales[attention] ** 2
    damage = LOGIT_SHARE * (lost.clamp(max=1.0) * carried[:, None]).sum(0)

    def cut(width: int, stream: Projection | None = None) -> dict[str, Projection]:
        # code that divides by the root of the width of a head finds another one
        kept = 1.0 if attention in anatomy.fixed_attrs else (width / site.group_width) ** 0.5
        queries, keys = head_projection(kept * encode_q, encode_q, width), head_projection(encode_k, encode_k, width)
        return {u.path: keys if u.keys else queries for u in makers}

    if not anatomy.answers or not calibration.gradients:
        return Directions(site, damage, cut)
    # the form is bilinear: what queries lose says it all. They are S encode (encode' query) / score, S their moment
    carried_by = scores.sqrt().clamp_min(1e-12 * scores.max().sqrt())[:, None]
    decode_q = encode_q if basis == "random" else query @ encode_q / carried_by
    return Directions(site, damage, cut, _head_changes(encode_q, decode_q), site.points[:1])


def group_directions(
    model: nn.Module, site: Site, anatomy: Anatomy, calibration: Calibration, basis: str
) -> Directions:
    """Whole key-value groups of attention, each with all query heads that share it: what they give to the stream."""
    unit = next(u for u in anatomy.units if u.reads == site.name)
    weight = dense_weight(get_module(model, unit.path)).cpu()
    effect = unit.scale**2 * weight.T @ stream_metric(calibration, unit.lands, len(weight)) @ weight
    point = site.points[0]

    def moment() -> torch.Tensor:
        return _moment(model, unit, calibration.moments[point])

    count = site.group_width
    scores = torch.einsum("gij,gji->g", _per_head(moment(), count), _per_head(effect, count)).clamp_min(0)
    order = scores.argsort(descending=True)
    if basis == "random":
        generator = torch.Generator().manual_seed(calibration.config.seed + site.depth)
        order = torch.randperm(count, generator=generator)

    mean = _mean(model, unit, calibration.moments[point])

    def cut(width: int, stream: Projection | None = None) -> dict[str, Projection]:
        return {"": neuron_projection(moment(), site.features_of(order[:width].sort().values), mean)}

    def changes(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return (_less(x, mean) * gradient).unflatten(1, (count, -1)).sum(-1)[:, order]

    return Directions(site, _tail_sums(scores[order]), cut, changes)


def parted_projection(site: Site, lead: Site, cut: Projection) -> Projection:
    """The cut of a site that follows another: of the same groups (neurons) its own features."""
    groups = cut.index if not lead.parts else cut.index.reshape(-1, lead.groups)[:, 0] // lead.groups
    return Selection(cut.decode.new_empty(0), site.features_of(groups), site.width)


def _attention_of(anatomy: Anatomy, site: Site) -> str:
    return next(a.path for a in anatomy.attributes if a.site == site.name)


def table_directions(
    model: nn.Module, site: Site, anatomy: Anatomy, calibration: Calibration, basis: str
) -> Directions:
    """The word table as two factors. Its moment is half that of the calibration text, half that of all rows alike:
    words that the text lacks must survive, too."""
    unit = next(u for u in anatomy.units if u.factor == site.name)
    table = dense_table(get_module(model, unit.path)).cpu()
    seen = calibration.moments[site.points[0]].second_moment.cpu()
    alike = symmetric_product(table, table) / len(table)
    moment = (seen / seen.trace() + alike / alike.trace()) * (seen.trace() / 2)
    metric = stream_metric(calibration, unit.lands, table.shape[1])

    def ranked(stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        effect = stream.T @ metric @ stream
        effect = effect + 1e-3 * effect.trace() / len(effect) * torch.eye(len(effect), dtype=effect.dtype)
        encode, decode, scores = value_directions((stream.T @ moment @ stream)[None], effect[None])
        return stream @ encode[0], stream @ decode[0], scores[0]

    def cut(width: int, stream: Projection | None = None) -> dict[str, Projection]:
        if basis == "random":
            generator = torch.Generator().manual_seed(calibration.config.seed)
            shape = (len(moment), width)
            random = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))[0]
            return {"": Projection(random, random)}
        encode, decode, _ = ranked(torch.eye(len(moment), dtype=torch.float64) if stream is None else stream.encode)
        return {"": Projection(*natural_gauge(encode[:, :width], decode[:, :width]))}

    scores = ranked(torch.eye(len(moment), dtype=torch.float64))[2]
    return Directions(site, _tail_sums(scores)[: site.width + 1], cut)


def factored_directions(
    model: nn.Module, site: Site, anatomy: Anatomy, calibration: Calibration, basis: str
) -> Directions:
    """Any linear layer: the directions of its output, the best rank-k layer in the mean square of its own inputs."""
    moments = calibration.moments[site.points[0]]
    module = get_module(model, next(u for u in anatomy.units if u.factor == site.name).path)
    # without a bias there is nowhere to put the mean back: it is then one of the directions
    moment = (moments.second_moment if module.bias is None else moments.covariance).cpu()
    mean = None if module.bias is None else moments.mean.cpu()
    values, vectors = eigh(moment, f"Directions of {site.name}")
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    if basis == "random":
        generator = torch.Generator().manual_seed(calibration.config.seed + site.depth)
        vectors = torch.linalg.qr(torch.randn(*vectors.shape, generator=generator, dtype=torch.float64))[0]
    damage = _tail_sums(values)[: site.width + 1] / values.sum().clamp_min(1e-30)

    def cut(width: int, stream: Projection | None = None) -> dict[str, Projection]:
        kept = vectors[:, :width]
        return {"": Projection(kept, kept, offset=None if mean is None else mean - kept @ (kept.T @ mean))}

    return Directions(site, damage, cut)


KINDS: dict[str, Callable[..., Directions]] = {
    "hidden": hidden_directions,
    "intermediate": neuron_directions,
    "pooled": neuron_directions,
    "attention_vo": value_site_directions,
    "attention_qk": query_key_site_directions,
    "attention_groups": group_directions,
    "embedding": table_directions,
    "linear": factored_directions,
}
PER_HEAD = ("attention_vo", "attention_qk", "attention_groups")  # directions of each head, or of whole groups


def site_directions(
    model: nn.Module, site: Site, anatomy: Anatomy, calibration: Calibration, basis: str
) -> Directions:
    """Directions of one site, by its kind. `basis`: "signal", or "random" for the control."""
    found = KINDS[site.kind](model, site, anatomy, calibration, basis)
    if site.groups == 1 or site.kind in PER_HEAD:
        return found
    # one width with the heads: so many features go at a time
    cut, single = found.cut, found.changes
    changes = None if single is None else lambda x, g: single(x, g).unflatten(1, (-1, site.groups)).sum(-1)
    damage = found.damage[:: site.groups]
    return Directions(site, damage, lambda width, stream=None: cut(width * site.groups, stream), changes)
