"""The tensors of a model that have a row for each token, found without knowing the model: they are those whose shape
follows `vocab_size` when the class builds a model from its config. Word tables, heads tied to them or not, biases of
decoders and tables of factorised or narrowed models are all found so; positions, types and labels are not."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import RMTKDError, UnsupportedArchitectureError
from ..models import UNCUT, blank, copied, is_plain, provenance_of, uncut_parameters
from .ids import configs_in, renumber, token_ids


__all__ = ["TokenTables", "find_tables"]


SIZES = ("vocab_size", "decoder_vocab_size")  # fields of a config; the second says it of the same tokens (Marian)


@dataclass(frozen=True)
class TokenTables:
    """What of a model is indexed by tokens.

    Attributes:
        model: untouched.
        rows: `vocab_size` of its config.
        named: ids below `rows` that config and generation config name.
        anchored: ids that must stay as they are, because positions are counted from one of them.
    """

    model: PreTrainedModel
    rows: int
    named: frozenset[int]
    anchored: frozenset[int]

    def trimmed(self, kept: torch.Tensor) -> PreTrainedModel:
        """A copy of the model with the rows `kept` of each table, int64 (rows,), ascending; its configs follow.

        Raises:
            UnsupportedArchitectureError: the class builds something else than the model from its config, or the tables
                cannot be found.
        """
        model, new = self.model, {int(old): i for i, old in enumerate(kept.tolist())}
        config = copy.deepcopy(model.config)
        self._renumber(config, new, len(kept))
        before, after = blank(model), blank(model, config)
        axes = self._axes(before, after, len(kept))
        memo: dict[int, Any] = {}
        for name, tensor in _tensors(model):
            if name in axes and id(tensor) not in memo:
                memo[id(tensor)] = _rows_of(tensor, axes[name], kept)
        made = copied(model, memo)
        seen: set[int] = set()
        for module in made.modules():
            held = vars(module).get("config")
            if isinstance(held, PreTrainedConfig):
                self._renumber(held, new, len(kept), seen)
        if getattr(made, "generation_config", None) is not None:
            renumber(made.generation_config, new)
        _follow(made, before, after)
        if len(kept) < self.rows and not provenance_of(model).get("parameters_before"):
            setattr(made.config, UNCUT, uncut_parameters(model))
        return made

    def _renumber(
        self, config: PreTrainedConfig, new: Mapping[int, int], rows: int, seen: set[int] | None = None
    ) -> None:
        """In place: `vocab_size` and ids of every config that has the table, or holds one that has."""
        seen = set() if seen is None else seen
        inside = [c for c in configs_in(config) if id(c) not in seen]
        for part in inside:
            if any(getattr(c, "vocab_size", None) == self.rows for c in configs_in(part)):
                seen.add(id(part))
                renumber(part, new)
        for part in inside:
            if getattr(part, "vocab_size", None) == self.rows:
                for name in SIZES:
                    if getattr(part, name, None) == self.rows:
                        setattr(part, name, rows)

    def _axes(self, before: nn.Module, after: nn.Module, rows: int) -> dict[str, int]:
        """{name of a tensor: which of its dimensions counts tokens}."""
        if rows == self.rows:
            return {}
        ours, olds, news = ({n: tuple(t.shape) for n, t in _tensors(m)} for m in (self.model, before, after))
        cls = type(self.model).__name__
        axes = {}
        for name, old in olds.items():
            new = news.get(name, old)
            if new == old:
                continue
            found = [d for d in range(len(old)) if old[d] == self.rows and (*old[:d], rows, *old[d + 1 :]) == new]
            if not found:
                raise UnsupportedArchitectureError(
                    f"{name} of {cls} goes from {old} to {new} when vocab_size goes from {self.rows} to {rows}; "
                    "expected one dimension to follow. Its table cannot be trimmed."
                )
            if ours.get(name) != old:
                raise UnsupportedArchitectureError(
                    f"{name} of {cls} is {ours.get(name, 'missing')}, its config (vocab_size {self.rows}) describes "
                    f"{old}. Put model.config in order (model.resize_token_embeddings does), merge adapters, and trim "
                    "then."
                )
            axes[name] = found[0]
        if not axes:
            raise UnsupportedArchitectureError(
                f"No tensor of {cls} follows vocab_size of its config: it has no table of tokens to trim."
            )
        return axes


def find_tables(model: Any, size: int) -> TokenTables:
    """
    Args:
        size: highest id of the tokenizer + 1.

    Raises:
        RMTKDError: no PreTrainedModel; a tokenizer that has more ids than the table has rows.
        UnsupportedArchitectureError: no table, several of different sizes, or weights that are no plain tensors.
    """
    if not isinstance(model, PreTrainedModel):
        cure = "Merge the adapter first: model.merge_and_unload()." if hasattr(model, "merge_and_unload") else ""
        inner = getattr(model, "transformers_model", None)  # of a SentenceTransformer
        if isinstance(inner, PreTrainedModel):
            cure = "Pass model.transformers_model and model.tokenizer, or trim its folder with optimum-cli rmtkd trim."
        raise RMTKDError(f"Expected a transformers PreTrainedModel, got {type(model).__name__}. {cure}".rstrip())
    name = type(model).__name__
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedArchitectureError(
            f"{name} carries an adapter of PEFT: expected a model without one. Merge it into the weights first (load "
            "the model as a PeftModel, then merge_and_unload), or trim the model and train an adapter on the result."
        )
    sizes = {c.vocab_size for c in configs_in(model.config) if isinstance(getattr(c, "vocab_size", None), int)}
    fitting = {rows for rows in sizes if rows >= size}
    if not sizes:
        raise UnsupportedArchitectureError(f"{name} has no table of tokens: its config has no vocab_size.")
    if not fitting:
        raise RMTKDError(
            f"The tokenizer has ids up to {size - 1:,}, the table of {name} has {max(sizes):,} rows: expected the "
            "tokenizer that the model was trained with, or model.resize_token_embeddings(len(tokenizer)) first."
        )
    if len(fitting) > 1:
        raise UnsupportedArchitectureError(
            f"{name} has tables of {', '.join(f'{n:,}' for n in sorted(fitting))} tokens; which one the tokenizer "
            "belongs to cannot be told. Expected one: trim the parts by themselves."
        )
    for tensor_name, tensor in model.named_parameters():
        if type(tensor.data) is not torch.Tensor or tensor.is_meta or not tensor.is_floating_point():
            raise UnsupportedArchitectureError(
                f"{tensor_name} of {name} is quantised, sharded or offloaded ({type(tensor.data).__name__}, "
                f"{tensor.dtype}, {tensor.device}): expected plain floating tensors. Load the model whole, without "
                "quantization_config and device_map, trim it, and quantise the result."
            )
    rows = fitting.pop()
    configs = [c for c in configs_in(model.config) if any(getattr(d, "vocab_size", 0) == rows for d in configs_in(c))]
    named = frozenset().union(*(token_ids(c, rows) for c in configs))
    if getattr(model, "generation_config", None) is not None:
        named |= token_ids(model.generation_config, rows)
    return TokenTables(model, rows, frozenset(named), _anchored(model, rows))


def _anchored(model: nn.Module, rows: int) -> frozenset[int]:
    """All ids up to that of padding where positions are counted from it (RoBERTa and its relatives, M2M100): the
    table of positions, or the module around it, then carries the id of padding. So do tables of tokens and whole
    models, which count nothing from it."""
    parts = [m for m in model.modules() if not isinstance(m, PreTrainedModel)]
    pads = [getattr(m, "padding_idx", None) for m in parts if getattr(m, "num_embeddings", None) != rows]
    found = [i for i in pads if isinstance(i, int) and 0 <= i < rows]
    return frozenset(range(max(found) + 1)) if found else frozenset()


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _rows_of(tensor: torch.Tensor, axis: int, kept: torch.Tensor) -> torch.Tensor:
    """The same kind of tensor with the rows `kept` of one dimension; attributes that others put on it stay."""
    rows = tensor.detach().index_select(axis, kept.to(tensor.device))
    if not isinstance(tensor, nn.Parameter):
        return rows
    made = nn.Parameter(rows, requires_grad=tensor.requires_grad)
    vars(made).update(vars(tensor))
    return made


def _follow(made: nn.Module, before: nn.Module, after: nn.Module) -> None:
    """Plain attributes that the class computes from the config (num_embeddings, out_features, vocab_size, padding_idx,
    ignore_index) become those of the new config, in place."""
    modules, olds = dict(made.named_modules()), dict(before.named_modules())
    for path, stock in after.named_modules():
        if path not in modules or path not in olds:
            continue
        for name, value in vars(stock).items():
            old = vars(olds[path]).get(name, value)
            if is_plain(value) and is_plain(old) and value != old and name in vars(modules[path]):
                vars(modules[path])[name] = value
