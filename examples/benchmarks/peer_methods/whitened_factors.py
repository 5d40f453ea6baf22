"""Every matrix of the encoder as two factors that keep the most of its output on data, and the word table likewise.

Wang, Zheng, Wan, Zhang 2024, "SVD-LLM: Truncation-aware Singular Value Decomposition" (arXiv:2403.07378), section 3.1:
with S the Cholesky factor of X X^T, the singular values of W S are the losses of truncation. One ratio for all
matrices, as there. The table is the same with one-hot inputs: SVD weighted by token counts. Own implementation; the
paper's decoders are encoders here.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_rmtkd.layers_rmtkd import LowRankLinear

from .common import (
    Given,
    encoder_linears,
    factorise_table,
    largest,
    linear_of,
    moments_of,
    rest_of,
    table_size,
    word_table,
)


STEPS = 10_000  # of the ratio
JITTER = 1e-6  # on the moments, relative to their mean variance: few rows leave them singular


def prune(given: Given) -> PreTrainedModel:
    """A model of thin factors, within the limit."""
    model = given.copied()
    if given.is_small:
        return model
    layers, table = encoder_linears(model), word_table(model)
    fixed = rest_of(model, (*layers.values(), table)) + sum(layer.out_features for layer in layers.values())

    def size(step: int) -> int:
        factors = [_rank(layer.weight, step) * sum(layer.weight.shape) for layer in layers.values()]
        return fixed + sum(factors) + table_size(table, _rank(table.weight, step))

    step = largest(size, given.limit, 1, STEPS, "ratio")
    moments = moments_of(model, layers, given.batches)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        factors = whitened(layer, moments[name], _rank(layer.weight, step))
        setattr(model.base_model.get_submodule(parent), leaf, factors)
    factorise_table(model, _rank(table.weight, step), given.counts)
    return model


def _rank(weight: torch.Tensor, step: int) -> int:
    """The rank at which the factors have step / STEPS of the parameters of the matrix."""
    return max(1, min(step * weight.numel() // (STEPS * sum(weight.shape)), *weight.shape))


@torch.no_grad()
def whitened(layer: nn.Linear, moments: torch.Tensor, rank: int) -> LowRankLinear:
    """The two factors of this rank nearest to the layer's outputs on inputs with these moments."""
    damped = moments + JITTER * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
    root = torch.linalg.cholesky(damped)
    u, s, vt = torch.linalg.svd(layer.weight.double() @ root, full_matrices=False)
    down = torch.linalg.solve_triangular(root, vt[:rank], upper=False, left=False)
    return linear_of(u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * down, layer.bias)
