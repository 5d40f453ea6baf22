"""Sums of tensors over processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


__all__ = ["sum_over_processes"]


def sum_over_processes(target: Any) -> Callable[[Tensor], Tensor] | None:
    """A function that sums a tensor over processes, or None when there is one process only."""
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    accelerator = target if hasattr(target, "num_processes") else None
    if accelerator is not None and (accelerator.num_processes == 1 or not ready):
        return None if accelerator.num_processes == 1 else lambda t: accelerator.reduce(t, reduction="sum")
    group = None if accelerator is not None else target
    if not ready or distributed.get_world_size(group) == 1:
        return None

    def reduce(tensor: Tensor) -> Tensor:
        # NCCL takes tensors of its own device only, while the sums may live on the CPU.
        on_gpu = distributed.get_backend(group) == "nccl"
        moved = tensor.to(torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu").contiguous().clone()
        distributed.all_reduce(moved, group=group)
        return moved.to(tensor.device)

    return reduce
