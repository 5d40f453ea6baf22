"""How the model under training changes its inside, keeping its identity; knows no trainer and no run."""

from __future__ import annotations

from .architecture import enable_checkpointing, load_skeleton, load_weights, same_architecture, skeleton
from .dropout import DropoutSwitch
from .engine import Engine, built_whole, in_engine, made_whole
from .in_place import become, install, rewrapped
from .optimizer import adam_rate, alike_rates, forget_moments, peak_rates, raw_optimizer, regroup, separate_cores
from .sharded import Sharding, assign, gathered, hold, is_sharded, is_whole, outline, whole, whole_copy
from .wrapper import renew_wrapper
from .written import complete_state, foreign_optimizer, load_optimizer


__all__ = [
    "adam_rate",
    "alike_rates",
    "DropoutSwitch",
    "Engine",
    "Sharding",
    "assign",
    "become",
    "built_whole",
    "complete_state",
    "enable_checkpointing",
    "foreign_optimizer",
    "forget_moments",
    "gathered",
    "hold",
    "in_engine",
    "install",
    "is_sharded",
    "is_whole",
    "load_optimizer",
    "load_skeleton",
    "load_weights",
    "made_whole",
    "outline",
    "peak_rates",
    "raw_optimizer",
    "regroup",
    "renew_wrapper",
    "rewrapped",
    "same_architecture",
    "separate_cores",
    "skeleton",
    "whole",
    "whole_copy",
]
