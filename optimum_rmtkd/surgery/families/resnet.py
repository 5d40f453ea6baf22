"""ResNet: the channels inside basic and bottleneck blocks and those of their sums, with their batch norms."""

from ..convolutions import ResidualConvLayout, Step
from . import Family, register_family


register_family(
    Family(
        name="ResNet",
        model_types=("resnet",),
        layout=ResidualConvLayout(
            stem=(Step("@.embedder.embedder.convolution", ("@.embedder.embedder.normalization",)),),
            stages="@.encoder.stages",
            blocks="layers",
            inner="layer",
            shortcut=Step("shortcut.convolution", ("shortcut.normalization",)),
            heads=("classifier.1",),
            output="@.pooler",
            stem_field="embedding_size",
            sizes_field="hidden_sizes",
            inner_share={"basic": 1.0, "bottleneck": 0.25},
        ),
    )
)
