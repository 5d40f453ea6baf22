"""What the methods share: what each of them is given, how a size is met, a BERT's parts, moments, factors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_rmtkd import count_parameters
from optimum_rmtkd.layers_rmtkd import LowRankEmbedding, LowRankLinear


class OutOfReachError(Exception):
    """A method cannot make a model of the size that was asked for; the message says what it can."""


@dataclass(frozen=True)
class Given:
    """What every method starts from.

    Attributes:
        model: a fine-tuned BERT classifier, float32, in eval mode; methods copy it.
        tokenizer: its tokenizer.
        batches: rows of calibration, as the collator made them, with `labels`.
        counts: (vocabulary,) how often each token occurs in the training rows, float64.
        target: share of the parameters to remove.
        before: parameters that it counts from (those before a trimming of the vocabulary).
        seed: of whatever is drawn.
    """

    model: PreTrainedModel
    tokenizer: Any
    batches: list[dict[str, torch.Tensor]]
    counts: torch.Tensor
    target: float
    before: int
    seed: int = 0

    @property
    def limit(self) -> int:
        """Parameters that the result may have."""
        return round((1 - self.target) * self.before)

    def copied(self) -> PreTrainedModel:
        """A model that may be changed."""
        return copy.deepcopy(self.model).eval()

    @property
    def is_small(self) -> bool:
        """Whether the model has the size already (after a trimming)."""
        return count_parameters(self.model) <= self.limit


def largest(size: Callable[[int], float], limit: float, low: int, high: int, what: str) -> int:
    """The largest integer in [low, high] whose `size`, which grows, is within the limit.

    Raises:
        OutOfReachError: even that of `low` is not.
    """
    if size(low) > limit:
        raise OutOfReachError(f"{what} {low} leaves {int(size(low)):,} parameters, {int(limit):,} were asked for")
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= limit else (low, middle - 1)
    return low


# -- a BERT's parts ---------------------------------------------------------------------------------------------------


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of the encoder."""
    return model.base_model.encoder.layer


def encoder_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """{path: linear layer} of the encoder and the pooler."""
    found = {f"encoder.{name}": module for name, module in model.base_model.encoder.named_modules()}
    found["pooler.dense"] = model.base_model.pooler.dense
    return {name: module for name, module in found.items() if isinstance(module, nn.Linear)}


def word_table(model: PreTrainedModel) -> nn.Embedding:
    """(vocabulary, width)"""
    return model.base_model.embeddings.word_embeddings


def rest_of(model: PreTrainedModel, parts: Iterable[nn.Module]) -> int:
    """Parameters outside the parts."""
    return count_parameters(model) - sum(count_parameters(part) for part in parts)


# -- what runs through it ---------------------------------------------------------------------------------------------


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Hooks that are there for a while."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch without its labels."""
    return {name: value for name, value in batch.items() if name != "labels"}


def real(x: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(real tokens, features) of (batch, tokens, features); (batch, features) as it is."""
    return x if x.dim() == 2 else x[batch["attention_mask"].bool()]


Observed = Callable[[nn.Module, torch.Tensor], torch.Tensor]


@torch.no_grad()
def moments_of(
    model: PreTrainedModel,
    layers: dict[str, nn.Module],
    batches: list[dict[str, torch.Tensor]],
    observed: Observed = lambda layer, x: x,
) -> dict[str, torch.Tensor]:
    """{name: X^T X} of what each layer reads over all real tokens, float64.

    Args:
        observed: what is made of it first, from the layer and its input.
    """
    found: dict[str, torch.Tensor] = {}
    now: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable:
        def add(layer: nn.Module, arguments: tuple) -> None:
            x = real(observed(layer, arguments[0]), now).double()
            found[name] = found.get(name, 0) + x.T @ x

        return add

    with hooked([layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]):
        for batch in batches:
            now = batch
            model(**inputs_of(batch))
    return found


# -- factors ----------------------------------------------------------------------------------------------------------


def balanced(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with factors of equal norm, component by component: Adam moves all weights alike, and ruins
    factors of which one is large.

    Shapes: (out, rank), (rank, in).
    """
    scale = (down.norm(dim=1) / up.norm(dim=0)).clamp_min(1e-12).sqrt()
    return up * scale, down / scale[:, None]


def linear_of(up: torch.Tensor, down: torch.Tensor, bias: torch.Tensor | None) -> LowRankLinear:
    """x -> up (down x) + bias."""
    up, down = balanced(up, down)
    layer = LowRankLinear(down.shape[1], up.shape[0], down.shape[0], bias is not None)
    with torch.no_grad():
        layer.up.weight.copy_(up)
        layer.down.weight.copy_(down)
        if bias is not None:
            layer.up.bias.copy_(bias)
    return layer


def table_size(table: nn.Embedding, rank: int) -> int:
    """Parameters of a table in two factors."""
    return rank * sum(table.weight.shape)


@torch.no_grad()
def factorise_table(model: PreTrainedModel, rank: int, counts: torch.Tensor) -> None:
    """Replace the word table by two factors, the best of this rank for tokens as frequent as they are in `counts`.

    With D the counts plus one, the best T' of rank r in tr (T - T')^T D (T - T') is T V V^T, where V are the r first
    eigenvectors of T^T D T.
    """
    table = word_table(model)
    weight = table.weight.double()
    gram = weight.T @ ((counts.double() + 1)[:, None] * weight)
    directions = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]
    short, up = balanced(weight @ directions, directions.T)
    layer = LowRankEmbedding(*weight.shape[:1], rank, weight.shape[1], table.padding_idx)
    layer.weight.copy_(short)
    layer.up.weight.copy_(up.T)
    model.base_model.embeddings.word_embeddings = layer
