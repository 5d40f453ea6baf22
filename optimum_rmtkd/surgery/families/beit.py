"""BEiT: ViT with keys without bias, biases by distance (of heads, which all stay), and a scale a feature of what a
layer adds to the stream; the last norm may stand behind the mean over patches."""

import dataclasses

from . import Family, register_family
from .vit import VIT_LAYOUT


register_family(
    Family(
        name="BEiT",
        model_types=("beit",),
        layout=dataclasses.replace(
            VIT_LAYOUT,
            attention_scale="lambda_1",
            ffn_scale="lambda_2",
            final_norm=("@.pooler.layernorm", "@.layernorm"),
            pooled_norm=True,
            head_reads=("classifier",),
        ),
    )
)
