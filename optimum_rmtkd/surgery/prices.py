"""What cuts of a language model cost, from the data: the directional price.

A cut with nested directions turns an activation x into x - sum over j >= k of d_j (e_j . x). With g the gradient at x
of the log-likelihood of labels drawn from the model itself, it costs

    E[(sum over j >= k of (g . d_j)(e_j . x))^2] / 2    nats a token, to second order,

the Fisher quadratic form of the very perturbation, where a product of the moments of x and g takes the two for
independent. Both leave out what a large change does beyond second order, and come out below what a cut turns out to
cost (on two small models by factors of 1 to 2.5, for most cuts): so the larger of the two is taken. The stream is read
through many norms, and all readers lose the same directions: their terms are added before they are squared. One pass
over the data; what is held is a number a token and direction of one batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..batches import batch_size, evaluating, run
from .calibration import features_last, frozen, observed, token_mask
from .directions import Directions
from .likelihood import log_likelihood
from .sites import Point, get_module


__all__ = ["directional_prices", "some"]

MOST_TOKENS = 65536  # a price is one number a width: it needs fewer tokens than the directions


def directional_prices(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], found: Mapping[str, Directions], seed: int
) -> dict[str, Directions]:
    """The same directions with what their loss costs, in nats a sample as the other prices are; no less than what
    those said before.

    Args:
        model: with folded norms; in any mode.
        found: {site: its directions}; those without `changes` come back as they are, the others without them.
        seed: of the draws.
    """
    priced = {name: d for name, d in found.items() if d.changes is not None}
    at = {point: name for name, d in priced.items() for point in d.site.points}
    sums = {name: torch.zeros(len(d.damage), dtype=torch.float64) for name, d in priced.items()}
    samples = 0
    with evaluating(model), frozen(model):
        for batch in some(batches):
            for name, changes in _changes(model, batch, at, priced, seed).items():
                tails = changes.flip(1).cumsum(1).flip(1).double().square().sum(0).cpu()
                sums[name][: len(tails)] += 0.5 * tails
            samples += batch_size(batch)
    prices = {name: (total / max(samples, 1)).cummin(0).values for name, total in sums.items()}
    prices = {name: torch.maximum(price, found[name].damage.to(price)) for name, price in prices.items()}
    # priced once: what prices are made of holds a matrix a site
    return {name: dataclasses.replace(d, damage=prices.get(name, d.damage), changes=None) for name, d in found.items()}


def _changes(
    model: nn.Module, batch: Mapping[str, Any], at: Mapping[Point, str], priced: Mapping[str, Directions], seed: int
) -> dict[str, torch.Tensor]:
    """{site: (tokens, directions)}: to first order, what the log-likelihood loses with each direction."""
    totals: dict[str, torch.Tensor] = {}
    forward = True

    def see(point: Point, x: torch.Tensor) -> None:
        if not forward:
            return
        if not x.requires_grad:
            x.requires_grad_()
        module, mask = get_module(model, point.path), token_mask(batch, x)

        def rows(y: torch.Tensor) -> torch.Tensor:
            y = features_last(y.detach(), module).float()
            return y.reshape(-1, y.shape[-1]) if mask is None else y[mask]

        seen = rows(x)

        def add(gradient: torch.Tensor) -> None:
            name = at[point]
            changes = priced[name].changes(seen, rows(gradient))
            totals[name] = totals[name] + changes if name in totals else changes

        x.register_hook(add)

    with observed(model, at, see), torch.enable_grad():
        likelihood = log_likelihood(model, run(model, batch), batch, seed)
        forward = False
        likelihood.backward()
    return totals


def some(batches: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Evenly spaced batches of about MOST_TOKENS tokens."""
    tokens = sum(batch["input_ids"].numel() for batch in batches if "input_ids" in batch)
    return batches[:: max(1, round(tokens / MOST_TOKENS))]
