"""DeiT: ViT with a distillation token and, in one class, two classifiers."""

import dataclasses

from . import Family, register_family
from .vit import VIT_LAYOUT


register_family(
    Family(
        name="DeiT",
        model_types=("deit",),
        layout=dataclasses.replace(
            VIT_LAYOUT,
            stream=(*VIT_LAYOUT.stream, "@.embeddings.distillation_token"),
            head_reads=(*VIT_LAYOUT.head_reads, "cls_classifier", "distillation_classifier"),
        ),
    )
)
