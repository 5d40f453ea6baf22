"""Random-matrix theory: tensors in, dataclasses out. Imports torch alone."""

from __future__ import annotations

from . import marchenko_pastur
from .covariance import SecondMoments
from .edges import EDGE_ESTIMATORS, Edge, Spectrum, estimate_edge, register_edge_estimator
from .samples import SAMPLE_UNITS, sample_tokens
from .subspace import SignalSubspace, signal_subspace, spectrum_of


__all__ = [
    "EDGE_ESTIMATORS",
    "SAMPLE_UNITS",
    "Edge",
    "SecondMoments",
    "SignalSubspace",
    "Spectrum",
    "estimate_edge",
    "marchenko_pastur",
    "register_edge_estimator",
    "sample_tokens",
    "signal_subspace",
    "spectrum_of",
]
