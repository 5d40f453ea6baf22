"""Whisper: norms in front of the layers, keys without a bias, an output layer that is tied to the decoder's table.
What enters the encoder's stream is made by an activation behind convolutions, so that this stream keeps its axes."""

import dataclasses

from . import Family, register_family
from .bart import PEGASUS


register_family(
    Family(
        name="Whisper",
        model_types=("whisper",),
        layout=dataclasses.replace(
            PEGASUS,
            encoder=dataclasses.replace(PEGASUS.encoder, stream=(), turns=False),
            heads=("proj_out",),
        ),
    )
)
