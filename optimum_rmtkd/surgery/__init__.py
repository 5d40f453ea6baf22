"""Narrows any declared family of models: sites, calibration, budget, cut and refit. It never trains."""

from __future__ import annotations

from ..models import count_parameters, uncut_parameters
from .families import Family, family_of, register_family
from .layouts import EncoderLayout, ResidualConvLayout
from .reduction import Reduction, SiteRecord, analyze, block_paths, narrow, narrow_to, reduce, stage_sites
from .report import SpectralReport
from .surgeon import anatomy_of, check_data, check_recipe


__all__ = [
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
    "check_recipe",
    "count_parameters",
    "family_of",
    "narrow",
    "narrow_to",
    "reduce",
    "register_family",
    "stage_sites",
    "uncut_parameters",
]
