"""A reduced model as a plain checkpoint of its base architecture, for somebody who has only the model."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..batches.examples import example_inputs
from ..surgery.native import NativeExport, plain_form


__all__ = ["NativeExport", "to_native"]


def to_native(model: PreTrainedModel, pad: bool = False) -> NativeExport:
    """The plain checkpoint of a reduced model.

    Args:
        pad: fill narrower layers up with zeros and multiply factored layers out where that makes the model
            expressible.

    Raises:
        RMTKDError: not a reduced model; widths that the base's config cannot express; padding needed but not asked for
            (the message states its cost); or outputs that differ on random inputs.
    """
    return plain_form(model, example_inputs(model, batch=3), pad)
