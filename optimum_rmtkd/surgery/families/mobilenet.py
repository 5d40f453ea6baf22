"""MobileNet V1 (depthwise convolutions in a row) and V2 (inverted residuals), EfficientNet (the same with gates)."""

from ..convolutions import Gate, ResidualConvLayout, Step
from . import Family, register_family


def _layer(path: str) -> Step:
    return Step(f"{path}.convolution", (f"{path}.normalization",))


register_family(
    Family(
        name="MobileNetV1",
        model_types=("mobilenet_v1",),
        layout=ResidualConvLayout(
            stem=(_layer("@.conv_stem"),),
            stages="@.layer",
            steps=(Step("convolution", ("normalization",)),),
            adds=False,
            heads=("classifier",),
            output="@.pooler",
        ),
    )
)
register_family(
    Family(
        name="MobileNetV2",
        model_types=("mobilenet_v2",),
        layout=ResidualConvLayout(
            stem=tuple(
                _layer(f"@.conv_stem.{name}") for name in ("first_conv", "expand_1x1", "conv_3x3", "reduce_1x1")
            ),
            stages="@.layer",
            steps=tuple(_layer(name) for name in ("expand_1x1", "conv_3x3", "reduce_1x1")),
            adds="use_residual",
            tail=(_layer("@.conv_1x1"),),
            heads=("classifier",),
            output="@.pooler",
        ),
    )
)
register_family(
    Family(
        name="EfficientNet",
        model_types=("efficientnet",),
        layout=ResidualConvLayout(
            stem=(Step("@.embeddings.convolution", ("@.embeddings.batchnorm",)),),
            stages="@.encoder.blocks",
            steps=(
                Step("expansion.expand_conv", ("expansion.expand_bn",)),
                Step("depthwise_conv.depthwise_conv", ("depthwise_conv.depthwise_norm",)),
                Gate("squeeze_excite.reduce", "squeeze_excite.expand"),
                Step("projection.project_conv", ("projection.project_bn",)),
            ),
            adds="projection.apply_dropout",
            tail=(Step("@.encoder.top_conv", ("@.encoder.top_bn",)),),
            heads=("classifier",),
            output="@.pooler",
        ),
    )
)
