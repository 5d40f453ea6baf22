"""DINOv2, with registers or without: pre-norm encoder over image patches; what a layer adds to the stream has a scale
a feature, and feed-forward parts may be gated."""

import dataclasses

from . import Family, register_family
from .vit import VIT_LAYOUT


register_family(
    Family(
        name="DINOv2",
        model_types=("dinov2", "dinov2_with_registers"),
        layout=dataclasses.replace(
            VIT_LAYOUT,
            stream=(*VIT_LAYOUT.stream, "@.embeddings.register_tokens"),
            blocks="@.encoder.layer",
            attention_norm="norm1",
            ffn_norm="norm2",
            attention_scale="layer_scale1.lambda1",
            ffn_scale="layer_scale2.lambda1",
            up=("mlp.fc1", "mlp.gate_proj", "mlp.up_proj"),
            down=("mlp.fc2", "mlp.down_proj"),
            head_reads=("classifier",),
            copies={"classifier": 2},  # the class token, and the mean of the patches
            ratio_field="mlp_ratio",
        ),
    )
)
