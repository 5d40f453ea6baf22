"""Values made of tensors that are needed again and again, in memory that does not grow with their number."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from accelerate.utils import recursively_apply

from ..errors import RMTKDError
from .reading import to_device


__all__ = ["Store"]

HELD = 8 * 2**20  # bytes of tensors that a store holds in memory; a small run never touches the disk


@dataclass(frozen=True)
class _Slot:
    """Where in the file a tensor lies."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Store(Sequence):
    """Batches (or other mappings and sequences of tensors), to be read as often as one likes, in any order.

    The first `held` bytes of tensors stay in the memory of the host, the others go into a file without a name in the
    folder for temporary files, which is gone with the store. What is read is a copy, on `device`. Everything but
    tensors stays in memory as it is.

    Args:
        device: of the tensors that are read. None: the host.
        held: bytes; None: HELD.
    """

    def __init__(self, device: torch.device | str | None = None, values: Iterable[Any] = (), held: int | None = None):
        self.device, self.held = torch.device("cpu" if device is None else device), HELD if held is None else held
        self._values: list[Any] = []
        self._file: BinaryIO | None = None
        self._end = 0
        for value in values:
            self.append(value)

    def append(self, value: Any) -> None:
        """Keep a value; its tensors are copied only where they go to the file, or come from another device.

        Raises:
            RMTKDError: the file cannot be written: says where it is and how much was to be written.
        """
        self._values.append(recursively_apply(self._kept, value))

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return _Part(self, range(len(self))[index])
        value = recursively_apply(
            self._read, self._values[index], test_type=lambda x: isinstance(x, (torch.Tensor, _Slot))
        )
        return value if self.device.type == "cpu" else to_device(value, self.device)

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor | _Slot:
        size = tensor.numel() * tensor.element_size()
        if size <= self.held:
            self.held -= size
            # a view would keep alive what it is a part of
            return (
                tensor.detach().cpu() if tensor.untyped_storage().nbytes() <= size else tensor.detach().cpu().clone()
            )
        slot = _Slot(self._end, tuple(tensor.shape), tensor.dtype)
        self._write(tensor.detach().cpu().contiguous(), size)
        return slot

    def _write(self, tensor: torch.Tensor, size: int) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0, prefix="rmtkd-")  # noqa: SIM115
            self._file.seek(self._end)
            rest = memoryview(_bytes(tensor).numpy())
            while len(rest):
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise RMTKDError(
                f"Activations of the calibration data are kept in a temporary file, and {size:,} bytes behind "
                f"{self._end:,} could not be written in {tempfile.gettempdir()!r} ({error}): expected a folder with "
                "room. Let the environment variable TMPDIR name one, or lower calibration_samples."
            ) from error
        self._end += size

    def _read(self, slot: _Slot | torch.Tensor) -> torch.Tensor:
        if isinstance(slot, torch.Tensor):
            return slot.clone()
        tensor = torch.empty(slot.shape, dtype=slot.dtype)
        rest = memoryview(_bytes(tensor).numpy())
        self._file.seek(slot.offset)
        while len(rest):
            rest = rest[self._file.readinto(rest) :]
        return tensor


class _Part(Sequence):
    """Some of the values of a store, in the order of `chosen`."""

    def __init__(self, store: Store, chosen: range):
        self.store, self.chosen = store, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int | slice) -> Any:
        found = self.chosen[index]
        return _Part(self.store, found) if isinstance(index, slice) else self.store[found]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor of any dtype, (size in bytes,) uint8."""
    return tensor.reshape(-1).view(torch.uint8)
