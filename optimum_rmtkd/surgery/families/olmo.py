"""OLMo 2 and 3, EXAONE 4: Llama's paths; attention and feed-forward read the stream as it is, and norms stand behind
them. In OLMo others stand over all heads of queries and of keys."""

import dataclasses

from . import Family, register_family
from .llama import NATIVE_LAYOUT


BEHIND_LAYOUT = dataclasses.replace(
    NATIVE_LAYOUT,
    attention_norm=None,
    ffn_norm=None,
    after_attention="post_attention_layernorm",
    after_ffn="post_feedforward_layernorm",
)

register_family(
    Family(
        name="OLMo 2 and 3",
        model_types=("olmo2", "olmo3"),
        layout=dataclasses.replace(
            BEHIND_LAYOUT, heads=("lm_head", "score"), query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"
        ),
    )
)
register_family(
    Family(name="EXAONE 4", model_types=("exaone4",), layout=dataclasses.replace(BEHIND_LAYOUT, inner_field=None))
)
