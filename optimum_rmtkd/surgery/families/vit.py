"""ViT: pre-norm encoder over image patches."""

from ..layouts import EncoderLayout
from . import Family, register_family


VIT_LAYOUT = EncoderLayout(
    stream=(
        "@.embeddings.patch_embeddings.projection",
        "@.embeddings.cls_token",
        "@.embeddings.mask_token",
        "@.embeddings.position_embeddings",
    ),
    blocks="@.layers",
    attention="attention",
    head_size="head_dim",
    total_size="",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
    attention_norm="layernorm_before",
    up="mlp.fc1",
    down="mlp.fc2",
    ffn_norm="layernorm_after",
    pre_norm=True,
    final_norm="@.layernorm",
    head_reads=("@.pooler.dense", "classifier", "decoder.0"),
)

register_family(Family(name="ViT", model_types=("vit",), layout=VIT_LAYOUT))
