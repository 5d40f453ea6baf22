"""The numbers of a model that `needs` reads, from its class and config alone: everything is on the meta device."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..batches import batch_size, evaluating, run
from ..batches.explaining import RAW, in_one_line
from ..config import RMTKDConfig
from ..errors import BudgetError, RMTKDError
from ..models import count_parameters, shifts_labels, uncut_parameters
from .calibration import features_last, frozen, lands_apart, observed, points_of
from .checks import anatomy_of, check_parameters, check_shape, positions_of
from .costs import flops_of, parameters_of
from .needs import Group, Observed, Shape
from .prices import MOST_TOKENS
from .refit import MAX_TOKENS
from .sites import CHANNELS, Anatomy, Point, Site, Unit, get_module, is_layer, linear_shape, select_sites
from .variety import ROWS


__all__ = ["shape_of"]

SELECTED = ("intermediate", "pooled", "attention_groups", *CHANNELS)  # kinds of sites whose features are selected
INSIDE = {"attention_vo": 1, "attention_qk": 2}  # kinds that are cut inside heads: how many projections


def shape_of(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], config: RMTKDConfig, distilled: int = 0
) -> Shape:
    """What a cut of `model` by the recipe works with.

    Args:
        model: on the meta device.
        batch: one batch of calibration data, on the meta device, as long as they are, without padding.
        distilled: samples of the training after the cut.

    Raises:
        UnsupportedArchitectureError: no family, or code that it does not declare; the recipe's target is out of reach
            (BudgetError); form="factored"; code that looks at values.
    """
    if config.form != "absorbed":
        raise RMTKDError(f"form={config.form!r}: what a cut needs is known for form='absorbed' alone.")
    anatomy = anatomy_of(model, config)
    if any(unit.axis != -1 for unit in anatomy.units):
        raise RMTKDError(
            f"{type(model).__name__} has experts: what a pass of it keeps depends on where tokens go, and is not told."
        )
    sites = select_sites(anatomy, config.sites)
    check_shape(model, anatomy, sites, config)
    check_parameters(model, anatomy, sites, config, config.target_reduction)
    batch = _with_mask(model, anatomy, batch)
    with evaluating(model), _without_values(model):
        positions = positions_of(model, [batch])
        kept, share = _shares(model, anatomy, sites, config)
        points, with_gradient = points_of(anatomy, sites), _gradients(anatomy, config)
        widths = _widths(model, batch, points)
        read = {p for s in sites if s.kind in CHANNELS for p in s.points if p.whole}  # see channels.reading_effects
        saved, answers = _saved(_folded(model, anatomy), batch, with_gradient | read, frozen)
        trained, _ = _saved(model, batch, frozenset(), lambda _: contextlib.nullcontext())
    chunk = config.logits_chunk if anatomy.answers else None
    calls = [rows for path in positions for rows, _ in positions.calls_of(path)]
    size, length = batch_size(batch), max(1, round(max(calls, default=1.0)))
    chosen = [site for site in sites if site.chosen]
    hidden = next((site for site in chosen if site.kind == "hidden"), None)
    sizes = [count_parameters(get_module(model, path)) for path in anatomy.blocks]
    samples, widest = config.calibration_samples, max(site.width for site in chosen)
    taken = config.tokens_per_sequence if config.sample_unit == "spaced" else length
    return Shape(
        parameters=count_parameters(model),
        kept=kept,
        element=_element(model),
        copied=_copied(model, anatomy),
        observed=tuple(Observed(width, point in with_gradient) for point, width in widths.items()),
        hidden=hidden.width if hidden else 0,
        hidden_points=len(hidden.points) if hidden else 0,
        neurons=tuple(site.width for site in chosen if site.kind in SELECTED),
        priced=_priced(anatomy, chosen),
        heads=tuple(s.width for s in chosen for _ in range(INSIDE.get(s.kind, 0))),
        blocks=_groups(model, anatomy, sites),
        width_share=share,
        samples=samples,
        length=length,
        batch=size,
        saved=saved,
        trained=trained,
        inside=_inside(model, anatomy),
        answers=answers,
        answered_at_once=min(answers, chunk * (answers // (size * length))) if chunk else answers,
        flops=flops_of(model, anatomy, positions)({}),
        refitted=min(samples, -(-MAX_TOKENS // length)) if config.refit else 0,
        # channels: all samples twice (`channels.reading_effects`, `channels.channel_prices`)
        directional=min(samples, -(-MOST_TOKENS // length)) if anatomy.answers else 2 * samples * bool(read),
        rows=min(length, max(taken, -(-ROWS * widest // samples) if anatomy.answers else 0)),
        inside_blocks=sum(sizes),
        largest_block=max(sizes, default=0),
        distilled=distilled,
    )


@contextlib.contextmanager
def _without_values(model: nn.Module) -> Iterator[None]:
    """Within this context transformers does not look whether a batch without a mask is padded; other code of a class
    that looks at values is refused by name.

    Raises:
        RMTKDError: in place of what a pass without values raises.
    """
    name = "warn_if_padding_and_no_attention_mask"
    looking = [module for module in model.modules() if hasattr(module, name)]
    for module in looking:
        setattr(module, name, lambda *_, **__: None)
    try:
        yield
    except RMTKDError:
        raise
    except RAW as error:
        raise RMTKDError(
            f"What a cut of {type(model).__name__} needs cannot be told from its config alone: its code does not run "
            f"without values ({type(error).__name__}: {in_one_line(error)}). Cut it where it fits, or plan for "
            "another head of the same size."
        ) from error
    finally:
        for module in looking:
            delattr(module, name)


def _with_mask(model: PreTrainedModel, anatomy: Anatomy, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a decoder with a mask of its own: to make one it would look whether texts are packed, at values that are not
    there."""
    if "decoder_input_ids" in batch:
        size, length = batch["decoder_input_ids"].shape
        causal = torch.empty(size, 1, length, length, dtype=torch.bool, device="meta")
        return {**batch, "decoder_attention_mask": causal}
    decoder = shifts_labels(model) or any(site.kind == "attention_groups" for site in anatomy.sites.values())
    if not decoder or "input_ids" not in batch:
        return dict(batch)
    size, length = batch["input_ids"].shape
    mask = torch.empty(size, 1, length, length, dtype=torch.bool, device="meta")
    given = {**batch, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:  # some count them from a mask of two axes
        given["position_ids"] = torch.empty(size, length, device="meta", dtype=torch.long)
    return given


def _shares(model: nn.Module, anatomy: Anatomy, sites: list[Site], config: RMTKDConfig) -> tuple[float, float]:
    """(share of the parameters, share of each width) that stay, all widths being cut alike."""
    target = config.target_reduction
    if target is None:
        raise BudgetError("What a cut needs depends on its size: give a target_reduction, for example 0.3.")
    size, whole = parameters_of(model, anatomy), float(uncut_parameters(model))
    couples = {site.couple: site.group_width for site in sites if site.chosen and site.kind != "embedding"}
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        if size({name: max(1, round(middle * width)) for name, width in couples.items()}) > (1 - target) * whole:
            high = middle
        else:
            low = middle
    return (1 - target) * whole / count_parameters(model), high


def _priced(anatomy: Anatomy, chosen: list[Site]) -> tuple[int, ...]:
    neurons = [s.width for s in chosen if s.kind == "intermediate" and anatomy.answers]
    readers = [s.width for s in chosen if s.kind in CHANNELS for point in s.points if point.whole]
    return (*neurons, *readers, *readers)  # each factor of channels is fp64


def _gradients(anatomy: Anatomy, config: RMTKDConfig) -> frozenset[Point]:
    """As `calibration.gradient_points`, of a model that gives a likelihood."""
    hidden = anatomy.sites.get("hidden")
    if config.importance == "variance" or hidden is None:
        return frozenset()
    lands = {u.lands for u in anatomy.units if u.lands is not None and lands_apart(u, anatomy)}
    return frozenset(hidden.points) | lands


def _element(model: nn.Module) -> int:
    return next(p for p in model.parameters() if p.is_floating_point()).element_size()


def _copied(model: nn.Module, anatomy: Anatomy) -> int:
    """As `narrowing.fold_norms`: a copy of pre-norm models, of decoders in fp32 at least."""
    if not anatomy.pre_norm:
        return 0
    return max(_element(model), 4) if anatomy.answers or anatomy.heads else _element(model)


def _folded(model: PreTrainedModel, anatomy: Anatomy) -> PreTrainedModel:
    """What calibration runs, as wide as its numbers are there."""
    if _copied(model, anatomy) <= _element(model):
        return model
    return copy.deepcopy(model).float()


def _widths(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], points: list[Point]) -> dict[Point, int]:
    """Features at each point."""
    widths: dict[Point, int] = {}

    def see(point: Point, x: torch.Tensor) -> None:
        widths[point] = features_last(x, get_module(model, point.path)).shape[-1]

    with observed(model, points, see), torch.no_grad():
        run(model, batch)
    return widths


def _groups(model: nn.Module, anatomy: Anatomy, sites: list[Site]) -> tuple[tuple[Group, ...], ...]:
    """Of each block the layers that are fitted together, see `refit._fit_part`."""
    cut = {site.name for site in sites}
    units = [
        u
        for u in anatomy.units
        if u.block is not None and is_layer(model, u.path) and _is_product(model, u) and {u.reads, u.writes} & cut
    ]
    found = []
    for _, block in itertools.groupby(units, key=lambda u: u.block):
        groups = []
        for _, same in itertools.groupby(block, key=lambda u: (u.reads, u.through, u.sums)):
            shapes = [linear_shape(get_module(model, u.path)) for u in same]
            groups.append(Group(shapes[0][0] * shapes[0][2], tuple(shape[1] for shape in shapes)))
        found.append(tuple(groups))
    return tuple(found)


def _is_product(model: nn.Module, unit: Unit) -> bool:
    return getattr(get_module(model, unit.path), "weight", torch.empty(0)).dim() in (2, 4)


def _inside(model: nn.Module, anatomy: Anatomy) -> int:
    """Features a token that the layers of the largest block put out."""
    units = [  # bare parameters put nothing out
        u
        for u in anatomy.units
        if u.block is not None and is_layer(model, u.path) and isinstance(get_module(model, u.path), nn.Module)
    ]
    sums: dict[str, int] = {}
    for unit in units:
        module = get_module(model, unit.path)
        width = linear_shape(module)[1] if _is_product(model, unit) else module.weight.numel()
        sums[unit.block] = sums.get(unit.block, 0) + width
    return max(sums.values(), default=0)


def _saved(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], points: frozenset[Point], around: Callable
) -> tuple[int, int]:
    """(bytes that autograd keeps of one pass, parameters not counted; numbers the model answers)."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    def see(_point: Point, x: torch.Tensor) -> None:
        if not x.requires_grad:
            x.requires_grad_()

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with around(model), observed(model, points, see), fused_attention(), torch.enable_grad(), hooks:
        outputs = run(model, batch)
    answers = sum(outputs[name].numel() for name in ("logits", "start_logits", "end_logits") if name in outputs)
    return sum(storage.nbytes() for storage in kept.values()), answers


class _Attention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: queries, keys, values and the output, no weights (Dao et al. 2022)."""

    @staticmethod
    def forward(context: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        context.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return context.saved_tensors[:3]


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """On the meta device torch has no fused attention: within this context it keeps what a fused one would."""
    own = nn.functional.scaled_dot_product_attention

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return _Attention.apply(query, key, value)

    nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = own
