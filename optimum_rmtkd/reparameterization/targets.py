"""Which modules are meant: the repeated blocks of a model, and the matrices inside them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from torch.nn.utils import parametrize

from ..errors import RMTKDError


__all__ = ["block_list", "block_lists", "target_paths"]


def block_list(model: nn.Module) -> tuple[str, ...]:
    """Paths of the repeated blocks: the children of the longest `nn.ModuleList` whose children are of one type.

    Empty where there is none; the first of several of one length.
    """
    best: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(best):
            if len({type(child) for child in module}) == 1:
                best = tuple(f"{path}.{i}" if path else str(i) for i in range(len(module)))
    return best


def block_lists(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Path of each outermost module list of the backbone -> its children's: both stacks of an encoder-decoder.

    The children are blocks: of one type, and made of other modules.
    """
    backbone = set(getattr(model, "base_model", model).modules())
    lists: dict[str, tuple[str, ...]] = {}
    for path, module in model.named_modules():
        inner = module not in backbone or any(path.startswith(outer + ".") for outer in lists)
        if inner or not isinstance(module, nn.ModuleList):
            continue
        if len({type(child) for child in module}) == 1 and next(module[0].children(), None) is not None:
            lists[path] = tuple(f"{path}.{i}" if path else str(i) for i in range(len(module)))
    return lists


def target_paths(model: nn.Module, targets: str | Sequence[str] | None, kinds: tuple[type, ...]) -> list[str]:
    """Modules of a model with a weight of their own to be reparameterised, in order.

    Args:
        targets: None: every module of `kinds` inside repeated blocks, of the encoder and of the decoder. A string: a
            regular expression that matches the whole path; a list: paths end in one of these words (as PEFT's
            `target_modules`).
        kinds: module types that can be taken.

    Raises:
        RMTKDError: nothing matches, or only weights that are tied to others.
    """
    weights: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                weights[id(parameter)] = weights.get(id(parameter), 0) + 1
    repeated = block_lists(model)
    found, tied = [], []
    for path, module in model.named_modules():
        if not isinstance(module, kinds) or parametrize.is_parametrized(module):
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        if targets is None:
            chosen = any(path.startswith(blocks + ".") for blocks in repeated)
        elif isinstance(targets, str):
            chosen = re.fullmatch(targets, path) is not None
        else:
            chosen = any(path == word or path.endswith("." + word) for word in targets)
        if chosen:
            # A weight that two modules share would be parametrised in one of them only, and the tie lost.
            (found if weights[id(weight)] == 1 else tied).append(path)
    if not found and tied:
        raise RMTKDError(
            f"target_modules={targets!r} matches only tied weights in {type(model).__name__} ({', '.join(tied)}), "
            "which stay as they are: the tie would be lost. Choose others, or set tie_word_embeddings=False."
        )
    if not found:
        names = sorted(
            {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, kinds)}
        )
        raise RMTKDError(
            f"target_modules={targets!r} matches nothing in {type(model).__name__}; expected a regular expression for "
            f"whole paths or a list of last words, among {', '.join(names) or 'none: the model has no such module'}."
        )
    return found
