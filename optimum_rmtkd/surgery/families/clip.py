"""CLIP's two towers, each a pre-norm encoder with a stream of its own: images behind a norm of their patches, texts
that look back alone; projections read what the last norm gives at one position."""

import dataclasses

from ..layouts import EncoderLayout
from ..towers import TowersLayout
from . import Family, register_family


TEXT_LAYOUT = EncoderLayout(
    stream=("@.embeddings.token_embedding", "@.embeddings.position_embedding"),
    blocks="@.encoder.layers",
    attention="self_attn",
    head_size="head_dim",
    total_size="",
    heads="num_heads",
    scale="scale",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    attention_norm="layer_norm1",
    up="mlp.fc1",
    down="mlp.fc2",
    ffn_norm="layer_norm2",
    pre_norm=True,
    final_norm="@.final_layer_norm",
    head_reads=("text_projection",),
)
VISION_LAYOUT = dataclasses.replace(
    TEXT_LAYOUT,
    stream=("@.embeddings.patch_embedding", "@.embeddings.class_embedding", "@.embeddings.position_embedding"),
    stream_norm="@.pre_layrnorm",
    final_norm="@.post_layernorm",
    pooled_norm=True,
    head_reads=("visual_projection",),
)


def _inside(layout: EncoderLayout, prefix: str) -> EncoderLayout:
    """The same tower in a class that holds it, whose config holds that of the tower."""
    at = {name: getattr(layout, name) for name in ("stream", "blocks", "stream_norm", "final_norm")}
    moved = {
        name: tuple(path.replace("@.", prefix) for path in value)
        if isinstance(value, tuple)
        else value and value.replace("@.", prefix)
        for name, value in at.items()
    }
    return dataclasses.replace(layout, **moved, width_field="")


register_family(Family(name="CLIP, texts", model_types=("clip_text_model",), layout=TEXT_LAYOUT))
register_family(Family(name="CLIP, images", model_types=("clip_vision_model",), layout=VISION_LAYOUT))
register_family(
    Family(
        name="CLIP",
        model_types=("clip",),
        layout=TowersLayout(
            {
                "texts": _inside(TEXT_LAYOUT, "text_model."),
                "images": dataclasses.replace(
                    _inside(VISION_LAYOUT, "vision_model."),
                    final_norm=None,  # the classifier reads the mean of what stands in front of it
                    beside=("vision_model.post_layernorm",),
                    head_reads=("classifier", "visual_projection"),  # the latter in the class of both towers
                ),
            }
        ),
    )
)
