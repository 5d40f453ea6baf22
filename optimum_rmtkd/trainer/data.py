"""Calibration batches, and the isolation of random numbers that keeps resumed runs bit-exact."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


__all__ = ["CalibrationBatches", "calibration_indices", "is_hf_dataset", "isolated_rng", "pick_samples"]


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed python, numpy and torch inside, put their states back outside.

    A cut, or an evaluation of ours, must not advance the generators of the training: a run resumed after it would draw
    other numbers than the uninterrupted one.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def calibration_indices(total: int, wanted: int, seed: int) -> list[int]:
    """The first `wanted` indices of a seeded shuffle of range(total): the same on every process and in every run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[:wanted].tolist()


class CalibrationBatches:
    """Collated batches of this process, the same ones in every pass.

    The samples are cut into chunks before the processes share them out (process r takes chunks r, r + n, ...), and
    each chunk is collated under its own seed: the union over the processes is the same for any number of them, random
    collators (masking, augmentation) included.

    Args:
        samples: sequence of dataset items.
        collate: list of items -> batch.
        batch_size: at most this many samples a batch; fewer where a process would otherwise get nothing.
        prepare: puts a batch on the device.
    """

    def __init__(
        self,
        samples: Sequence[Any],
        collate: Callable[[list], dict],
        batch_size: int,
        *,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        prepare: Callable[[dict], dict] = lambda batch: batch,
    ):
        self.batch_size = max(1, min(batch_size, len(samples) // num_processes))
        starts = range(0, len(samples), self.batch_size)
        self._starts = [(number, start) for number, start in enumerate(starts)][process_index::num_processes]
        self._samples, self._collate, self._prepare, self._seed = samples, collate, prepare, seed

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def dataset(self) -> Sequence[Any]:
        """The rows, as a DataLoader calls them."""
        return self._samples

    def __iter__(self) -> Iterator[dict]:
        for number, start in self._starts:
            stop = min(start + self.batch_size, len(self._samples))
            # Closed before the yield: the caller's own random numbers stay the caller's.
            with isolated_rng(self._seed + number):
                batch = self._collate([self._samples[i] for i in range(start, stop)])
            yield self._prepare(batch)


def pick_samples(dataset: Any, wanted: int, seed: int) -> Sequence[Any]:
    """A seeded choice of `wanted` samples of an indexed dataset."""
    return torch.utils.data.Subset(dataset, calibration_indices(len(dataset), wanted, seed))


def is_hf_dataset(dataset: Any) -> bool:
    """Does the dataset name its columns, so that unused ones can be dropped before they are read?"""
    from transformers.utils import is_datasets_available

    if not is_datasets_available():
        return False
    import datasets

    return isinstance(dataset, (datasets.Dataset, datasets.IterableDataset))
