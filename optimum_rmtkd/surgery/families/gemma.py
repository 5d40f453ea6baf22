"""Gemma 1 to 3: Llama's paths; the table is scaled by the root of its width, norms multiply by 1 + w, and from the
second on what attention and feed-forward give goes through a norm before it is added."""

import dataclasses

from . import Family, register_family
from .llama import LLAMA_LAYOUT, NATIVE_LAYOUT


GEMMA_LAYOUT = dataclasses.replace(NATIVE_LAYOUT, heads=("lm_head", "score"))

register_family(Family(name="Gemma", model_types=("gemma",), layout=GEMMA_LAYOUT))
register_family(
    Family(
        name="Gemma 2 and 3",
        model_types=("gemma2", "gemma3_text"),
        layout=dataclasses.replace(
            GEMMA_LAYOUT,
            after_attention="post_attention_layernorm",
            ffn_norm="pre_feedforward_layernorm",
            after_ffn="post_feedforward_layernorm",
        ),
    )
)
register_family(
    Family(
        name="VaultGemma",
        model_types=("vaultgemma",),
        layout=dataclasses.replace(LLAMA_LAYOUT, heads=("lm_head",), ffn_norm="pre_feedforward_layernorm"),
    )
)
