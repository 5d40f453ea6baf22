"""What libraries that adapt a model need to know of a reduced one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..errors import RMTKDError


if TYPE_CHECKING:
    from torch import nn

__all__ = ["lora_targets"]


def lora_targets(model: nn.Module, names: Iterable[str] | None = None) -> list[str]:
    """Linear layers of a model, reduced or not, in the form that PEFT's `target_modules` takes.

    PEFT adapts `nn.Linear` only, and a factored layer holds two of them: where such a layer is meant, both are named.

    Args:
        model: any transformers model.
        names: last parts of the names of layers, for example ("query", "value"). None: every linear layer of the
            backbone; task heads are left out, PEFT's `modules_to_save` is for them.

    Returns:
        Full names of the linear layers, in the order of the network.

    Raises:
        RMTKDError: a name that no linear layer has; the message lists those there are.
    """
    from torch import nn

    backbone = getattr(model, "base_model", model)
    prefix = "" if backbone is model else f"{model.base_model_prefix}."
    linear = [prefix + name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if names is None:
        return linear
    wanted = set(names)
    ends = {name: _own_name(model, name) for name in linear}
    unknown = sorted(wanted - set(ends.values()))
    if unknown:
        raise RMTKDError(
            f"No linear layer of {type(model).__name__} is called {', '.join(unknown)}; there are "
            f"{', '.join(dict.fromkeys(ends.values()))}."
        )
    return [name for name in linear if ends[name] in wanted]


def _own_name(model: nn.Module, path: str) -> str:
    """Last part of a layer's name; for a factor, of the layer it belongs to."""
    from ..modeling_rmtkd import LowRankEmbedding, LowRankLinear

    parent, _, name = path.rpartition(".")
    factored = isinstance(model.get_submodule(parent), (LowRankLinear, LowRankEmbedding))
    return parent.rpartition(".")[2] if factored else name
