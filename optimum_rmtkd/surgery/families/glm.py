"""GLM: Llama's attention, gate and up in one layer; from the fourth on norms stand between layers and the stream."""

import dataclasses

from . import Family, register_family
from .llama import LLAMA_LAYOUT


GLM_LAYOUT = dataclasses.replace(LLAMA_LAYOUT, heads=("lm_head", "score"), up=(), fused_up="mlp.gate_up_proj")

register_family(Family(name="GLM", model_types=("glm",), layout=GLM_LAYOUT))
register_family(
    Family(
        name="GLM-4",
        model_types=("glm4",),
        layout=dataclasses.replace(
            GLM_LAYOUT, after_attention="post_self_attn_layernorm", after_ffn="post_mlp_layernorm"
        ),
    )
)
