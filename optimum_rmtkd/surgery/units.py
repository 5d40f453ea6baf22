"""Which features have units of their own: rescaled against what reads them, the network computes the same."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN

from .sites import CHANNELS, Anatomy


__all__ = ["own_units"]

ACTIVATIONS = ("hidden_act", "activation_function", "activation", "hidden_activation")  # fields of configs


def own_units(model: nn.Module, anatomy: Anatomy) -> frozenset[str]:
    """Names of the sites whose features have: channels, and neurons whose function is homogeneous, or that are
    multiplied by a second layer (gated feed-forward parts)."""
    homogeneous = _is_homogeneous(getattr(model, "config", None))
    writers = [unit.writes for unit in anatomy.units]
    gated = {site.follows for site in anatomy.sites.values() if site.parts == (1, 1)}
    return frozenset(
        site.name
        for site in anatomy.sites.values()
        if site.kind in CHANNELS
        or (site.kind == "intermediate" and (homogeneous or site.name in gated or writers.count(site.name) > 1))
    )


def _is_homogeneous(config: object) -> bool:
    """Whether f(c x) is a multiple of f(x) for c > 0."""
    name = next((getattr(config, field) for field in ACTIVATIONS if isinstance(getattr(config, field, None), str)), "")
    if name not in ACT2FN:
        return False
    x = torch.linspace(-30, 30, 121, dtype=torch.float64)
    one, two = ACT2FN[name](x), ACT2FN[name](2 * x)
    return torch.allclose(two, one * (two[-1] / one[-1]), atol=1e-9)
