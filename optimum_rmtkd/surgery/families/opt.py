"""OPT and BioGPT: layer norms, learnt positions with an offset, heads counted by an attribute, a tied head."""

import dataclasses

from ..decoders import DecoderLayout
from . import Family, register_family


OPT = DecoderLayout(
    stream=("@.decoder.embed_tokens", "@.decoder.embed_positions"),
    blocks="@.decoder.layers",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    up=("fc1",),
    down="fc2",
    attention_norm="self_attn_layer_norm",
    ffn_norm="final_layer_norm",
    final_norm="@.decoder.final_layer_norm",
    counts=("num_heads",),
    needs={
        "do_layer_norm_before": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
    },
)
BIOGPT = dataclasses.replace(
    OPT,
    stream=("@.embed_tokens", "@.embed_positions"),
    blocks="@.layers",
    final_norm="@.layer_norm",
    heads=("output_projection", "score", "classifier"),
    needs={},
)
register_family(Family(name="OPT", model_types=("opt",), layout=OPT))
register_family(Family(name="BioGPT", model_types=("biogpt",), layout=BIOGPT))
