"""StableLM: Llama's paths, layer norms, heads counted by attributes."""

import dataclasses

from . import Family, register_family
from .llama import LLAMA_LAYOUT


register_family(
    Family(
        name="StableLM",
        model_types=("stablelm",),
        layout=dataclasses.replace(
            LLAMA_LAYOUT,
            heads=("lm_head", "score"),
            counts=("num_key_value_heads",),
            query_counts=("num_heads",),
            widths=("hidden_size",),
            needs={"use_parallel_residual": False, "qk_layernorm": False},
        ),
    )
)
