"""The end of a launched script."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType


def wait(accelerator):
    """Go together, or the first process to go takes down the connections of the others."""
    accelerator.wait_for_everyone()


def leave(accelerator):
    """The same, and end the group as `Accelerator.end_training` does. The meshes of FSDP2 hold the group until the
    process is gone, and with it the threads of gloo: there they may outlive the script. So do the groups of DeepSpeed,
    whose scripts end without a goodbye."""
    wait(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    if getattr(accelerator, "is_fsdp2", False):
        atexit.unregister(_alone)
    PartialState().destroy_process_group()


def threads() -> set[str]:
    """Names of the threads of this process (Linux; none elsewhere)."""
    names = set()
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has ended since
            names.add(path.read_text().strip())
    return names


@atexit.register  # of those that are registered, the first one comes last
def _alone():
    """A thread of gloo that outlives the interpreter may abort the process, on a loaded machine: see
    `surgery.leaving`."""
    until = time.monotonic() + 5  # the system still lists a thread for a moment that has been waited for
    while any("gloo" in name for name in threads()) and time.monotonic() < until:
        time.sleep(0.05)
    if getattr(sys, "last_value", None) is None and any("gloo" in name for name in threads()):
        print(f"Threads outlive the script: {', '.join(sorted(threads()))}.", file=sys.stderr, flush=True)
        os._exit(70)
