"""The end of a script of several processes: what its process group began on the CPU is over before Python is."""

from __future__ import annotations

import atexit
import functools
import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any


__all__ = ["leave_in_order"]


@functools.cache
def leave_in_order() -> None:
    """See to it, once, that the threads of the process group (gloo) end before the interpreter does.

    A thread of gloo that has carried out a collective operation lets go of its tensors, and needs the interpreter for
    that. On a loaded machine it may come to it late: Python (before 3.14) ends a thread that asks for it while it
    shuts down, and C++ takes that for a fault: "terminate called without an active exception", SIGABRT, after all
    work was done and written (pytorch #190489). `destroy_process_group` does not wait for these threads as long as
    anything holds the group, and every DDP wrapper does.

    The group stays as it is until the very end of the script, and beyond where that ends by an exception: another
    process may not come to the operation that this one has begun. Groups of GPUs (nccl) have no such threads. The
    meshes of FSDP2 hold the group beyond the end, where nothing here can let go of it.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        atexit.register(_leave, weakref.ref(dist.group.WORLD))


def _leave(known: Callable[[], Any]) -> None:
    """
    Args:
        known: gives the group, or None once it is gone.
    """
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    group = known()
    if group is None or getattr(sys, "last_value", None) is not None:
        return
    if dist.is_initialized() and dist.group.WORLD is group:
        dist.destroy_process_group()
    for held in gc.get_objects():
        if issubclass(type(held), DistributedDataParallel):
            held.reducer = held.logger = None  # they hold the group, too, out of Python's sight
    for holder in gc.get_referrers(group):
        kept = holder if type(holder) is dict else getattr(holder, "__dict__", None)
        for name in [name for name, value in kept.items() if value is group] if type(kept) is dict else ():
            kept[name] = None
    # `group` is the last reference: whoever lets go of it waits for its threads
