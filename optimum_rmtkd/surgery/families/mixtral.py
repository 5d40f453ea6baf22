"""Mixtral: Llama's attention; a router and experts read the stream, whose own width stays."""

import dataclasses

from . import Family, register_family
from .llama import NATIVE_LAYOUT


register_family(
    Family(
        name="Mixtral",
        model_types=("mixtral",),
        layout=dataclasses.replace(
            NATIVE_LAYOUT,
            up=(),
            down="",
            reads=("mlp.gate.weight", "mlp.experts.gate_up_proj"),
            writes=("mlp.experts.down_proj",),
            multiple=8,  # products of all experts at once want rows of 16 bytes, in half precision, too
            stream_widths={"mlp.gate": "hidden_dim", "mlp.experts": "hidden_dim"},
            refused={
                "intermediate": "the inner width of experts is one number for all of them, while each sees a part of "
                "the tokens alone; the stream ('hidden') and attention ('attention_groups') can be cut"
            },
        ),
    )
)
