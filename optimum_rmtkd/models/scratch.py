"""Tensors that lie in files, for models and sums that memory has no room for.

A tensor of a `Scratch` is mapped from a file (mmap, shared): it is read and written as any other, and the system holds
in memory what is in use. `Scratch.release` gives back what this process holds of all of them; the values stay in the
files.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from ..errors import DiskFullError, RMTKDError


__all__ = ["Scratch", "in_files", "released", "scratch_for"]

LEAST = 2**16  # bytes under which a tensor stays in memory
SMALLEST, LARGEST = 2**24, 2**29  # bytes of a file; each keeps a descriptor open, of which a process has a thousand
ALIGNED = 64  # bytes, as torch aligns its own


class Scratch:
    """Where tensors are put that are to lie in files without a name, which are gone with the last of their tensors.

    Args:
        folder: on a disk with room. None: the folder for temporary files, which TMPDIR names.

    Raises:
        RMTKDError: there is no such folder.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = Path(tempfile.gettempdir() if folder is None else folder)
        if not self.folder.is_dir():
            raise RMTKDError(f"{self.folder} is no folder: expected one on a disk with room for copies of the model.")
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._current: mmap.mmap | None = None
        self._used = self._made = 0

    def part(self) -> Scratch:
        """Another one in the same folder, for tensors that go at the same time: the files of those that stay are not
        theirs. `release` of either is of both."""
        other = Scratch(self.folder)
        other._maps = self._maps
        return other

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """On the host.

        Raises:
            DiskFullError: the disk has no room for it.
        """
        count = math.prod(shape)
        size = count * dtype.itemsize
        if size < LEAST:
            return torch.zeros(tuple(shape), dtype=dtype)
        if self._current is None or self._used + size > len(self._current):
            self._current, self._used = self._file(max(size, min(LARGEST, max(SMALLEST, self._made)))), 0
        found = torch.frombuffer(self._current, dtype=dtype, count=count, offset=self._used)
        self._used += -(-size // ALIGNED) * ALIGNED
        return found.view(tuple(shape))

    def keep(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A copy, of another dtype where one is given."""
        return self.zeros(tensor.shape, dtype or tensor.dtype).copy_(tensor.detach())

    def release(self) -> None:
        """Give back the memory of all that is mapped; what is used after it is read from the file again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in list(self._maps):
                mapped.madvise(mmap.MADV_DONTNEED)

    def _file(self, size: int) -> mmap.mmap:
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        with tempfile.TemporaryFile(buffering=0, prefix="rmtkd-", dir=self.folder) as file:
            try:
                # reserved now: a disk that is full when a page is written would end the process
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    for at in range(0, size, SMALLEST):
                        file.write(bytes(min(SMALLEST, size - at)))
            except OSError as error:
                raise DiskFullError(
                    f"{size:,} bytes could not be reserved in {str(self.folder)!r} ({error}): expected a disk with "
                    "room for copies of the model and the moments of all its sites. Name another folder."
                ) from error
            mapped = mmap.mmap(file.fileno(), size)
        self._maps.add(mapped)
        self._made += size
        return mapped


def in_files(model: nn.Module, scratch: Scratch) -> nn.Module:
    """`model`, in place, its parameters put into `scratch`, one after the other; tied ones stay so. Those on the meta
    device become zeros."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in made:
                data = scratch.zeros(old.shape, old.dtype) if old.is_meta else scratch.keep(old)
                made[id(old)] = nn.Parameter(data, old.requires_grad)
                scratch.release()
            module._parameters[name] = made[id(old)]
    return model


def scratch_for(model: nn.Module, folder: str | Path | Scratch | None) -> Scratch | None:
    """A `Scratch` in `folder`; None without one.

    Raises:
        RMTKDError: a model that is not on the host.
    """
    if folder is None:
        return None
    places = {p.device.type for p in model.parameters()} if isinstance(model, nn.Module) else set()
    if away := sorted(places - {"cpu", "meta"}):  # empty weights are refused as such
        raise RMTKDError(
            f"scratch={str(folder)!r} and a model on {away[0]}: files are mapped into the memory of the host. Move it "
            "there, model.to('cpu'), or leave `scratch` out."
        )
    return folder if isinstance(folder, Scratch) else Scratch(folder)


@contextlib.contextmanager
def released(scratch: Scratch | None, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context what was read before one of these modules runs is given back when it does."""
    modules = () if scratch is None else modules
    handles = [module.register_forward_pre_hook(lambda *_: scratch.release()) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
