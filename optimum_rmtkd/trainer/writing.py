"""How several processes write one checkpoint: each its part, beside the place; the name comes when all are done. And
which one all of them can go on from.

Knows processes and folders; no trainer, no loop, no run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints import Found, begin, fault_of, first_whole, pending_place, put_in_place
from ..disks import check_room, full_disk_named
from ..locks import let_go
from ..surgery.processes import from_main, one_for_all, several
from .failures import NoticeBoard
from .swap import outline


__all__ = ["bytes_of", "newest_everywhere", "written_whole"]


@contextmanager
def written_whole(
    target: str | Path,
    accelerator: Any,
    board: NoticeBoard,
    step: int,
    wanted: int = 0,
    sealed: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """Yield the folder in which all processes write the checkpoint that becomes `target` at the end of the block, if
    it went well in all of them; else it is removed, and all of them fail.

    Where machines share no disk, each has its own part under the same name.

    Args:
        board: where a process that fails says so. In the block there may be collective operations.
        step: of the run.
        wanted: bytes that it will have, at least.
        sealed: called by whoever names it, just before.

    Raises:
        DiskFullError: the disk has no room for it, before or while it is written.
        RMTKDError: another run writes there, or another process failed.
    """
    target = Path(target)
    main = accelerator.is_main_process
    local = accelerator.is_local_main_process and not main  # on another machine
    what = f"Checkpoint {target.name}"
    lock, begun = None, False
    try:
        for leads in (main, local):  # the main process first: on a shared disk it has made the folder
            with one_for_all(accelerator):
                if leads and (main or not pending_place(target).is_dir()):
                    lock, begun = begin(target), True
                    check_room(target.parent, wanted, f"checkpoint {target.name}")
        with board.together(), full_disk_named(target.parent, what):
            yield pending_place(target)
        for leads in (main, local):
            with one_for_all(accelerator), full_disk_named(target.parent, what):
                if leads and pending_place(target).is_dir():
                    put_in_place(target, step, sealed)
    except BaseException:
        if begun:
            shutil.rmtree(pending_place(target).parent, ignore_errors=True)
        raise
    finally:
        let_go(lock)


def newest_everywhere(paths: Sequence[Path], accelerator: Any) -> Found:
    """The newest of several checkpoints that is whole for every process: a run may have been killed when one machine
    had given it its name on its own disk, and another one had not yet. Collective.

    Args:
        paths: newest first; those of the main process count.
    """

    def fault_anywhere(path: Path) -> str | None:
        looks = accelerator.is_main_process or accelerator.is_local_main_process
        fault = fault_of(path) if looks else None
        if not several(accelerator):
            return fault
        from accelerate.utils import gather_object

        told = {rank: fault for rank, fault in enumerate(gather_object([fault])) if fault is not None}
        return next((fault if rank == 0 else f"process {rank}: {fault}" for rank, fault in told.items()), None)

    return first_whole(from_main(paths, accelerator), fault_anywhere)


def bytes_of(model: nn.Module, optimizer: Any) -> int:
    """What weights and optimizer take on a disk, at least: tensors that several names share once."""
    state = getattr(optimizer, "state", None) or {}
    tensors = [*outline(model).parameters(), *model.buffers()]
    held = [values for values in state.values() if isinstance(values, Mapping)]
    tensors += [value for values in held for value in values.values() if torch.is_tensor(value)]
    return sum(
        tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in tensors}.values()
    )
