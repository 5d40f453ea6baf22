"""What a checkpoint holds of weights and optimizer, in whatever form a run left it: whole and by number (one process,
DDP), whole and by name (FULL_STATE_DICT), or in shards (SHARDED_STATE_DICT). A run takes up any of them, sharded or
not, with any number of processes.

Knows torch's distributed checkpoints and the names under which transformers and Accelerate write; no trainer, no run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import RMTKDError
from .optimizer import raw_optimizer


__all__ = ["complete_state", "foreign_optimizer", "load_optimizer", "load_shards", "weight_shards"]

WEIGHT_SHARDS, OPTIMIZER_SHARDS = "pytorch_model_fsdp_0", "optimizer_0"  # folders of Accelerate's
BY_NAME, BY_NUMBER = "optimizer.bin", "optimizer.pt"


def weight_shards(folder: str | Path) -> Path | None:
    """The folder with the shards of the weights; None where they lie whole in the checkpoint."""
    shards = Path(folder) / WEIGHT_SHARDS
    whole = any(Path(folder).glob("*.safetensors.index.json")) or (Path(folder) / "model.safetensors").is_file()
    return shards if shards.is_dir() and not whole else None


def load_shards(shards: Path, model: nn.Module) -> None:
    """Fill a plain model from the shards of any number of processes. Collective, where there are several.

    Raises:
        RMTKDError: they are incomplete, or of another model.
    """
    _read(shards, {"model": model.state_dict()})


def foreign_optimizer(folder: str | Path, sharded: bool) -> bool:
    """Whether the checkpoint's optimizer was written in another form than transformers reads in a run like this.

    Args:
        sharded: this run is.
    """
    held = [name for name in (OPTIMIZER_SHARDS, BY_NAME, BY_NUMBER) if (Path(folder) / name).exists()]
    return bool(held) and (sharded or BY_NUMBER not in held)


def load_optimizer(model: nn.Module, optimizer: Any, folder: str | Path) -> None:
    """The optimizer's state from a checkpoint in any form. Collective, where there are several processes.

    Args:
        model: as it trains, sharded or not.

    Raises:
        RMTKDError: it cannot be read, or is of another model.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    folder, raw = Path(folder), raw_optimizer(optimizer)
    if (folder / OPTIMIZER_SHARDS).is_dir():
        state = get_optimizer_state_dict(model, raw)
        _read(folder / OPTIMIZER_SHARDS, {"optimizer": state})
        set_optimizer_state_dict(model, raw, state)
        return
    by_name = (folder / BY_NAME).is_file()
    state = torch.load(folder / (BY_NAME if by_name else BY_NUMBER), map_location="cpu", weights_only=True)
    if not by_name:
        state = _named(state, _names(model, raw))
    if state["state"]:
        set_optimizer_state_dict(model, raw, state, options=StateDictOptions(full_state_dict=True, strict=False))
    else:  # none was needed (SGD), or none was made yet; torch takes that for a mistake
        for group, saved in zip(raw.param_groups, state["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
    parameters = model.state_dict(keep_vars=True)
    for name in {name for group in state["param_groups"] for name in group["params"]} - state["state"].keys():
        raw.state.pop(parameters[name], None)  # torch has made one, of a step that was none


def _read(folder: Path, into: dict[str, Any]) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        dcp.load(into, storage_reader=dcp.FileSystemReader(folder))
    except (CheckpointException, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise RMTKDError(
            f"The shards in {folder} cannot be read ({reason}): they are incomplete, or of another model. Take "
            "another checkpoint."
        ) from error


def _names(model: nn.Module, raw: torch.optim.Optimizer) -> list[list[str]]:
    """Of the parameters in each group."""
    held = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    return [[held[id(parameter)] for parameter in group["params"]] for group in raw.param_groups]


def _named(state: Mapping[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """A state by number as one by name."""
    groups, flat = state["param_groups"], [name for group in names for name in group]
    if [len(group["params"]) for group in groups] != [len(group) for group in names]:
        raise RMTKDError(
            f"The checkpoint's optimizer has groups of {[len(g['params']) for g in groups]} parameters, this run's of "
            f"{[len(g) for g in names]}: it is of another model, or of another optimizer. Take another checkpoint."
        )
    by_number = dict(zip((number for group in groups for number in group["params"]), flat, strict=True))
    return {
        "state": {by_number[number]: values for number, values in state["state"].items()},
        "param_groups": [{**group, "params": list(own)} for group, own in zip(groups, names, strict=True)],
    }


@torch.no_grad()
def complete_state(optimizer: Any) -> None:
    """Give the parameters that have made no step the state that their first step begins with: zeros, for the
    optimizers of Adam's family and momentum.

    torch's writer needs a state of every parameter, and makes a step for an optimizer that has none, which it then
    counts.
    """
    raw = raw_optimizer(optimizer)
    new = [p for group in raw.param_groups for p in group["params"] if p.requires_grad and p not in raw.state]
    if not new:
        return
    gradients = {p: p.grad for group in raw.param_groups for p in group["params"]}
    for parameter in gradients:
        parameter.grad = None
    for parameter in new:
        parameter.grad = torch.zeros_like(parameter)
    rates = [group["lr"] for group in raw.param_groups]
    for group in raw.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if torch.is_tensor(group["lr"]) else 0.0
    try:
        raw.step()
    finally:
        for group, rate in zip(raw.param_groups, rates, strict=True):
            group["lr"] = rate
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
    for parameter in new:
        for name, value in raw.state.get(parameter, {}).items():
            raw.state[parameter][name] = torch.zeros_like(value) if torch.is_tensor(value) else type(value)(0)
