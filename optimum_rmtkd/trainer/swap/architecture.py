"""Models of an architecture that is read from a config, and the weights that belong in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ...errors import RMTKDError
from ...models import as_tied, blank, is_narrowed, match_precision, pinned, widest_dtype
from ..data import isolated_rng
from .engine import built_whole
from .sharded import load_state, outline, real_class, whole
from .written import load_shards, weight_shards


if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = ["enable_checkpointing", "load_skeleton", "load_weights", "same_architecture", "skeleton"]


def skeleton(template: PreTrainedModel, config: dict[str, Any]) -> PreTrainedModel:
    """An untrained model of the architecture in `config`, with the head, device, dtype, attention and ties of
    `template`."""
    cls = type(template)
    if is_narrowed(config.get("model_type")):
        from ... import modeling_rmtkd

        cls = modeling_rmtkd.reduced_class(cls)
    built = cls.config_class.from_dict(config)
    built._attn_implementation = template.config._attn_implementation
    built.use_cache = getattr(template.config, "use_cache", None)
    with isolated_rng(0):
        fresh = as_tied(cls(built), template)
    if _spec_of(built) == _spec_of(template.config):  # else the spec states the numbers of single layers
        for path, numbers in pinned(template, blank(template)).items():
            vars(fresh.get_submodule(path)).update(numbers)
    return match_precision(fresh.to(device=template.device), template)


def _spec_of(config: Any) -> dict[str, Any]:
    return (getattr(config, "rmtkd", None) or {}).get("spec", {})


def enable_checkpointing(model: PreTrainedModel, args: Any) -> None:
    """Recompute activations in the backward pass if the training arguments ask for it, as `Trainer.train` does.

    transformers calls it activation checkpointing today and gradient checkpointing until 5.20; both names are
    honoured.
    """
    names = ("activation_checkpointing", "gradient_checkpointing")
    if not any(getattr(args, name, False) for name in names):
        return
    options = dict(next(filter(None, (getattr(args, f"{name}_kwargs", None) for name in names)), {}))
    if not hasattr(model, "activation_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None)
        return
    layers, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs=options or None, every_n_layers=layers, offload=offload
    )


def load_skeleton(model: PreTrainedModel, template: PreTrainedModel, folder: str | Path) -> PreTrainedModel | None:
    """An untrained model of the architecture saved in `folder`; None where `model` has it already.

    The config class comes from `template` (the uncut model): nothing has to be registered with the Auto classes.
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf8"))
    fresh = skeleton(template, config)
    return None if same_architecture(fresh, model) else fresh


def load_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Copy the weights saved in `folder` into `model`, which has their architecture.

    Through `from_pretrained`: transformers stores tensors of some architectures (ViT) under other names than they have
    in memory. The loader of its Trainer knows nothing of that and leaves them as they are: untrained, after a cut.

    Raises:
        RMTKDError: a tensor of the model is not in the folder.
        SpecMismatchError: the same for a narrowed model, or a tensor of another shape.
    """
    if shards := weight_shards(folder):
        plain = whole(model)
        load_shards(shards, plain)
        load_state(model, plain.state_dict())
        return
    with built_whole():
        saved, found = real_class(model).from_pretrained(
            folder, config=model.config, dtype=widest_dtype(model), output_loading_info=True
        )
    if found["missing_keys"]:
        raise RMTKDError(
            f"The checkpoint {folder} lacks {len(found['missing_keys'])} tensor(s) of {type(model).__name__}, the "
            f"first is {min(found['missing_keys'])}. It is incomplete, or of another model; take another checkpoint."
        )
    load_state(model, saved.state_dict())


def same_architecture(one: nn.Module, other: nn.Module) -> bool:
    """Whether both have the same tensors, by name and shape, and are of one type."""
    return _architecture(one) == _architecture(other)


def _architecture(model: nn.Module) -> tuple[str, dict[str, tuple[int, ...]]]:
    shapes = {name: tuple(tensor.shape) for name, tensor in outline(model).state_dict().items()}
    return model.config.model_type, shapes
