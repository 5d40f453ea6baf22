"""A run in the checkpoints of an accelerator. Knows the hooks of `save_state` and `load_state`, and a run's state."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from ...errors import RMTKDError
from ..checkpoint import STATE, read_process_state, read_state, write_process_state, write_state
from ..parts import transforms_state
from ..run import Run


__all__ = ["LoopCheckpoints", "random_state", "register_checkpoints", "set_random_state"]


class LoopCheckpoints:
    """Writes the run into each folder of `accelerator.save_state`, and takes it up in `load_state` before the weights
    are loaded, which need the architecture of the checkpoint.

    Args:
        before_save: brings the run up to the last optimizer step; it may cut.
        loaded: told of a run that was taken up.
    """

    def __init__(self, run: Run, before_save: Callable[[], None], loaded: Callable[[], None]):
        self.run, self.before_save, self.loaded = run, before_save, loaded
        self.accelerator = run.host.accelerator

    def save(self, models: list, weights: list, folder: str) -> None:
        """Accelerate collected the weights before it asks: what is due may change them."""
        if self.run.plan is None:
            raise RMTKDError(
                f"accelerator.save_state({str(folder)!r}) before the first loop.loss(batch): there is no run to save "
                "yet. Save after a step."
            )
        self.before_save()
        for number, model in enumerate(models):
            if self.accelerator.unwrap_model(model) is self.run.host.model:
                weights[number] = self.accelerator.get_state_dict(model, unwrap=False)
        accelerator, on_each_node = self.accelerator, self.accelerator.project_configuration.save_on_each_node
        own = transforms_state(self.run.parts.transforms)
        write_process_state(folder, accelerator.process_index, accelerator.num_processes, own)
        if accelerator.is_main_process or on_each_node and accelerator.is_local_main_process:
            state = self.run.state_dict()
            write_state(folder, state["values"], state["tensors"])

    def load(self, models: list, folder: str) -> None:
        """Raises:
        RMTKDError: no state of a run there, or that of another model or recipe.
        """
        if not (Path(folder) / STATE).is_file():
            raise RMTKDError(
                f"{folder} holds no {STATE}: accelerator.save_state wrote it in a script without RMTKDLoop. Load a "
                "checkpoint of a run with it, or start a new run from that model."
            )
        accelerator, run = self.accelerator, self.run
        values, tensors = read_state(folder)
        own = read_process_state(folder, accelerator.process_index, accelerator.num_processes)
        run.dropout.restore()  # or the rates of 0 would be taken for the user's
        run.load_state_dict({"values": values, "tensors": tensors | own}, str(folder))
        run.restore_cores()
        self.loaded()


def register_checkpoints(checkpoints: LoopCheckpoints) -> list[RemovableHandle]:
    """From here on the accelerator calls them."""
    accelerator = checkpoints.accelerator
    return [
        accelerator.register_save_state_pre_hook(checkpoints.save),
        accelerator.register_load_state_pre_hook(checkpoints.load),
    ]


def random_state() -> dict[str, Any]:
    """Of all generators that a training step draws from."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def set_random_state(state: Mapping[str, Any]) -> None:
    """Inverse of `random_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
