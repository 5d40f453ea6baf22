"""What the layouts of all kinds of families ask of a model: the fields of its config, its output layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..errors import UnsupportedArchitectureError
from .sites import Unit, get_module, has_module


__all__ = ["check_needs", "decoder_units"]


def check_needs(model: nn.Module, needs: Mapping[str, object]) -> None:
    """Whether the config has the values {field: value} without which the classes run other code than what a family
    declares.

    Raises:
        UnsupportedArchitectureError: names the field.
    """
    for name, value in needs.items():
        found = getattr(model.config, name, value)
        if found != value:
            raise UnsupportedArchitectureError(
                f"{type(model).__name__} with config.{name}={found!r} runs other code than what its family "
                f"declares, which needs {value!r}. Use form='factored', which works for every architecture."
            )


def decoder_units(model: nn.Module, decoder: str | None, table: str | None) -> list[Unit]:
    """The unit of an output layer behind a norm of its own that shares the word table, here or in the masked-LM model
    of the same checkpoint; none where there is no such layer."""
    if not decoder:
        return []
    words = get_module(model, table)
    if has_module(model, decoder):
        tied = get_module(model, decoder).weight is words.weight
    else:
        tied = bool(getattr(model.config, "tie_word_embeddings", True))
    width = getattr(words, "output_dim", words.embedding_dim)
    return [Unit(decoder, factor="hidden", full=width)] if tied else []
