"""ConvNeXt V1 and V2: depthwise convolutions in front of a layer norm, a feed-forward part, a scale a channel.

Layer norm divides by all channels of a stage: what is left of it after a cut is fitted.
"""

from ..convolutions import ResidualConvLayout, Step
from . import Family, register_family


register_family(
    Family(
        name="ConvNeXt",
        model_types=("convnext", "convnextv2"),
        layout=ResidualConvLayout(
            stem=(Step("@.embeddings.patch_embeddings", ("@.embeddings.layernorm",)),),
            stages="@.encoder.stages",
            blocks="layers",
            entry=(Step("downsampling_layer.1", before=("downsampling_layer.0",)),),
            steps=(
                Step("dwconv", ("layernorm",)),
                Step("pwconv1", ("grn.weight", "grn.bias")),
                Step("pwconv2", ("layer_scale_parameter",)),
            ),
            last=("@.layernorm",),
            heads=("classifier",),
            output="@.layernorm",
            whole_stages=True,
        ),
    )
)
