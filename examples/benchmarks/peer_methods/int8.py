"""Weights of linear layers as 8-bit integers, by the library `torchao` through transformers, alone or after a cut."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

from transformers import AutoModelForSequenceClassification, PreTrainedModel

from .common import Given


def quantise(given: Given, first: Callable[[Given], PreTrainedModel] | None = None) -> PreTrainedModel:
    """The model, cut by `first` where that is given, with int8 weights (a scale for each output, no calibration)."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = given.copied() if first is None else first(given)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
        return AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=config).eval()
