"""OLMo 2 and 3: Llama's paths; attention and feed-forward read the stream as it is, norms stand behind them, and
others over all heads of queries and of keys."""

import dataclasses

from . import Family, register_family
from .llama import NATIVE_LAYOUT


register_family(
    Family(
        name="OLMo 2 and 3",
        model_types=("olmo2", "olmo3"),
        layout=dataclasses.replace(
            NATIVE_LAYOUT,
            heads=("lm_head", "score"),
            attention_norm=None,
            ffn_norm=None,
            after_attention="post_attention_layernorm",
            after_ffn="post_feedforward_layernorm",
            query_norm="self_attn.q_norm",
            key_norm="self_attn.k_norm",
        ),
    )
)
