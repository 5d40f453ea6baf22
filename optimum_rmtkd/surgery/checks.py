"""What cannot work is refused before anything expensive: by the model and the recipe, and by a look at the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..batches import batch_size, evaluating, first_samples, run
from ..config import RMTKDConfig
from ..errors import CalibrationError, RMTKDError
from ..models import Scratch, check_behaviour, check_structure, uncut_parameters
from ..spectra.edges import find_estimator
from .budget import check_reachable, flops_of, parameters_of
from .calibration import observed, points_of
from .costs import Positions
from .depth import with_blocks
from .families import family_of
from .grouping import by_length
from .layouts import factored_anatomy
from .native import check_expressible, native_anatomy
from .sites import Anatomy, Point, Site, linear_layers, linear_shape, select_sites
from .tryout import checked_batches


__all__ = [
    "anatomy_of",
    "check_data",
    "check_finite",
    "check_flops",
    "check_parameters",
    "check_scratch",
    "check_shape",
    "check_recipe",
    "positions_of",
]

LOOKED_AT = 2  # samples that show what a model computes, what its head reads, and at how many positions


def anatomy_of(model: PreTrainedModel, config: RMTKDConfig) -> Anatomy:
    """Sites and units of a model in the form and shape of the recipe; raises UnsupportedArchitectureError, and
    RMTKDError for a model that cannot have that shape."""
    if config.form == "factored":
        return factored_anatomy(model)
    anatomy = native_anatomy(model) if config.shape == "native" else family_of(model).layout.anatomy(model)
    return with_blocks(model, anatomy, config.sites)


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
    check_shape(model, anatomy, sites, config)
    find_estimator(config.edge_estimator)
    if config.target_flops is not None:
        check_counted(model, anatomy)
    check_finite(model)
    check_parameters(model, anatomy, sites, config, config.target_reduction)


def check_shape(model: PreTrainedModel, anatomy: Anatomy, sites: list[Site], config: RMTKDConfig) -> None:
    """Refuse a model that cannot be narrowed in the shape of the recipe; raises UnsupportedArchitectureError."""
    if config.shape == "native":  # at three quarters: a half may be the width of something else by chance
        check_expressible(model, anatomy, {site.couple: max(1, 3 * site.group_width // 4) for site in sites})


def check_scratch(config: RMTKDConfig) -> None:
    """Refuse files for what they do not help with; raises RMTKDError."""
    if config.shape == "native":
        raise RMTKDError(
            "shape='native' with models in files: the plain model is made in memory, whole, and more than once. Leave "
            "`scratch` out where memory has room for it (narrow, in place of narrow_streamed), or use shape='free'."
        )


def check_finite(model: PreTrainedModel, scratch: Scratch | None = None) -> None:
    broken = []
    for name, tensor in model.named_parameters():
        if not bool(tensor.isfinite().all()):
            broken.append(name)
        if scratch is not None:
            scratch.release()
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
    check_behaviour(model, first_samples(batches[0], LOOKED_AT))
    if config.target_flops is not None:
        with evaluating(model):
            batches = by_length(model, batches, points_of(anatomy, sites))
            check_flops(model, anatomy, sites, batches, config, config.target_flops)


def check_parameters(
    model: PreTrainedModel, anatomy: Anatomy, sites: list[Site], config: RMTKDConfig, target: float | None
) -> None:
    if target is not None:
        whole = uncut_parameters(model)
        check_reachable(sites, parameters_of(model, anatomy), (1 - target) * whole, whole, config, "parameters")


def check_counted(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Refuse to count FLOPs that depend on the data.

    Raises:
        RMTKDError: a model with experts.
    """
    if any(unit.axis != -1 for unit in anatomy.units):
        raise RMTKDError(
            f"target_flops: the experts of {type(model).__name__} run for the tokens that are routed to them, and "
            "their work is not counted. Ask for a size (target_reduction) or a time (target_latency)."
        )


def check_flops(
    model: PreTrainedModel,
    anatomy: Anatomy,
    sites: list[Site],
    batches: Sequence[dict[str, Any]],
    config: RMTKDConfig,
    target: float | None,
) -> None:
    if target is not None:
        check_counted(model, anatomy)
        flops = flops_of(model, anatomy, positions_of(model, batches))
        check_reachable(sites, flops, (1 - target) * flops({}), flops({}), config, "FLOPs")


def positions_of(model: PreTrainedModel, batches: Sequence[dict[str, Any]]) -> Positions:
    """Positions of a sample that all linear layers and convolutions are applied at, from a batch of middling
    length."""
    calls: dict[str, list[tuple[float, float]]] = {}
    batch = first_samples(batches[len(batches) // 2], LOOKED_AT)  # all samples of a batch are as long
    size = batch_size(batch)
    layers = linear_layers(model, torch.nn.Conv1d)

    def see(point: Point, x: torch.Tensor) -> None:
        rows = x.numel() / linear_shape(layers[point.path])[1] / size
        # some classes lay all samples out on one axis
        calls.setdefault(point.path, []).append((rows, float(x.shape[-2]) if x.dim() > 2 else rows))

    with observed(model, [Point(path) for path in layers], see), torch.no_grad():
        run(model, batch)
    return Positions({path: sum(rows for rows, _ in each) for path, each in calls.items()}, calls)
