"""The output layer of a language model by itself: hidden states out of a forward pass, logits when wanted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..batches import evaluating, first_samples, main_input, run
from .signatures import unwrapped


__all__ = ["Finish", "Head", "Heads", "Postponed", "output_layer"]

SMALL, LARGE = 1e-3, 1e6  # of what is put in place of logits: where a cap is not felt, and where nothing else is
SPREAD = 60.0  # the others lie between minus and plus this
TOLERANCE = 1e-5  # relative


@dataclass(frozen=True)
class Finish:
    """What a model does with the output of its last layer: logits = cap tanh(scale x / cap), or scale x without a
    cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        logits = raw if self.scale == 1.0 else raw * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    @classmethod
    def of(cls, raw: torch.Tensor, logits: torch.Tensor) -> Finish | None:
        """The one that explains what became of known numbers; None: another function.

        Args:
            raw: (n,) as `known_numbers` makes them.
            logits: (n,) what the model made of them.
        """
        if not bool(torch.isfinite(logits).all()):
            return None
        raw, logits = raw.double(), logits.double()
        scale, end = (logits[0] / raw[0]).item(), logits[1].item()
        scale = 1.0 if abs(scale - 1) < TOLERANCE else scale
        found = cls(scale) if abs(end) > abs(scale) * LARGE / 2 else cls(scale, abs(end))
        if scale == 0 or found.cap == 0:
            return None
        return found if torch.allclose(found(raw), logits, rtol=TOLERANCE, atol=TOLERANCE * SMALL) else None


def known_numbers(count: int, like: torch.Tensor) -> torch.Tensor:
    """(count,) at least four: a small one, a large one, and an even spread."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    numbers = torch.linspace(-SPREAD, SPREAD, count, dtype=dtype, device=like.device)
    numbers[0], numbers[1] = SMALL, LARGE
    return numbers


@dataclass(frozen=True)
class Head:
    """Logits from what a model's output layer reads: `finish(layer(hidden))`, position by position."""

    layer: nn.Module
    finish: Finish = Finish()
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # autocast

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., vocabulary)."""
        with self.around():
            return self.finish(self.layer(hidden))


@dataclass
class Postponed:
    """What a forward pass kept in place of its logits.

    Attributes:
        hidden: (batch, tokens, d), as the output layer would have read it; None: it was not called, or no hook saw it.
    """

    hidden: torch.Tensor | None = field(default=None)

    @contextlib.contextmanager
    def around(self, layer: nn.Module) -> Iterator[Postponed]:
        """While open, the output layer gives the answer of the last position alone: logits (batch, 1, vocabulary)."""

        def cut(module: nn.Module, args: tuple) -> tuple | None:
            if not args or args[0].dim() != 3:
                return None
            self.hidden = args[0]
            return (args[0][:, -1:], *args[1:])

        handle = layer.register_forward_pre_hook(cut)
        try:
            yield self
        finally:
            handle.remove()


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits over a vocabulary, of models that are no encoder-decoders; None without one."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    get = getattr(unwrapped(model), "get_output_embeddings", None)
    layer = None if get is None else get()
    return layer if isinstance(layer, nn.Module) else None


class Heads:
    """Finds the heads of models, each once. Nothing is known of any architecture: one row goes through the model, with
    known numbers in place of the output layer's, and what comes out says what is done with them."""

    def __init__(self, around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext):
        self.around = around
        self._found: WeakKeyDictionary[nn.Module, Finish | str] = WeakKeyDictionary()

    def of(self, model: nn.Module, inputs: Mapping[str, Any]) -> Head | str:
        """The head of a model, or why its logits cannot be made apart from it.

        Args:
            inputs: that it can run on, without labels.
        """
        layer = output_layer(model)
        if layer is None:
            return f"{type(unwrapped(model)).__name__} has no output layer of its own"
        if any(_sharded(parameter) for parameter in layer.parameters()):
            return "the output layer is sharded over processes"
        if layer not in self._found:
            self._found[layer] = self._look(model, layer, inputs)
        found = self._found[layer]
        return found if isinstance(found, str) else Head(layer, found, self.around)

    @torch.no_grad()
    def _look(self, model: nn.Module, layer: nn.Module, inputs: Mapping[str, Any]) -> Finish | str:
        row, numbers = first_samples(inputs, 1), []

        def replaced(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            numbers.append(known_numbers(output.shape[-1], output))
            return numbers[-1].expand(output.shape)

        handle = layer.register_forward_hook(replaced)
        try:
            with Postponed().around(layer) as kept, evaluating(model), self.around():
                logits = run(model, row)["logits"]
        finally:
            handle.remove()
        name, tokens = type(unwrapped(model)).__name__, main_input(row).shape[1]
        if kept.hidden is None or len(numbers) != 1 or kept.hidden.shape[1] != tokens:
            return f"{name} does not call its output layer on all positions at once"
        if logits.shape[1:] != (1, *numbers[0].shape):
            return f"{name} makes something else than logits of its output layer's answers"
        found = Finish.of(numbers[0], logits[0, 0])
        return found or f"what {name} does with the output of its last layer is neither a scale nor a cap"


def _sharded(parameter: nn.Parameter) -> bool:
    """Held in part by this process: under FSDP2, or DeepSpeed's third stage."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "placements")
