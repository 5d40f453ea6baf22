"""Narrows any declared family of models: sites, calibration, budget, cut and refit. It never trains."""

from __future__ import annotations

from ..models import count_parameters, uncut_parameters
from .cautions import divergence_warning, loss_warning
from .checks import anatomy_of, check_data, check_recipe
from .convolutions import Gate, ResidualConvLayout, Step
from .decoders import DecoderLayout
from .families import Family, family_of, register_family
from .latency import Measurement, check_latency
from .layouts import EncoderLayout
from .reduction import (
    Reduction,
    SiteRecord,
    analyze,
    block_paths,
    check_edges,
    narrow,
    narrow_to,
    narrow_within,
    reduce,
    stage_sites,
)
from .report import SpectralReport
from .seq2seq import Seq2SeqLayout, Stack
from .tolerance import allowed_loss, keeps_tolerance
from .towers import StagesLayout, TowersLayout
from .variety import check_variety


__all__ = [
    "DecoderLayout",
    "EncoderLayout",
    "Family",
    "Gate",
    "Measurement",
    "Reduction",
    "ResidualConvLayout",
    "Seq2SeqLayout",
    "SiteRecord",
    "SpectralReport",
    "StagesLayout",
    "Stack",
    "Step",
    "TowersLayout",
    "allowed_loss",
    "analyze",
    "anatomy_of",
    "block_paths",
    "check_data",
    "check_edges",
    "check_latency",
    "check_recipe",
    "check_variety",
    "count_parameters",
    "divergence_warning",
    "family_of",
    "keeps_tolerance",
    "loss_warning",
    "narrow",
    "narrow_to",
    "narrow_within",
    "reduce",
    "register_family",
    "stage_sites",
    "uncut_parameters",
]
