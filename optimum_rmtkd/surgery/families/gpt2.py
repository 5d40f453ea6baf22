"""GPT-2: layer norms, learnt positions, queries, keys and values in one transposed layer, a tied head. GPT-Neo: the
same with plain layers."""

import dataclasses

from ..decoders import DecoderLayout
from . import Family, register_family


FUSED = DecoderLayout(
    stream=("@.wte", "@.wpe"),
    blocks="@.h",
    attention="attn",
    fused="attn.c_attn",
    output="attn.c_proj",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    attention_norm="ln_1",
    ffn_norm="ln_2",
    final_norm="@.ln_f",
    heads=("lm_head", "score", "classifier", "qa_outputs"),
    counts=("num_heads",),
    widths=("split_size",),
)
PLAIN = dataclasses.replace(
    FUSED,
    attention="attn.attention",
    fused=None,
    query="attn.attention.q_proj",
    key="attn.attention.k_proj",
    value="attn.attention.v_proj",
    output="attn.attention.out_proj",
    widths=(),
)
register_family(Family(name="GPT-2", model_types=("gpt2",), layout=FUSED))
register_family(Family(name="GPT-Neo", model_types=("gpt_neo",), layout=PLAIN))
