"""Weights of layers, (out, in) whatever way a class stores them."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


__all__ = ["dense_table", "dense_weight", "scale_inputs", "scale_outputs", "set_weight"]


def dense_weight(module: nn.Module) -> torch.Tensor:
    """Weight (out, in) fp64 of a linear layer, (out, in, h, w) of a convolution; factored ones multiplied out."""
    if hasattr(module, "down"):
        up, down = module.up.weight.detach().double(), module.down.weight.detach().double()
        return (
            torch.einsum("or...,ri...->oi...", up, down)
            if up.dim() == 2
            else ((up.flatten(1) @ down.flatten(1))[..., None, None])
        )
    weight = module.weight.detach().double()
    return weight.T if isinstance(module, Conv1D) else weight


def dense_table(module: nn.Module) -> torch.Tensor:
    """(num_embeddings, dim) fp64 of an embedding, a factored one multiplied out."""
    table = module.weight.detach().double()
    return table @ module.up.weight.detach().double().T if hasattr(module, "up") else table


def scale_inputs(module: nn.Module, scale: torch.Tensor) -> None:
    """Multiply each input feature of a linear layer or convolution by its entry of `scale` (in,), in place, in fp64
    and rounded once; of a layer that reads several vectors one behind the other, each of them."""
    if isinstance(module, nn.Parameter):  # experts (number, out, in)
        with torch.no_grad():
            module.copy_(module.double() * scale)
        return
    first = module.down if hasattr(module, "down") else module
    if isinstance(first, Conv1D):
        scale = scale[:, None]
    elif first.weight.dim() == 4:
        scale = scale[:, None, None]
    else:
        scale = scale.repeat(first.weight.shape[1] // len(scale))
    with torch.no_grad():
        first.weight.copy_(first.weight.double() * scale)


def set_weight(module: nn.Module, weight: torch.Tensor) -> None:
    """Inverse of `dense_weight` for layers of one factor; rounded to the dtype of the layer."""
    with torch.no_grad():
        module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)


@torch.no_grad()
def scale_outputs(module: nn.Module, scale: torch.Tensor) -> None:
    """Multiply each output feature of a linear layer by its entry of `scale` (out,), in place, in fp64 and rounded
    once."""
    last, scale = (module.up if hasattr(module, "down") else module), scale.double()
    weight = last.weight.double()
    last.weight.copy_(weight * scale if isinstance(last, Conv1D) else weight * scale[:, None])
    if last.bias is not None:
        last.bias.copy_(last.bias.double() * scale)
