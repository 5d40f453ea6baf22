"""Reparameterization room: more parameters while training, the same function, folded back before anything is saved."""

from __future__ import annotations

from .base import (
    Reparameterization,
    build_reparameterization,
    core_parameters,
    fold,
    folded_copy,
    is_reparameterized,
    over_parameterize,
    plain_parameters,
    register_reparameterization,
)
from .mpo import MatrixProductOperator, mpo_decompose, mpo_factor
from .powerpropagation import Powerpropagation
from .targets import block_list


__all__ = [
    "MatrixProductOperator",
    "Powerpropagation",
    "Reparameterization",
    "block_list",
    "build_reparameterization",
    "core_parameters",
    "fold",
    "folded_copy",
    "is_reparameterized",
    "mpo_decompose",
    "mpo_factor",
    "over_parameterize",
    "plain_parameters",
    "register_reparameterization",
]
