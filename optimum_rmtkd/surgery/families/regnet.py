"""RegNet X and Y: bottlenecks whose middle convolution has groups, which are cut whole."""

from ..convolutions import Gate, ResidualConvLayout, Step
from . import Family, register_family


register_family(
    Family(
        name="RegNet",
        model_types=("regnet",),
        layout=ResidualConvLayout(
            stem=(Step("@.embedder.embedder.convolution", ("@.embedder.embedder.normalization",)),),
            stages="@.encoder.stages",
            blocks="layers",
            steps=(
                Step("layer.0.convolution", ("layer.0.normalization",)),
                Step("layer.1.convolution", ("layer.1.normalization",)),
                Gate("layer.2.attention.0", "layer.2.attention.2"),
                Step("layer.2.convolution", ("layer.2.normalization",)),
                Step("layer.3.convolution", ("layer.3.normalization",)),
            ),
            shortcut=Step("shortcut.convolution", ("shortcut.normalization",)),
            heads=("classifier.1",),
            output="@.pooler",
        ),
    )
)
