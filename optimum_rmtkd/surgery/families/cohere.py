"""Cohere (Command R): Llama's paths, layer norms without a shift, attention and feed-forward beside each other, a tied
head whose logits are scaled."""

import dataclasses

from . import Family, register_family
from .llama import NATIVE_LAYOUT


COHERE_LAYOUT = dataclasses.replace(NATIVE_LAYOUT, heads=("lm_head",), ffn_norm=None, parallel=True)

register_family(
    Family(
        name="Cohere",
        model_types=("cohere",),
        layout=dataclasses.replace(COHERE_LAYOUT, needs={"use_qk_norm": False}),
    )
)
register_family(Family(name="Cohere 2", model_types=("cohere2",), layout=COHERE_LAYOUT))
