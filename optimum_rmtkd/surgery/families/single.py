"""Llama's paths with one layer in front of the activation in place of two: Arcee, Nemotron, Jais 2, Starcoder2 and
Apertus."""

import dataclasses

from . import Family, register_family
from .llama import LLAMA_LAYOUT


SINGLE_LAYOUT = dataclasses.replace(LLAMA_LAYOUT, up=("mlp.up_proj",))

register_family(Family(name="Arcee and Nemotron", model_types=("arcee", "nemotron"), layout=SINGLE_LAYOUT))
register_family(
    Family(name="Jais 2", model_types=("jais2",), layout=dataclasses.replace(SINGLE_LAYOUT, heads=("lm_head",)))
)
register_family(
    Family(
        name="Starcoder2",
        model_types=("starcoder2",),
        layout=dataclasses.replace(SINGLE_LAYOUT, heads=("lm_head", "score"), up=("mlp.c_fc",), down="mlp.c_proj"),
    )
)
register_family(
    Family(
        name="Apertus",
        model_types=("apertus",),
        layout=dataclasses.replace(
            SINGLE_LAYOUT,
            heads=("lm_head", "score"),
            attention_norm="attention_layernorm",
            ffn_norm="feedforward_layernorm",
        ),
    )
)
