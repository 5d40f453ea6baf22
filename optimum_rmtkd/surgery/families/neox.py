"""Blocks whose attention and feed-forward read the same stream: GPT-NeoX, GPT-J and Phi."""

from ..decoders import DecoderLayout
from . import Family, register_family


register_family(
    Family(
        name="GPT-NeoX",
        model_types=("gpt_neox",),
        layout=DecoderLayout(
            stream=("@.embed_in",),
            blocks="@.layers",
            attention="attention",
            head_size="head_size",
            fused="attention.query_key_value",
            fused_by="by_head",
            output="attention.dense",
            up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
            attention_norm="input_layernorm",
            ffn_norm="post_attention_layernorm",
            parallel=True,
            final_norm="@.final_layer_norm",
            heads=("lm_head", "score", "classifier", "qa_outputs"),
            needs={"use_parallel_residual": True},
        ),
    )
)
register_family(
    Family(
        name="GPT-J",
        model_types=("gptj",),
        layout=DecoderLayout(
            stream=("@.wte",),
            blocks="@.h",
            attention="attn",
            query="attn.q_proj",
            key="attn.k_proj",
            value="attn.v_proj",
            output="attn.out_proj",
            up=("mlp.fc_in",),
            down="mlp.fc_out",
            attention_norm="ln_1",
            parallel=True,
            final_norm="@.ln_f",
            counts=("num_attention_heads",),
        ),
    )
)
register_family(
    Family(
        name="Phi",
        model_types=("phi",),
        layout=DecoderLayout(
            stream=("@.embed_tokens",),
            blocks="@.layers",
            query="self_attn.q_proj",
            key="self_attn.k_proj",
            value="self_attn.v_proj",
            output="self_attn.dense",
            up=("mlp.fc1",),
            down="mlp.fc2",
            attention_norm="input_layernorm",
            parallel=True,
            final_norm="@.final_layernorm",
            heads=("lm_head", "score"),
            needs={"qk_layernorm": False},
        ),
    )
)
