"""Swin: stages of pre-norm blocks, each stage twice as wide as the one before; attention inside windows."""

import dataclasses

from ..towers import StagesLayout
from . import Family, register_family
from .vit import VIT_LAYOUT


register_family(
    Family(
        name="Swin",
        model_types=("swin",),
        layout=StagesLayout(
            stages="@.encoder.layers",
            stage=dataclasses.replace(
                VIT_LAYOUT, stream=(), blocks="blocks", final_norm=None, head_reads=(), windowed=True
            ),
        ),
    )
)
