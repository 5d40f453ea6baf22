"""Mixtral, Qwen3-MoE and OLMoE: Llama's attention; a router and experts read the stream, whose own width stays."""

import dataclasses

from . import Family, register_family
from .llama import LLAMA_LAYOUT, NATIVE_LAYOUT


EXPERTS = {
    "up": (),
    "down": "",
    "reads": ("mlp.gate.weight", "mlp.experts.gate_up_proj"),
    "writes": ("mlp.experts.down_proj",),
    "stream_widths": {"mlp.gate": "hidden_dim", "mlp.experts": "hidden_dim"},
    "multiple": 8,  # products of all experts at once want rows of 16 bytes, in half precision, too
    "refused": {
        "intermediate": "the inner width of experts is one number for all of them, while each sees a part of the "
        "tokens alone; the stream ('hidden') and attention ('attention_groups') can be cut"
    },
}

register_family(Family(name="Mixtral", model_types=("mixtral",), layout=dataclasses.replace(NATIVE_LAYOUT, **EXPERTS)))
register_family(
    Family(
        name="Qwen3-MoE",
        model_types=("qwen3_moe",),
        layout=dataclasses.replace(LLAMA_LAYOUT, **EXPERTS, needs={"mlp_only_layers": [], "decoder_sparse_step": 1}),
    )
)
register_family(
    Family(
        name="OLMoE",
        model_types=("olmoe",),
        layout=dataclasses.replace(
            LLAMA_LAYOUT,
            **EXPERTS,
            heads=("lm_head",),
            query_norm="self_attn.q_norm",
            key_norm="self_attn.k_norm",
        ),
    )
)
