"""Which `PreTrainedModel` is narrowed inside the model that a trainer trains, and how its batches are read.

For most trainers both are the same. Libraries that put layers around a transformer (sentence-transformers) declare it
here. Knows models and batches; no trainer beyond the function that splits its batches, and no run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..distillation.signatures import taken
from ..errors import RMTKDError, UnsupportedArchitectureError


__all__ = ["Inside", "SentenceEncoder", "inside_of"]

Split = Callable[[dict[str, Any]], tuple[list[dict[str, Any]], Any]]


class Inside:
    """A model that is itself what is narrowed; its batches hold what its forward takes.

    Attributes:
        wraps: the narrowed model lies inside another one, which has a loader and a loss of its own.
        whole: what the trainer trains.
        model: what is narrowed.
    """

    wraps = False

    def __init__(self, whole: nn.Module):
        self.whole = self.model = whole

    def read(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """A batch of the trainer as one of the narrowed model."""
        return batch

    def run(self, prepared: nn.Module, batch: Mapping[str, Any]) -> Any:
        """Outputs of the narrowed model on a batch that was `read`.

        Args:
            prepared: `whole` as accelerate has wrapped it (DDP, autocast).
        """
        return prepared(**batch)

    def check_width(self, compute_loss: Callable[[], Any]) -> None:
        """Refuse what would not fit a narrower stream.

        Args:
            compute_loss: the task's loss on a batch.
        """

    def follow(self) -> None:
        """The narrowed model may have another width: make what lies around it fit."""


class SentenceEncoder(Inside):
    """A model of sentence-transformers: a transformer, a pooling, and layers behind.

    Several columns of texts are read as one batch of the transformer: all texts below each other, padded to the
    longest. The embedding gets as wide as the stream that is left; what lies behind the pooling must not mind.

    Args:
        split: `collect_features` of the trainer: batch -> (features of each column, labels).

    Raises:
        UnsupportedArchitectureError: several transformers inside, or none.
    """

    wraps = True

    def __init__(self, whole: nn.Module, split: Split):
        super().__init__(whole)
        self._split = split
        found = _outermost(whole)
        if len(found) != 1:
            names = ", ".join(type(model).__name__ for model in found.values()) or "none"
            raise UnsupportedArchitectureError(
                f"{type(whole).__name__} holds {len(found)} models of transformers ({names}); expected one, which is "
                "narrowed. Narrow each with optimum_rmtkd.narrow, and train them with the library's own trainer."
            )
        ((self._path, self.model),) = found.items()
        self._followed = self.width

    def read(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """All texts of all columns, (texts, longest) each."""
        columns, _ = self._split(dict(batch))
        names = taken(self.model)
        columns = [
            {k: v for k, v in column.items() if torch.is_tensor(v) and v.dim() and (names is None or k in names)}
            if isinstance(column, Mapping)
            else {}
            for column in columns
        ]
        if not columns or not all(columns):
            raise RMTKDError(
                f"The batch holds {', '.join(batch)}: no inputs of {type(self.model).__name__}, which is narrowed. A "
                "loss that tokenizes by itself shows none; narrow the model with optimum_rmtkd.narrow first, and "
                "train it with the library's own trainer."
            )
        if len({frozenset(column) for column in columns}) > 1:
            told = "; ".join(", ".join(column) for column in columns)
            raise RMTKDError(f"The columns hold different inputs ({told}); expected one kind, texts or images.")
        padding = getattr(self.model.config, "pad_token_id", None) or 0
        return {
            name: _joined([column[name] for column in columns], padding if name == "input_ids" else 0)
            for name in columns[0]
        }

    def run(self, prepared: nn.Module, batch: Mapping[str, Any]) -> Any:
        with _overheard(self.model) as outputs:
            prepared(dict(batch))
        if not outputs:
            raise UnsupportedArchitectureError(
                f"{type(self.whole).__name__} does not call the forward of {type(self.model).__name__}, which is "
                "narrowed, but another method of it. Narrow it with optimum_rmtkd.narrow first."
            )
        return outputs[-1]

    def check_width(self, compute_loss: Callable[[], Any]) -> None:
        """Raises:
        RMTKDError: a layer behind the transformer, or the loss, wants the width that the embedding has now.
        """
        cure = (
            "Keep the width of the stream: RMTKDConfig(sites=...) without 'hidden', for example "
            "sites=('intermediate', 'attention_qk', 'attention_vo', 'embedding') of an encoder, "
            "sites=('intermediate', 'attention_groups') of a decoder."
        )
        for name, module in self._behind():
            if next(module.parameters(), None) is not None:
                raise RMTKDError(
                    f"{type(module).__name__} ({name}) of {type(self.whole).__name__} has weights for embeddings of "
                    f"{self.width} features, and the narrowed model would give fewer. {cure}"
                )
        try:
            with _shortened(self.whole), torch.no_grad():
                compute_loss()
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            raise RMTKDError(f"The loss cannot be computed from narrower embeddings ({error}). {cure}") from error

    def follow(self) -> None:
        former, self._followed = self._followed, self.width
        for name, module in self._behind() if former != self.width else ():
            config = module.get_config_dict() if hasattr(module, "get_config_dict") else {}
            if stated := [key for key in WIDTHS if config.get(key) == former]:
                fresh = type(module)(**config | {stated[0]: self.width})
                self.whole._modules[name] = fresh.train(module.training)

    @property
    def width(self) -> int:
        """Features of the stream."""
        return self.model.config.hidden_size

    def _behind(self) -> list[tuple[str, nn.Module]]:
        return [(name, m) for name, m in self.whole.named_children() if name != self._path.partition(".")[0]]


WIDTHS = ("embedding_dimension", "word_embedding_dimension")  # what a pooling calls the width that it is given


def inside_of(model: nn.Module, trainer: Any) -> Inside:
    """What is narrowed inside the model of a trainer."""
    split = getattr(trainer, "collect_features", None)
    if split is not None and hasattr(type(model), "transformers_model"):
        return SentenceEncoder(model, split)
    return Inside(model)


def _outermost(whole: nn.Module) -> dict[str, PreTrainedModel]:
    """{path: model of transformers} that lies in no other one."""
    found: dict[str, PreTrainedModel] = {}
    for path, module in whole.named_modules():
        if isinstance(module, PreTrainedModel) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    return found


def _joined(tensors: list[torch.Tensor], padding: int) -> torch.Tensor:
    """(rows, length, ...) each -> (all rows, longest, ...)."""
    if tensors[0].dim() < 2:
        return torch.cat(tensors)
    longest = max(tensor.shape[1] for tensor in tensors)
    padded = [torch.cat((t, t.new_full((len(t), longest - t.shape[1], *t.shape[2:]), padding)), 1) for t in tensors]
    return torch.cat(padded)


@contextmanager
def _overheard(model: nn.Module) -> Iterator[list[Any]]:
    """While open, what the forward of a model returns. No hook of it: its caller may call `model.forward` itself."""
    outputs, set_here, forward = [], vars(model).get("forward"), model.forward

    def overheard(*args: Any, **kwargs: Any) -> Any:
        outputs.append(forward(*args, **kwargs))
        return outputs[-1]

    model.forward = overheard
    try:
        yield outputs
    finally:
        del model.forward
        if set_here is not None:
            model.forward = set_here


@contextmanager
def _shortened(whole: nn.Module) -> Iterator[None]:
    """While open, embeddings have one feature less."""

    def shorten(module: nn.Module, args: Any, features: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: value[..., :-1] if name.endswith("embedding") and torch.is_tensor(value) else value
            for name, value in features.items()
        }

    handle = whole.register_forward_hook(shorten)
    try:
        yield
    finally:
        handle.remove()
