"""Several processes that cut one model: data shared out, decisions made once, failures told to all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..batches import Store, to_device
from ..errors import RMTKDError
from .leaving import leave_in_order


__all__ = ["all_batches", "broadcast_model", "from_main", "one_for_all", "several", "share_of"]


def several(accelerator: Any) -> bool:
    """Whether there is more than one process."""
    return accelerator is not None and accelerator.num_processes > 1


def share_of(samples: int, accelerator: Any) -> int:
    """How many of all samples one process looks at, rounded up."""
    return -(-samples // accelerator.num_processes) if several(accelerator) else samples


@contextlib.contextmanager
def one_for_all(accelerator: Any) -> Iterator[None]:
    """What fails in one process fails in all, at the end of this context: nobody waits for a process that is gone.

    No collective operation may stand inside, or the processes that are well would wait in it.

    Raises:
        RMTKDError: another process failed; names it and its error. A process's own error is raised as it is.
    """
    if several(accelerator):
        leave_in_order()  # here begins what we do together
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if several(accelerator):
        from accelerate.utils import gather_object

        told = gather_object([None if failure is None else f"{type(failure).__name__}: {failure}"])
        broken = [f"process {rank}: {text}" for rank, text in enumerate(told) if text is not None]
        if failure is None and broken:
            raise RMTKDError(f"Another process failed, so all stop. {broken[0]}")
    if failure is not None:
        raise failure


def from_main(value: Any, accelerator: Any) -> Any:
    """The value that the main process has: equal moments could still round to different widths."""
    if not several(accelerator):
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value], from_process=0)[0]


def all_batches(batches: Sequence[dict[str, Any]], device: torch.device, accelerator: Any) -> Sequence[dict[str, Any]]:
    """The batches of all processes, rank after rank: the refit runs where all data are. They travel one by one, so
    that no process holds more of them in memory than its `Store` does."""
    if not several(accelerator):
        return batches
    from accelerate.utils import broadcast_object_list, gather_object

    counts, gathered, failure = gather_object([len(batches)]), Store(device), None
    for rank, count in enumerate(counts):
        mine = rank == accelerator.process_index
        for index in range(count):
            sent = broadcast_object_list([to_device(batches[index], "cpu") if mine else None], from_process=rank)
            try:
                gathered.append(sent[0])
            except RMTKDError as error:  # a full disk: the others would wait for the next batch
                failure = error
    with one_for_all(accelerator):
        if failure is not None:
            raise failure
    return gathered


def broadcast_model(student: nn.Module, projections: dict[str, torch.Tensor], accelerator: Any) -> None:
    """Weights of the main process to all others, bit for bit. Every process has fitted the same data; this removes
    what rounding may have made of it."""
    if not several(accelerator):
        return
    from accelerate.utils import broadcast

    with torch.no_grad():
        for tensor in (*student.state_dict().values(), *projections.values()):
            tensor.copy_(broadcast(tensor, from_process=0))
