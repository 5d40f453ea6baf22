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
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..batches import batch_size, decoder_mask, evaluating, run
from .calibration import features_last, frozen, observed, token_mask
from .directions import Directions
from .likelihood import log_likelihood
from .sites import Point, get_module


__all__ = ["directional_prices", "some"]

MOST_TOKENS = 65536  # a price is one number a width: it needs fewer tokens than the directions


def directional_prices(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    found: Mapping[str, Directions],
    seed: int,
    stack_of: Callable[[str], int] = lambda path: 0,
    again: Collection[Point] = (),
) -> dict[str, Directions]:
    """The same directions with what their loss costs, in nats a sample as the other prices are; no less than what
    those said before.

    Args:
        model: with folded norms; in any mode.
        found: {site: its directions}; those without `changes` come back as they are, the others without them.
        seed: of the draws.
        stack_of: which stack a path belongs to. The terms of one are added token by token; the tokens of another are
            others.
        again: points whose activations are seen a second time, just before their gradients (`recomputing.inside`).
    """
    priced = {name: d for name, d in found.items() if d.changes is not None}
    at = {
        point: (name, stack_of(point.path)) for name, d in priced.items() for point in (d.priced_at or d.site.points)
    }
    sums = {name: torch.zeros(len(d.damage), dtype=torch.float64) for name, d in priced.items()}
    samples = 0

    def add(name: str, changes: torch.Tensor) -> None:
        tails = changes.flip(1).cumsum(1).flip(1).double().square().sum(0).cpu()
        sums[name][: len(tails)] += 0.5 * tails

    with evaluating(model), frozen(model):
        for batch in some(batches):
            _pass(model, batch, at, priced, seed, again, add)
            samples += batch_size(batch)
    prices = {name: (total / max(samples, 1)).cummin(0).values for name, total in sums.items()}
    prices = {name: torch.maximum(price, found[name].damage.to(price)) for name, price in prices.items()}
    # priced once: what prices are made of holds a matrix a site
    return {name: dataclasses.replace(d, damage=prices.get(name, d.damage), changes=None) for name, d in found.items()}


def _pass(
    model: nn.Module,
    batch: Mapping[str, Any],
    at: Mapping[Point, tuple[str, int]],
    priced: Mapping[str, Directions],
    seed: int,
    again: Collection[Point],
    tell: Callable[[str, torch.Tensor], None],
) -> None:
    """Tell of each site (its name, (tokens, directions)): to first order, what the log-likelihood loses with each
    direction. Of a site that is seen at one place this is told, and let go, as soon as its gradient has come."""
    totals: dict[tuple[str, int], torch.Tensor] = {}
    seen: dict[Point, torch.Tensor] = {}
    calls: dict[Point, int] = {}  # more than one where blocks share their layers
    alone = {name for name, d in priced.items() if len(d.priced_at or d.site.points) == 1}
    forward, decoder = True, decoder_mask(model, batch)

    def see(point: Point, x: torch.Tensor) -> None:
        if not x.requires_grad:
            x.requires_grad_()
        if not forward and point not in again:
            return
        module, mask = get_module(model, point.path), token_mask(batch, x, decoder)

        def rows(y: torch.Tensor) -> torch.Tensor:
            y = features_last(y.detach(), module).float()
            return y.reshape(-1, y.shape[-1]) if mask is None else y[mask]

        if not forward:
            seen[point] = rows(x)
            return
        here, calls[point] = None if point in again else rows(x), calls.get(point, 0) + 1

        def add(gradient: torch.Tensor) -> None:
            place = at[point]
            changes = priced[place[0]].changes(seen.pop(point) if here is None else here, rows(gradient))
            if place[0] in alone and calls[point] == 1:
                tell(place[0], changes)
            else:
                totals[place] = totals[place].add_(changes) if place in totals else changes

        x.register_hook(add)

    with observed(model, at, see), torch.enable_grad():
        likelihood = log_likelihood(model, run(model, batch), batch, seed)
        forward = False
        likelihood.backward()
    for (name, _), changes in totals.items():
        tell(name, changes)


def some(batches: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Evenly spaced batches of about MOST_TOKENS tokens."""
    tokens = sum(batch["input_ids"].numel() for batch in batches if "input_ids" in batch)
    return batches[:: max(1, round(tokens / MOST_TOKENS))]
