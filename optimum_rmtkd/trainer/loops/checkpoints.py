"""A run in the checkpoints of an accelerator. Knows `save_state` and `load_state`, their hooks, and a run's state."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from ...checkpoints import check_whole, checkpoints_of_loop, discard, settle, step_of, tell_passed, tidy
from ...errors import RMTKDError
from ...surgery.processes import one_for_all, several
from ..checkpoint import STATE, read_process_state, read_state, write_process_state, write_state
from ..failures import NoticeBoard
from ..parts import transforms_state
from ..run import Run
from ..writing import bytes_of, newest_everywhere, written_whole


__all__ = ["LoopCheckpoints", "WholeStates", "random_state", "register_checkpoints", "set_random_state"]


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
        IncompleteCheckpointError: it is not whole; names what is missing, and an intact one beside it.
        RMTKDError: no state of a run there, or that of another model or recipe.
        """
        accelerator, run = self.accelerator, self.run
        with one_for_all(accelerator):
            if not (Path(folder) / STATE).is_file():
                raise RMTKDError(
                    f"{folder} holds no {STATE}: accelerator.save_state wrote it in a script without RMTKDLoop. Load "
                    "a checkpoint of a run with it, or start a new run from that model."
                )
            check_whole(folder)
            values, tensors = read_state(folder)
        self._check_same_step(folder)
        own = read_process_state(folder, accelerator.process_index, accelerator.num_processes)
        run.dropout.restore()  # or the rates of 0 would be taken for the user's
        run.load_state_dict({"values": values, "tensors": tensors | own}, str(folder))
        run.restore_cores()
        self.loaded()

    def _check_same_step(self, folder: str) -> None:
        """On disks of their own, `newest_checkpoint` may have found another one on each machine.

        Raises:
            RMTKDError: it is not of the same step in all processes.
        """
        if not several(self.accelerator):
            return
        from accelerate.utils import gather_object

        steps = gather_object([step_of(folder)])
        if len(set(steps)) > 1:
            raise RMTKDError(
                f"accelerator.load_state({str(folder)!r}): the processes load checkpoints of steps "
                f"{', '.join(map(str, steps))}; expected one of the same step. Name one that all machines have."
            )


class WholeStates:
    """`save_state` and `load_state` of an accelerator, in front of its own: a checkpoint gets its name when all
    processes have written it, older ones are deleted after that, and the newest whole one is loaded."""

    def __init__(self, run: Run, board: NoticeBoard):
        self.run, self.accelerator, self.board = run, run.host.accelerator, board
        self._save, self._load = self.accelerator.save_state, self.accelerator.load_state

    def put_on(self) -> None:
        """From here on the accelerator calls them."""
        self.accelerator.save_state, self.accelerator.load_state = self.save_state, self.load_state

    def take_off(self) -> None:
        """The accelerator has its own again."""
        for name in ("save_state", "load_state"):
            if getattr(vars(self.accelerator).get(name), "__self__", None) is self:
                delattr(self.accelerator, name)

    def save_state(self, output_dir: str | None = None, *positional, **kwargs) -> Path:
        """As the accelerator's own.

        Raises:
            DiskFullError: no room for a checkpoint; the earlier ones are intact.
            RMTKDError: another process failed.
        """
        with self.board.watching():
            return self._save_whole(output_dir, *positional, **kwargs)

    def _save_whole(self, output_dir: str | None, *positional, **kwargs) -> Path:
        accelerator, how = self.accelerator, self.accelerator.project_configuration
        if not how.automatic_checkpoint_naming:
            target = Path(output_dir)
        else:
            target = Path(accelerator.project_dir, "checkpoints", f"checkpoint_{accelerator.save_iteration}")
            if target.exists():  # the accelerator says so
                return self._save(output_dir, *positional, **kwargs)
        with one_for_all(accelerator):
            if accelerator.is_local_main_process:
                tidy(target.parent)
        wanted = bytes_of(self.run.host.model, self.run.host.optimizer)
        with written_whole(target, accelerator, self.board, self.run.host.step, wanted) as folder, _named(how):
            self._save(str(folder), *positional, **kwargs)
        if how.automatic_checkpoint_naming and how.total_limit is not None and accelerator.is_main_process:
            for old in _by_number(target.parent)[: -how.total_limit]:
                discard(old)
        return target

    def load_state(self, input_dir: str | None = None, *positional, **kwargs) -> None:
        """As the accelerator's own.

        Raises:
            RMTKDError: no folder was named, and there is no whole checkpoint of its own naming.
        """
        accelerator = self.accelerator
        with self.board.watching():
            if input_dir is not None:
                with one_for_all(accelerator):  # a run may have been killed while it replaced it
                    settle(Path(input_dir).parent)
            if input_dir is None and accelerator.project_configuration.automatic_checkpoint_naming:
                folder = Path(accelerator.project_dir, "checkpoints")
                found = newest_everywhere(checkpoints_of_loop(folder), accelerator)
                if accelerator.is_main_process:
                    tell_passed(found)
                if found.newest is None:
                    raise RMTKDError(f"accelerator.load_state(): {folder} holds no whole checkpoint of an RMTKDLoop.")
                input_dir = str(found.newest)
            self._load(input_dir, *positional, **kwargs)


@contextmanager
def _named(how: Any) -> Iterator[None]:
    """The folder that is given counts, while this is open."""
    automatic, how.automatic_checkpoint_naming = how.automatic_checkpoint_naming, False
    try:
        yield
    finally:
        how.automatic_checkpoint_naming = automatic


def _by_number(folder: Path) -> list[Path]:
    found = [(int(m[1]), path) for path in folder.iterdir() if (m := re.fullmatch(r"checkpoint_(\d+)", path.name))]
    return [path for _, path in sorted(found)]


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
