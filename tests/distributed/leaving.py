"""The end of a launched script."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path

from accelerate import PartialState


def leave(accelerator):
    """Together, or the first process to go takes down the connections of the others."""
    accelerator.wait_for_everyone()
    PartialState().destroy_process_group()


def threads() -> set[str]:
    """Names of the threads of this process (Linux; none elsewhere)."""
    return {name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")}


@atexit.register  # of those that are registered, the first one comes last
def _alone():
    """A thread of gloo that outlives the interpreter may abort the process, on a loaded machine: see
    `surgery.leaving`."""
    left = {name for name in threads() if "gloo" in name}
    if left and getattr(sys, "last_value", None) is None:
        print(f"Threads outlive the script: {', '.join(sorted(left))}.", file=sys.stderr, flush=True)
        os._exit(70)
