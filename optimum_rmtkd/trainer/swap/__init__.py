"""How the model under training changes its inside, keeping its identity; knows no trainer and no run."""

from __future__ import annotations

from .architecture import enable_checkpointing, load_skeleton, load_weights, same_architecture, skeleton
from .dropout import DropoutSwitch
from .in_place import become, install, rewrapped
from .optimizer import adam_rate, forget_moments, raw_optimizer, regroup, separate_cores
from .wrapper import renew_wrapper


__all__ = [
    "adam_rate",
    "DropoutSwitch",
    "become",
    "enable_checkpointing",
    "forget_moments",
    "install",
    "load_skeleton",
    "load_weights",
    "raw_optimizer",
    "regroup",
    "renew_wrapper",
    "rewrapped",
    "same_architecture",
    "separate_cores",
    "skeleton",
]
