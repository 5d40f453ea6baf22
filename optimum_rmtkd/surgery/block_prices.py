"""What it costs to leave whole blocks out.

What one block costs is measured: the divergence of the model's answers without it, on a few batches. A block is no
small change, and to second order its loss was 3 to 10 times too low. What several cost together is that, and what they
do to each other: with a_b = (what block b gives) - (what it gets), which for a post-norm block is the change by its
norms, too, and g the gradient at its output of the log-likelihood of labels drawn from the model, c_b = sum over
positions of g . a_b is what the log-likelihood loses to first order, and

    E[(sum over b in S of c_b)^2] / 2 = sum over b, d in S of E[c_b c_d] / 2    nats

is the Fisher quadratic form of that perturbation, as for all other sites; of a language model, whose tokens are
answers of their own, c_b is taken token by token. Its terms of two blocks are scaled as those of each are to what was
measured. Changes that cancel each other are not counted on: products below 0 count as 0. A model without logits: the
share of the stream's energy that a block adds.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..batches import batch_size, evaluating, run
from .calibration import frozen, token_mask
from .couples import Couple
from .divergence import Remembered, looked_at, mean_divergence
from .likelihood import answers, log_likelihood
from .prices import some
from .sites import Anatomy, Site, get_module


__all__ = ["block_prices", "whole_block"]

MOST = 1e6  # nats


def block_prices(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], anatomy: Anatomy, seed: int, nats: bool
) -> torch.Tensor:
    """(blocks, blocks) fp64, symmetric and not negative: the sum over the rows and columns of a set of blocks is what
    leaving it out is predicted to cost, in nats a sample, or (without `nats`) in shares of energy.

    Args:
        model: with folded norms; in any mode.
        seed: of the drawn labels.
    """
    found, samples = None, 0
    alone = _measured(model, batches, anatomy) if nats else None
    with evaluating(model), frozen(model):
        for batch in some(batches) if anatomy.answers else batches:
            each = _changes(model, batch, anatomy, seed) if nats else _energies(model, batch, anatomy)
            found = each if found is None else found + each
            samples += batch_size(batch)
    if nats:
        second = (0.5 * found / max(samples, 1)).clamp_min(0)
        own = second.diagonal()
        factor = torch.where(own > 0, alone / own.clamp_min(1e-300), 0.0).sqrt()
        prices = second * factor[:, None] * factor
        return prices.diagonal_scatter(alone)
    return torch.diag(found[0] / found[1].clamp_min(1e-30))


def whole_block(anatomy: Anatomy, site: Site, prices: torch.Tensor) -> Couple:
    """What a budget weighs of a block: all of it, or nothing."""
    own = prices[site.depth]
    others = {s.couple: 2 * float(own[s.depth]) for s in anatomy.block_sites.values() if s is not site}
    damage = torch.stack([own[site.depth], torch.zeros_like(own[site.depth])])
    return Couple(site.couple, (site,), 1, 0, 1, 1, damage, torch.empty(0), 1, beside=others)


@torch.no_grad()
def _measured(model: nn.Module, batches: Sequence[Mapping[str, Any]], anatomy: Anatomy) -> torch.Tensor:
    """(blocks,) fp64: divergence of the answers without each block, in nats a sample; at least 0. One that is not
    finite (a model that falls apart) counts as MOST."""
    known = Remembered(len(batches), next(model.parameters()).device, most=sys.maxsize)
    with evaluating(model):
        for index in looked_at(len(batches)):
            known.keep(index, answers(model, run(model, batches[index]), batches[index]))
    per_sample = statistics.mean(known.per_sample.values())
    found = []
    for block in anatomy.blocks:
        handle = get_module(model, block).register_forward_hook(_left_out, with_kwargs=True)
        try:
            found.append(mean_divergence(model, model, batches, known) * per_sample)
        finally:
            handle.remove()
    return torch.tensor(found, dtype=torch.float64).nan_to_num(nan=MOST, posinf=MOST).clamp(0.0, MOST)


def _left_out(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    entered = args[0] if args else next(iter(kwargs.values()))
    return entered if isinstance(output, torch.Tensor) else (entered, *output[1:])


def _changes(model: nn.Module, batch: Mapping[str, Any], anatomy: Anatomy, seed: int) -> torch.Tensor:
    """(blocks, blocks): sums over samples (tokens) of c_b c_d."""
    changes: dict[str, torch.Tensor] = {}
    forward = True

    def see(block: str, entered: torch.Tensor, left: torch.Tensor) -> None:
        if not forward:
            return  # a block that is recomputed for its gradients
        if not left.requires_grad:
            left.requires_grad_()
        added, mask = (left - entered).detach().float(), token_mask(batch, left)

        def keep(gradient: torch.Tensor) -> None:
            change = (gradient.float() * added).sum(-1).double()
            change = change if mask is None else change * mask
            changes[block] = (change if anatomy.answers else change.flatten(1).sum(1)).flatten()

        left.register_hook(keep)

    handles = _watched(model, anatomy, see)
    try:
        with torch.enable_grad():
            likelihood = log_likelihood(model, run(model, batch), batch, seed)
            forward = False
            likelihood.backward()
    finally:
        for handle in handles:
            handle.remove()
    found = torch.stack([changes[block] for block in anatomy.blocks])
    return (found @ found.T).cpu()


def _energies(model: nn.Module, batch: Mapping[str, Any], anatomy: Anatomy) -> torch.Tensor:
    """(2, blocks): sums of squares of what each block adds, and of what it gives."""
    sums: dict[str, torch.Tensor] = {}

    def see(block: str, entered: torch.Tensor, left: torch.Tensor) -> None:
        mask = token_mask(batch, left)
        pairs = [x.double() if mask is None else x[mask].double() for x in (left - entered, left)]
        sums[block] = torch.stack([x.square().sum() for x in pairs])

    handles = _watched(model, anatomy, see)
    try:
        with torch.no_grad():
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([sums[block] for block in anatomy.blocks], dim=1).cpu()


def _watched(model: nn.Module, anatomy: Anatomy, see: Any) -> list[Any]:
    """Hooks that call `see(block, stream before, stream after)`."""

    def hook(block: str) -> Any:
        def on_output(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            entered = args[0] if args else next(iter(kwargs.values()))
            see(block, entered, output if isinstance(output, torch.Tensor) else output[0])

        return get_module(model, block).register_forward_hook(on_output, with_kwargs=True)

    return [hook(block) for block in anatomy.blocks]
