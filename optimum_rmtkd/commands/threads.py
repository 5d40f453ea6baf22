"""CPU threads of a command: as many as it was given, and a word where the machine is busy."""

from __future__ import annotations

import logging
import os
from pathlib import Path


__all__ = ["THREADS", "cores", "use_threads"]

logger = logging.getLogger(__name__)

THREADS = "CPU threads. None: OMP_NUM_THREADS, else the cores that this process may use."
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container, cgroup v2
BUSY = 0.5  # runnable processes of others for each core


def cores(quota: Path = QUOTA) -> int:
    """Cores that this process may use: those it is bound to, and no more than its container's share of time."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        used, period = quota.read_text(encoding="ascii").split()
    except (OSError, ValueError):  # no container, or another system
        return bound
    return bound if used == "max" else max(1, min(bound, round(int(used) / int(period))))


def use_threads(threads: int | None) -> None:
    """Set torch's CPU threads, for training and surgery alike.

    The number never follows the load: sums depend on it in their last digits, and a run that goes on after a break
    must go on as it began. A busy machine is only mentioned: threads that wait for one another at every layer are
    several times slower where a core is shared.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), cores()))
    used = torch.get_num_threads()
    if threads is not None or used == 1 or torch.cuda.is_available() or not hasattr(os, "getloadavg"):
        return
    load = os.getloadavg()[0]
    if load > BUSY * cores():
        logger.warning(
            "The machine is busy (load %.1f, %d cores), and %d threads wait for one another at every layer: "
            "--threads 1 may be several times as fast.",
            load,
            cores(),
            used,
        )
