"""Fully-connected networks with ternary hidden weights: random ones with matched kernels, or trained ones rounded.

Names are imported when first used: the Auto classes of transformers need the config of these networks, and nothing
else.
"""

from __future__ import annotations

import importlib


_EXPORTS = {
    "compress": ("compress_features", "compress_head"),
    "config": ("TernaryConfig",),
    "diagnostics": ("FeatureDiagnostics", "diagnose"),
    "functionals": ("Activation", "Functionals", "StepFunction", "get_activation", "register_activation"),
    "kernels": ("GaussianMixture", "RandomLayer", "equivalent", "exact_kernels", "kernel_coefficients"),
    "matching": ("LayerMatch", "NetworkMatch", "match_layer", "match_network"),
    "modeling_ternary": ("TernaryMLPForClassification", "TernaryMLPForRegression"),
    "packing": ("pack_model",),
    "report": ("TernaryReport",),
    "training": ("ternarize", "wrap"),
}
_HOMES = {name: room for room, names in _EXPORTS.items() for name in names}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
