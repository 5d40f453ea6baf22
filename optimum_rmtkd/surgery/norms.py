"""What a norm over features computes, found by asking it: families have a dozen classes, of two kinds."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import UnsupportedArchitectureError
from ..modeling_rmtkd import epsilon_name, is_norm


__all__ = ["Norm", "norm_of", "turns_axes"]

CLOSE = 1e-3  # of outputs near 1: what half precision, if a norm computes in it, leaves of them


@dataclass(frozen=True)
class Norm:
    """A norm over the last axis: scale * (x - mean) / sqrt(mean square + eps) + shift, with or without the mean.

    Attributes:
        module: the layer.
        centres: subtracts the mean over features (layer norm), or does not (RMS norm).
        offset: what is added to its weight: 1 where the weight holds what the scale is beyond 1 (Gemma).
    """

    module: nn.Module
    centres: bool
    offset: float

    @property
    def scale(self) -> torch.Tensor:
        """(d,) fp64: what normalised features are multiplied with."""
        return self.module.weight.detach().double() + self.offset

    @property
    def shift(self) -> torch.Tensor | None:
        """(d,) fp64, None where it has none."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach().double()

    @property
    def eps(self) -> float:
        """What is added to the mean square; torch's RMS norm without one takes that of the dtype."""
        eps = getattr(self.module, epsilon_name(self.module))
        return torch.finfo(self.module.weight.dtype).eps if eps is None else float(eps)

    def set_scale(self, scale: torch.Tensor) -> None:
        """In place; (d,) of any float dtype."""
        with torch.no_grad():
            self.module.weight.copy_(scale - self.offset)

    def normalised(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., d) fp32 or wider, before scale and shift."""
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        x = x - x.mean(-1, keepdim=True) if self.centres else x
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def turns_axes(module: nn.Module) -> bool:
    """Whether a norm of a convolutional network takes (batch, d, height, width), and turns the axes itself."""
    return getattr(module, "data_format", "") == "channels_first"


@torch.no_grad()
def norm_of(module: nn.Module) -> Norm | None:
    """The norm that a module is; None for all that `is_norm` does not take for one.

    A copy of it is asked: the response to a zero weight tells w from 1 + w, that to a constant whether it centres.

    Raises:
        UnsupportedArchitectureError: it looks like a norm and computes something else.
    """
    if not is_norm(module):
        return None
    if type(module) is nn.LayerNorm:
        return Norm(module, True, 0.0)
    probe = copy.deepcopy(module).cpu().float()  # half precision leaves too little of what is shifted
    if getattr(probe, "bias", None) is not None:
        probe.bias.zero_()
    x = 3 * torch.randn(3, 4, probe.weight.numel(), generator=torch.Generator().manual_seed(0))

    def given(x: torch.Tensor) -> torch.Tensor:
        return probe(x.mT[..., None])[..., 0].mT if turns_axes(module) else probe(x)

    probe.weight.zero_()
    offset = 0.0 if bool((given(x).abs() < CLOSE).all()) else 1.0
    probe.weight.fill_(1.0 - offset)
    found = Norm(module, bool(torch.allclose(given(x + 5.0), given(x), atol=10 * CLOSE)), offset)
    expected = Norm(probe, found.centres, offset).normalised(x)
    if not torch.allclose(given(x).to(expected), expected, atol=10 * CLOSE, rtol=10 * CLOSE):
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} has a weight a feature and an epsilon, but computes neither a layer norm nor an "
            "RMS norm: a stream behind it cannot be narrowed. Leave the stream as wide as it is (sites without "
            "'hidden')."
        )
    return found
