"""A reduced model as a plain checkpoint of its base architecture, for somebody who has only the model."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..surgery.native import NativeExport

__all__ = ["to_native"]


def to_native(model: PreTrainedModel, pad: bool = False) -> NativeExport:
    """`surgery.native.plain_form`, judged on random inputs."""
    from ..surgery.native import plain_form
    from .loading import example_inputs

    return plain_form(model, example_inputs(model, batch=3), pad)
