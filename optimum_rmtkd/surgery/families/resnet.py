"""ResNet: the inner channels of basic and bottleneck blocks, with their batch norms."""

from ..layouts import ResidualConvLayout
from . import Family, register_family


register_family(
    Family(
        name="ResNet",
        model_types=("resnet",),
        layout=ResidualConvLayout(stages="@.encoder.stages", blocks="layers", inner="layer"),
    )
)
