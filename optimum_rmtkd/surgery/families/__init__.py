"""Families of models: one declaration a file, one registry."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedArchitectureError
from ...modeling_rmtkd import TYPE_PREFIX
from ..convolutions import ResidualConvLayout
from ..layouts import EncoderLayout
from ..seq2seq import Seq2SeqLayout


if TYPE_CHECKING:
    from torch import nn

__all__ = ["FAMILIES", "Family", "family_of", "register_family"]

ENCODERS = ("bert", "roberta", "distilbert", "electra", "mpnet", "deberta", "albert", "modernbert")
VISION = ("vit", "deit", "dinov2", "beit", "clip", "swin")
CONVOLUTIONS = ("resnet", "regnet", "mobilenet", "convnext")
DECODERS = ("llama", "gpt2", "opt", "neox", "phi3", "stablelm", "gemma", "olmo", "cohere", "experts", "glm", "single")
SEQ2SEQ = ("t5", "bart", "whisper")
FAMILIES: dict[str, Family] = {}


@dataclass(frozen=True)
class Family:
    """Models that are laid out alike.

    Attributes:
        name: for messages.
        model_types: the `config.model_type` values it serves.
        layout: anything with `anatomy(model) -> Anatomy`.
        inert_padding: padding on the right, behind an attention mask of zeros and ones, changes no activation at real
            tokens, however much of it there is; calibration may then regroup texts by length, which is quicker.
    """

    name: str
    model_types: tuple[str, ...]
    layout: EncoderLayout | ResidualConvLayout | Seq2SeqLayout | Any
    inert_padding: bool = False


def register_family(family: Family) -> Family:
    """Teach the library a family of models; returns it.

    A family is a declaration. For an encoder with attention and feed-forward blocks, name the paths of its layers:

    ```python
    register_family(Family(
        name="my_bert",
        model_types=("my_bert",),                      # config.model_type
        layout=EncoderLayout(
            stream=("@.embeddings.word_embeddings", "@.embeddings.position_embeddings"),   # their sum is the stream
            stream_norm="@.embeddings.LayerNorm",      # None for pre-norm models
            table="@.embeddings.word_embeddings",
            blocks="@.encoder.layer",                  # the ModuleList; the next paths are relative to a block
            attention="attention.self", query="attention.self.query", key="attention.self.key",
            value="attention.self.value", output="attention.output.dense",
            attention_norm="attention.output.LayerNorm",
            up="intermediate.dense", down="output.dense", ffn_norm="output.LayerNorm",
            head_reads=("classifier",),                # layers of task heads that read the stream
        ),
    ))
    ```

    "@." stands for the backbone (`model.base_model`), so that one declaration serves the bare model and all task
    heads. The attention module must take its head size from a plain attribute (`head_size`) at each forward, as
    transformers' do. `inert_padding=True` lets calibration regroup texts by length. A causal language model with norms
    in front of its layers declares a `DecoderLayout` (`families/llama.py` shows one), an encoder-decoder a
    `Seq2SeqLayout` (`families/t5.py`), a convolutional network a `ResidualConvLayout` (`families/resnet.py`); anything
    else may bring a layout of its own with a method `anatomy(model) -> Anatomy`. Check it with `optimum_rmtkd.narrow`
    at every width left full: the logits must not move by more than 1e-5. A model type registered again replaces the
    former declaration.
    """
    for model_type in family.model_types:
        FAMILIES[model_type] = family
    return family


def base_model_type(model: nn.Module) -> str:
    """`config.model_type` without the prefix that a narrowed model carries."""
    return model.config.model_type.removeprefix(TYPE_PREFIX)


def family_of(model: nn.Module) -> Family:
    """The family of a model, narrowed or not.

    Raises:
        UnsupportedArchitectureError: none is registered for its `config.model_type`; names the linear layers that were
            found and both ways out.
    """
    for name in (*ENCODERS, *VISION, *CONVOLUTIONS, *DECODERS, *SEQ2SEQ):
        import_module(f"{__name__}.{name}")
    model_type = base_model_type(model)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    from ..layouts import factored_anatomy

    linear = list(factored_anatomy(model).sites)
    raise UnsupportedArchitectureError(
        f"No family is registered for model_type {model_type!r} ({type(model).__name__}). Use "
        "RMTKDConfig(form='factored') (--form factored), which replaces every linear layer by two thin ones and works "
        f"for every architecture: {len(linear)} of them were found, for example {', '.join(linear[:3])}. Or declare "
        f"its sites (optimum_rmtkd.register_family). Registered are {', '.join(sorted(FAMILIES))}."
    )
