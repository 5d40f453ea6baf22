"""Llama and what shares its code: RMS norms, rotary positions, grouped queries, gated feed-forward."""

import dataclasses

from ..decoders import DecoderLayout
from . import Family, register_family


LLAMA_LAYOUT = DecoderLayout(
    stream=("@.embed_tokens",),
    blocks="@.layers",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    attention_norm="input_layernorm",
    ffn_norm="post_attention_layernorm",
    final_norm="@.norm",
)

NATIVE_LAYOUT = dataclasses.replace(LLAMA_LAYOUT, inner_field="intermediate_size")

register_family(
    Family(name="Llama", model_types=("llama", "mistral", "qwen2", "qwen3", "smollm3"), layout=NATIVE_LAYOUT)
)
register_family(
    Family(name="Llama's kin", model_types=("ministral", "seed_oss"), layout=LLAMA_LAYOUT),
)
register_family(
    Family(
        name="Llama's kin without question answering",
        model_types=("helium", "hunyuan_v1_dense"),
        layout=dataclasses.replace(LLAMA_LAYOUT, heads=("lm_head", "score")),
    )
)
register_family(
    Family(
        name="Llama's kin that generate alone",
        model_types=("ernie4_5", "cwm"),
        layout=dataclasses.replace(LLAMA_LAYOUT, heads=("lm_head",)),
    )
)
register_family(
    Family(
        name="Granite",
        model_types=("granite",),
        layout=dataclasses.replace(NATIVE_LAYOUT, heads=("lm_head",), multiplier="residual_multiplier"),
    )
)
