"""What several rooms ask of a model: its size, its origin, and a new one of another architecture."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .modeling_rmtkd import TYPE_PREFIX, reduced_class


__all__ = ["count_parameters", "is_narrowed", "provenance_of", "rebuilt", "uncut_parameters"]


def count_parameters(model: nn.Module) -> int:
    """All parameters of a model, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def is_narrowed(model_type: str | None) -> bool:
    """Whether this `model_type` of a config is that of a narrowed model."""
    return str(model_type).startswith(TYPE_PREFIX)


def provenance_of(model: nn.Module) -> dict[str, Any]:
    """Where a narrowed model comes from: base_model, parameters_before, rounds; empty for one that was never cut."""
    return (getattr(model.config, "rmtkd", None) or {}).get("provenance", {})


def uncut_parameters(model: nn.Module) -> int:
    """Parameters before the first cut, which every `target_reduction` counts from; those of now where it is uncut."""
    return max(int(provenance_of(model).get("parameters_before") or 0), count_parameters(model))


def rebuilt(model: PreTrainedModel, rmtkd: dict[str, Any], fields: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """A new model of the architecture that `rmtkd` (spec and all) describes, in eval mode, in the dtype and on the
    device of `model`; tensors of the same name and shape are copied, the others are as initialised.

    Args:
        fields: fields of the config that change.
    """
    model_class = reduced_class(type(model))
    values = model.config.to_dict()
    for name in ("model_type", "transformers_version", "architectures", "auto_map"):
        values.pop(name, None)
    config = model_class.config_class(**values)
    for name, value in (fields or {}).items():
        setattr(config, name, value)
    config.rmtkd = rmtkd
    config._attn_implementation = model.config._attn_implementation
    student = model_class(config).to(device=model.device, dtype=model.dtype).eval()
    if hasattr(model, "generation_config"):
        student.generation_config = copy.deepcopy(model.generation_config)
    old, new = model.state_dict(), student.state_dict()
    with torch.no_grad():
        for name, tensor in new.items():
            if name in old and old[name].shape == tensor.shape:
                tensor.copy_(old[name])
    return student
