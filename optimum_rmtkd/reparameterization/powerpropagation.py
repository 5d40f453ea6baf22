"""Powerpropagation: weights as signed powers, so that small ones stay small."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import nn

from ..validation import Interval, Positive
from .base import Reparameterization, Targets, register_reparameterization


__all__ = ["Powerpropagation"]


class SignedPower(nn.Module):
    """theta -> theta |theta|^(exponent - 1), element by element, in fp32."""

    def __init__(self, exponent: float, dtype: torch.dtype):
        super().__init__()
        self.exponent, self.dtype = exponent, dtype

    def forward(self, theta: torch.Tensor) -> torch.Tensor:
        with torch.autocast(theta.device.type, enabled=False):
            # Not theta |theta|^(a-1): below a = 2 its gradient at 0 is 0 * inf, NaN.
            return (theta.sign() * theta.abs().pow(self.exponent)).to(self.dtype)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        wide = weight.double()
        return (wide.sign() * wide.abs().pow(1 / self.exponent)).float()


@register_reparameterization
class Powerpropagation(Reparameterization):
    """w = theta |theta|^(a - 1), with theta = sign(w) |w|^(1/a) at the start: the function is unchanged, up to
    rounding.

    The gradient of theta is a |theta|^(a-1) times that of w: large weights move more, small ones less, and training
    ends with weights that can be pruned by magnitude. An exact 0 stays 0. Steps differ from those of a plain network
    at the same learning rate: tune it.

    Args:
        exponent: a > 1; the paper uses 2 to 5.
        sparsity: share of the entries of each weight, the smallest ones, set to 0 when the weights are folded for
            saving or at the end of the training, in [0, 1). 0: none.

    Reference: Schwarz et al., "Powerpropagation", arXiv 2110.00296, section 2.
    """

    name = "powerpropagation"

    def __init__(
        self,
        exponent: Annotated[float, Interval(1, closed="neither")] = 2.0,
        sparsity: Annotated[float, Interval(0, 1, "left", "a share of the entries")] = 0.0,
        target_modules: Targets | None = None,
        lr_scale: Positive = 1.0,
    ):
        super().__init__(target_modules, lr_scale)
        self.exponent, self.sparsity = exponent, sparsity

    def kinds(self) -> tuple[type, ...]:
        return (*super().kinds(), nn.Conv1d, nn.Conv2d)

    def parametrization(self, weight: torch.Tensor) -> nn.Module:
        return SignedPower(self.exponent, weight.dtype)

    def finish(self, weight: torch.Tensor) -> torch.Tensor:
        count = int(self.sparsity * weight.numel())
        if not count:
            return weight
        order = weight.abs().flatten().argsort(stable=True)
        pruned = weight.flatten().clone()
        pruned[order[:count]] = 0
        return pruned.view_as(weight)
