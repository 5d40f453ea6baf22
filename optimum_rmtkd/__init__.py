"""Makes a Hugging Face model small and fast: widths from random matrix theory, accuracy from self-distillation.

Public names are imported when first used; importing the package loads neither torch nor transformers, and makes
narrowed checkpoints known to transformers' Auto classes.
"""

from __future__ import annotations

import importlib

from .registration import install


__version__ = "0.2.0"

_EXPORTS = {
    "checkpoints": ("newest_checkpoint",),
    "config": ("RMTKDConfig",),
    "errors": (
        "BudgetError",
        "CalibrationError",
        "DiskFullError",
        "IncompleteCheckpointError",
        "LatencyError",
        "MatchingError",
        "NoTargetError",
        "RMTKDError",
        "SpecMismatchError",
        "UnsupportedArchitectureError",
    ),
    "hub.adapters": ("lora_targets",),
    "hub.streaming": ("narrow_streamed",),
    "registration": ("register_model_type",),
    "spectra": ("SecondMoments", "SignalSubspace", "register_edge_estimator", "signal_subspace"),
    "surgery": (
        "DecoderLayout",
        "EncoderLayout",
        "Family",
        "Gate",
        "ResidualConvLayout",
        "StagesLayout",
        "Seq2SeqLayout",
        "Stack",
        "Step",
        "SpectralReport",
        "TowersLayout",
        "analyze",
        "count_parameters",
        "narrow",
        "register_family",
    ),
    "distillation": ("register_objective", "register_projection", "register_transform"),
    "reparameterization": ("MatrixProductOperator", "Powerpropagation", "fold", "over_parameterize"),
    "ternary": (
        "TernaryConfig",
        "TernaryMLPForClassification",
        "TernaryMLPForRegression",
        "compress_features",
        "compress_head",
        "pack_model",
        "ternarize",
    ),
    "trainer": ("RMTKDLoop", "RMTKDMixin", "RMTKDSeq2SeqTrainer", "RMTKDTrainer", "RMTKDTrainingArguments"),
    "vocabulary": ("VocabularyReport", "trim_vocabulary"),
}
_HOMES = {name: room for room, names in _EXPORTS.items() for name in names}

__all__ = sorted(_HOMES)  # noqa: PLE0605

install()


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
