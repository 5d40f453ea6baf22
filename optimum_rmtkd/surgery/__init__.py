"""Narrows any declared family of models: sites, calibration, budget, cut and refit. It never trains."""

from __future__ import annotations

from ..models import count_parameters, uncut_parameters
from .cautions import divergence_warning, loss_warning
from .checks import anatomy_of, check_data, check_recipe
from .decoders import DecoderLayout
from .families import Family, family_of, register_family
from .layouts import EncoderLayout, ResidualConvLayout
from .reduction import Reduction, SiteRecord, analyze, block_paths, check_edges, narrow, narrow_to, reduce, stage_sites
from .report import SpectralReport
from .variety import check_variety


__all__ = [
    "DecoderLayout",
    "EncoderLayout",
    "Family",
    "Reduction",
    "ResidualConvLayout",
    "SiteRecord",
    "SpectralReport",
    "analyze",
    "anatomy_of",
    "block_paths",
    "check_data",
    "check_edges",
    "check_recipe",
    "check_variety",
    "count_parameters",
    "divergence_warning",
    "family_of",
    "loss_warning",
    "narrow",
    "narrow_to",
    "reduce",
    "register_family",
    "stage_sites",
    "uncut_parameters",
]
