"""BART and its kin: layer norms behind the sums or in front of the layers, learnt or sinusoidal positions, a norm
behind the tables of some, one word table for both stacks and the head, logits with a bias that is no parameter."""

import dataclasses

from ..seq2seq import Seq2SeqLayout, Stack
from . import Family, register_family


def _stack(name: str) -> Stack:
    decoder = name == "decoder"
    return Stack(
        stream=("@.shared", f"@.{name}.embed_tokens", f"@.{name}.embed_positions"),
        blocks=f"@.{name}.layers",
        attention="self_attn",
        attention_norm="self_attn_layer_norm",
        up=("fc1",),
        down="fc2",
        ffn_norm="final_layer_norm",
        cross="encoder_attn" if decoder else None,
        cross_norm="encoder_attn_layer_norm" if decoder else None,
    )


MARIAN = Seq2SeqLayout(encoder=_stack("encoder"), decoder=_stack("decoder"))


def _with(layout: Seq2SeqLayout, **paths: str) -> Seq2SeqLayout:
    """The layout with norms at these places of both stacks."""
    stacks = {
        name: dataclasses.replace(
            getattr(layout, name), **{where: f"@.{name}.{path}" for where, path in paths.items()}
        )
        for name in ("encoder", "decoder")
    }
    return dataclasses.replace(layout, **stacks)


BART = _with(MARIAN, stream_norm="layernorm_embedding")
PEGASUS = dataclasses.replace(_with(MARIAN, final_norm="layer_norm"), pre_norm=True)
MBART = _with(PEGASUS, stream_norm="layernorm_embedding")

CLASSIFIED = ("lm_head", "classification_head.dense")
READ = (*CLASSIFIED, "qa_outputs")

register_family(Family(name="BART", model_types=("bart",), layout=dataclasses.replace(BART, heads=READ)))
register_family(Family(name="PLBART", model_types=("plbart",), layout=dataclasses.replace(BART, heads=CLASSIFIED)))
register_family(Family(name="BlenderbotSmall", model_types=("blenderbot-small",), layout=BART))
register_family(Family(name="mBART", model_types=("mbart",), layout=dataclasses.replace(MBART, heads=READ)))
register_family(Family(name="Marian", model_types=("marian",), layout=MARIAN))
register_family(Family(name="Pegasus and Blenderbot", model_types=("pegasus", "blenderbot"), layout=PEGASUS))
