"""What several rooms ask of a model: its size, its origin, whether it is what it says it is, and a new one of another
architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..modeling_rmtkd import TYPE_PREFIX
from .behaviour import check_behaviour, nearly_equal
from .carrying import carry_over, copied, is_plain
from .depth import KEPT, block_names, kept_blocks, parameters_as
from .differences import AROUND_THE_RESULT
from .heads import has_head, shifts_labels, unwrapped
from .identity import check_kind, check_structure
from .rebuilding import (
    as_tied,
    blank,
    match_precision,
    outline,
    pinned,
    rebuilt,
    twin_of,
    widest_dtype,
)
from .scratch import Scratch, in_files, released, scratch_for


__all__ = [
    "AROUND_THE_RESULT",
    "KEPT",
    "UNCUT",
    "Scratch",
    "as_tied",
    "blank",
    "block_names",
    "carry_over",
    "check_behaviour",
    "check_kind",
    "check_structure",
    "copied",
    "count_parameters",
    "has_head",
    "in_files",
    "is_narrowed",
    "is_plain",
    "kept_blocks",
    "match_precision",
    "nearly_equal",
    "outline",
    "parameters_as",
    "pinned",
    "provenance_of",
    "rebuilt",
    "released",
    "scratch_for",
    "shifts_labels",
    "twin_of",
    "uncut_parameters",
    "unwrapped",
    "widest_dtype",
]


UNCUT = "uncut_parameters"
"""Field of the config of a plain model that was made smaller: its parameters before. transformers keeps it and ignores
it."""


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
    """Parameters before the first cut or trimming, which every `target_reduction` counts from; those of now where
    nothing was removed."""
    remembered = (provenance_of(model).get("parameters_before"), getattr(model.config, UNCUT, None))
    return max(*(int(count or 0) for count in remembered), count_parameters(model))
