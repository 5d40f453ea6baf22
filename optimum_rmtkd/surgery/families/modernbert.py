"""ModernBERT: pre-norm encoder with rotary positions, fused layers, and a norm between the word table and the first
block, which has none of its own. Whole heads go, as in decoders with rotary positions."""

from ..decoders import DecoderLayout
from . import Family, register_family


register_family(
    Family(
        name="ModernBERT",
        model_types=("modernbert",),
        layout=DecoderLayout(
            stream=("@.embeddings.tok_embeddings",),
            stream_norm="@.embeddings.norm",
            blocks="@.layers",
            attention="attn",
            fused="attn.Wqkv",
            output="attn.Wo",
            fused_up="mlp.Wi",
            down="mlp.Wo",
            attention_norm="attn_norm",
            ffn_norm="mlp_norm",
            final_norm="@.final_norm",
            heads=("head.dense",),
            decoder="decoder",
            causal=False,
        ),
    )
)
