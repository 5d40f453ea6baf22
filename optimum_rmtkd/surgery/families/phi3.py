"""Phi-3: Llama with queries, keys and values in one layer, gate and up in another."""

import dataclasses

from . import Family, register_family
from .llama import LLAMA_LAYOUT


register_family(
    Family(
        name="Phi-3",
        model_types=("phi3",),
        layout=dataclasses.replace(
            LLAMA_LAYOUT,
            heads=("lm_head", "score"),
            query="",
            key="",
            value="",
            fused="self_attn.qkv_proj",
            up=(),
            fused_up="mlp.gate_up_proj",
            counts=("num_key_value_heads",),
            heads_in_config=True,
            inner_field="intermediate_size",
        ),
    )
)
