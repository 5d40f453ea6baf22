"""What a resumed run needs besides transformers' own checkpoint: `rmtkd_state.json` and `rmtkd_state.safetensors`, and
`rmtkd_process_<rank>_of_<count>.safetensors` for what each process has of its own.

The checkpoint's `config.json` already describes the architecture. Here lie the stages done, the projections between
the teacher's stream and the student's, what the objectives learned from the calibration data, and those teachers that
exist nowhere else (`previous`, `ema`, one that the run has fine-tuned). The initial teacher of a run without a fit is
not stored: it is the model that the user passes in again, and its fingerprint says whether it is the same one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints import STATE, TENSORS
from ..errors import RMTKDError
from ..files import write_whole
from .stages import write_json


__all__ = [
    "STATE",
    "TENSORS",
    "flatten",
    "read_process_state",
    "read_state",
    "same_layout_or_raise",
    "same_parts_or_raise",
    "same_recipe_or_raise",
    "same_weights_or_raise",
    "subset",
    "write_process_state",
    "write_state",
]

logger = logging.getLogger(__name__)

PROCESS = "rmtkd_process_{rank}_of_{count}.safetensors"
VERSION = 2


def write_state(folder: str | Path, values: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write both files into a checkpoint folder, tensors first: the JSON file stands for a whole pair."""
    _write_tensors(Path(folder) / TENSORS, tensors)
    write_json(Path(folder) / STATE, {"version": VERSION, **values})


def write_process_state(folder: str | Path, rank: int, count: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Called by each of `count` processes; without tensors there is no file."""
    folder = Path(folder)
    for stale in folder.glob(PROCESS.format(rank=rank, count="*")):
        stale.unlink()  # of a run with other processes that wrote here before
    if tensors:
        folder.mkdir(parents=True, exist_ok=True)
        _write_tensors(folder / PROCESS.format(rank=rank, count=count), tensors)


def read_process_state(folder: str | Path, rank: int, count: int) -> dict[str, torch.Tensor]:
    """Inverse of `write_process_state`; empty where there is no file. In a run of another number of processes than the
    checkpoint's the states are dealt out again.

    Raises:
        RMTKDError: files of runs of different sizes, or one that is missing.
    """
    from safetensors.torch import load_file

    own = Path(folder) / PROCESS.format(rank=rank, count=count)
    if own.is_file():
        return load_file(own)
    found = sorted(Path(folder).glob(PROCESS.format(rank="*", count="*")))
    counts = {int(file.stem.rpartition("_")[2]) for file in found}
    if counts <= {count}:
        return {}
    saved = counts.pop()
    given = Path(folder) / PROCESS.format(rank=rank % saved, count=saved)
    if counts or not given.is_file():
        raise RMTKDError(
            f"{folder} holds {', '.join(file.name for file in found)}: expected the states of all processes of one "
            "run. Copy the missing ones from the machines where they were written, or resume from another checkpoint."
        )
    logger.warning(
        "%s has the state of %d processes; process %d of %d takes %s.", folder, saved, rank, count, given.name
    )
    return load_file(given)


def _write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    held = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    write_whole(file, lambda beside: save_file(held, beside))


def read_state(folder: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Inverse of `write_state`.

    Raises:
        RMTKDError: no such folder, no state in it, an unreadable one, or one of another version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not folder.is_dir():
        raise RMTKDError(f"resume_from_checkpoint={str(folder)!r}: no such folder.")
    if not (folder / STATE).is_file():
        raise RMTKDError(
            f"{folder} holds no {STATE}: it was saved with save_only_model=True, by save_model(), or by another "
            "trainer. Resume from a checkpoint-N folder of an RMTKDTrainer run with save_only_model=False, or start a "
            "new run from this model."
        )
    try:
        values = json.loads((folder / STATE).read_text(encoding="utf8"))
    except ValueError as error:
        raise RMTKDError(f"{folder / STATE} cannot be read ({error}); resume from another checkpoint.") from error
    if values.get("version") != VERSION:
        raise RMTKDError(f"{folder / STATE} has version {values.get('version')!r}; expected {VERSION}.")
    try:
        return values, load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise RMTKDError(f"{folder / TENSORS} cannot be read ({error}); resume from another checkpoint.") from error


def same_weights_or_raise(expected: str, found: str, folder: str | Path) -> None:
    """Raises:
    RMTKDError: the model passed in is not the one that the checkpoint's run started from.
    """
    if expected != found:
        raise RMTKDError(
            f"The run in {folder} started from a model with fingerprint {expected[:12]}, the model passed in "
            f"has {found[:12]}. It is the teacher of the run and must be the same: pass the uncut model "
            "the run started from (the same weights and dtype), or start a new run."
        )


def same_layout_or_raise(expected: str, found: str, folder: str | Path) -> None:
    """The same of a run that fine-tunes its model first: all weights are in the checkpoint, and those of a new head
    are others each time that the model is loaded.

    Raises:
        RMTKDError: the model passed in has other tensors, by name, shape or dtype.
    """
    if expected != found:
        raise RMTKDError(
            f"The run in {folder} started from a model with other tensors, by name, shape or dtype, than the model "
            "passed in has. Pass a model of the same architecture, number of labels and dtype, or start a new run."
        )


def same_recipe_or_raise(expected: Mapping[str, Any], found: Mapping[str, Any], folder: str | Path) -> None:
    """Raises:
    RMTKDError: the recipe is not the one that the checkpoint's run follows; names what differs.
    """
    found = json.loads(json.dumps(found))  # as it was stored: no tuples, no numbers as keys
    names = sorted(n for n in {*expected, *found} if expected.get(n) != found.get(n))
    if names:
        was, now = (", ".join(f"{n}={values.get(n)!r}" for n in names) for values in (expected, found))
        raise RMTKDError(
            f"The run in {folder} follows a recipe with {was}; this one has {now}. The cuts made there cannot be "
            "taken back: resume with the same recipe, or start a new run in another folder."
        )


def same_parts_or_raise(expected: Mapping[str, list], found: Mapping[str, list], folder: str | Path) -> None:
    """Raises:
    RMTKDError: other objectives, transforms, reparameterization or teacher than those of the checkpoint's run, or
        other arguments of them.
    """
    for kind, was in expected.items():
        if was != found[kind]:
            raise RMTKDError(
                f"The run in {folder} had the {kind} {', '.join(was) or 'none'}; this one has "
                f"{', '.join(found[kind]) or 'none'}. Resume with the same, or start a new run."
            )


def flatten(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys under "prefix/"."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def subset(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inverse of `flatten`: what lies under "prefix/"."""
    return {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(prefix + "/")}


def load_into(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Fill a skeleton, strictly; evaluation mode."""
    model.load_state_dict(dict(tensors), strict=True)
    return model.eval()
