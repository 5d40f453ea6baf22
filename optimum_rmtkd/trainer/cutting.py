"""The cuts of a run: planned, and made. Knows the surgery and a host, no run."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..config import RMTKDConfig
from ..errors import NoTargetError
from . import plain
from .data import isolated_rng
from .host import Host
from .stages import PlannedCut, check_target, plan_cuts


__all__ = ["planned", "reduced"]

OVERSHOOT = 0.01  # of the parameters, that a cut may go beyond the target


def planned(host: Host, config: RMTKDConfig, fit_steps: int, kept: float) -> tuple[PlannedCut, ...]:
    """All cuts of a run, of which the first `fit_steps` fine-tune the model.

    Args:
        kept: share of the uncut model's parameters that there are now.

    Raises:
        BudgetError: the model meets the target already.
        NoTargetError: there is none, the model is fine-tuned first or cut layer by layer, and its spectra do not say
            how far.
        RMTKDError: fewer steps than cuts.
    """
    from .. import surgery

    model, layerwise = host.model, config.schedule == "layerwise"
    parameters = plain.parameters(model)
    check_target(config, parameters, round(parameters / kept))
    sites = _edges(host, config, raw=bool(fit_steps)) if fit_steps or layerwise else None
    groups = surgery.stage_sites(model, config) if layerwise else ()
    if sites is not None:
        groups = [left for group in groups if (left := [name for name in group if name in sites])]
    cuts = plan_cuts(config, host.max_steps - fit_steps, groups, kept)
    return tuple(dataclasses.replace(cut, step=cut.step + fit_steps) for cut in cuts)


def _edges(host: Host, config: RMTKDConfig, raw: bool) -> tuple[str, ...] | None:
    """Without a target the spectra have to say how far to cut. Asked of a model that is fine-tuned first: hours of
    training should not end at that question; and where each layer is cut by its own edge.

    Args:
        raw: the model is not fine-tuned yet.

    Returns:
        Names of the sites whose edge means something; None where there is no question.

    Raises:
        NoTargetError: they do not; the message shows what sizes are predicted to cost.
    """
    from .. import surgery

    with isolated_rng(config.seed):
        try:
            return surgery.check_edges(
                plain.plain(host.model),
                host.calibration_batches(),
                config,
                accelerator=host.accelerator,
                progress=host.shows_progress,
            )
        except NoTargetError as error:
            if not raw:
                raise
            told = "The model is not fine-tuned yet: the losses below say nothing of what a cut will cost it then."
            raise NoTargetError(f"{error.message} {told}", error.curve) from None


def reduced(host: Host, config: RMTKDConfig, cut: PlannedCut, reference: int) -> Any:
    """The reduction of the host's model, which stays as it is: `surgery.Reduction`.

    Args:
        reference: parameters of the uncut model.
    """
    from .. import surgery

    model, recipe = plain.plain(host.model), config
    if config.schedule == "layerwise":
        recipe = config.replace(target_reduction=None, target_flops=None)
    elif cut.target_flops is not None:
        recipe = config.replace(target_flops=cut.target_flops)

    def reduce(target: float | None):
        with isolated_rng(config.seed):
            return surgery.reduce(
                model,
                host.calibration_batches(),
                recipe,
                target_reduction=target,
                sites=None if cut.sites is None else list(cut.sites),
                accelerator=host.accelerator,
                progress=host.shows_progress,
            )

    found, target = reduce(cut.target_reduction), config.target_reduction
    if target is not None and found.parameters_after < (1 - target - OVERSHOOT) * reference:
        found = reduce(target)  # the edges of the last layer ask for more than the target needs
    return found
