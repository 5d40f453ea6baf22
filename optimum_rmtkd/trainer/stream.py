"""Training data that is iterated, not indexed: rows that are looked at, calibrated on and then trained on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..errors import RMTKDError
from .data import isolated_rng


__all__ = ["Stream", "evaluated_again", "is_stream", "rewindable"]

_END = object()
COMPARED = 8  # rows that tell whether data begins anew: one alone may be there twice


def is_stream(dataset: Any) -> bool:
    """Are its rows iterated over, not indexed?"""
    return isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__")


class Stream:
    """The first rows of an iterable dataset, each read once and kept for the whole run.

    Every cut is calibrated on the same rows. Whether the data begins anew at every `iter()` cannot be known from its
    type; `settle` finds out, and `data` gives back what was read where it does not. Reading is seeded and leaves the
    generators of the training as they were.

    Attributes:
        held: rows read so far, in their order.
        name: of the argument, in errors.
    """

    def __init__(self, dataset: Iterable, seed: int, name: str = "train_dataset"):
        self.dataset, self.held, self.name, self._seed = dataset, [], name, seed
        self._rows: Iterator | None = None
        self._once = False

    def samples(self, wanted: int) -> list:
        """The first `wanted` rows, or as many as there are.

        Raises:
            RMTKDError: not a single one.
        """
        if len(self.held) < wanted:
            with isolated_rng(self._seed):
                self._rows = iter(self.dataset) if self._rows is None else self._rows
                self.held += itertools.islice(self._rows, wanted - len(self.held))
        if not self.held:
            raise RMTKDError(
                f"{self.name} ({type(self.dataset).__name__}) gave no row: it is empty, or a stream that can be "
                "read once and ran dry (an earlier run, or a look at it, has read it). Make a new one."
            )
        return self.held[:wanted]

    def settle(self) -> None:
        """Read a few rows of a new iteration: the first ones again, or, where the data can be read once, the next."""
        first, read = self.samples(1) and _telling(self.held), []
        with isolated_rng(self._seed):
            again = iter(self.dataset)
            self._once = again is self._rows
            while not self._once and len(read) < len(first):
                row = next(again, _END)
                self._once = row is _END or not _same(row, first[len(read)])
                read += [] if row is _END else [row]
        if self._once:
            self.held += read

    @property
    def data(self) -> Any:
        """What to train on: the dataset itself; where it can be read once, the held rows and then the others."""
        if not self._once and isinstance(self.dataset, torch.utils.data.IterableDataset):
            self._rows = None  # with whatever it buffers; a new iteration begins at the first row
            return self.dataset
        return (_SizedRewound if hasattr(self.dataset, "__len__") else _Rewound)(self)

    def rows(self) -> Iterator:
        """All rows, from the first held one on; at the second call what a new iteration of the dataset gives.

        Raises:
            RMTKDError: a new iteration that gives nothing: training goes on, and the stream has ended.
        """
        begun, self._rows = self._rows, None
        if begun is None:
            row = _END
            for row in self.dataset:
                yield row
            if row is _END:
                raise RMTKDError(
                    f"train_dataset ({type(self.dataset).__name__}) can be read once and ran dry before the training "
                    "steps were done. Lower max_steps, give more rows, or a dataset that begins anew at every iter()."
                )
            return
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        yield from self.held[first::step]
        yield from itertools.islice(begun, first, None, step)  # each worker has a copy of the whole rest


def rewindable(dataset: Any, seed: int, name: str, wanted: int = 1) -> Stream:
    """The first rows of the data of a loader that somebody else makes and trains on.

    Args:
        name: of the loader, in errors.

    Raises:
        RMTKDError: they can be read once; not a single row.
    """
    whole = dataset.dataset if type(dataset).__name__ == "IterableDatasetShard" else dataset
    stream = Stream(whole, seed, name)
    stream.samples(wanted)
    stream.settle()
    if stream.data is not whole:
        raise RMTKDError(
            f"{name} reads a {type(whole).__name__} that can be read once: the rows that calibrate the cuts would be "
            "missing in training. Give it a dataset that begins anew at every iter()."
        )
    return stream


def evaluated_again(dataset: Any, seed: int) -> Any:
    """An eval_dataset that can be evaluated on after every stage: its rows, in memory, where it can be read once.

    Raises:
        RMTKDError: not a single row.
    """
    if isinstance(dataset, dict):
        return {name: evaluated_again(single, seed) for name, single in dataset.items()}
    if dataset is None or not is_stream(dataset):
        return dataset
    stream = Stream(dataset, seed, "eval_dataset")
    stream.settle()
    return dataset if stream.data is dataset else list(stream.rows())


class _Rewound(torch.utils.data.IterableDataset):
    """A stream that can be read once, as a dataset that begins with what was read of it."""

    def __init__(self, stream: Stream):
        self.stream = stream

    def __iter__(self) -> Iterator:
        return self.stream.rows()


class _SizedRewound(_Rewound):
    def __len__(self) -> int:
        return len(self.stream.dataset)


def _telling(rows: list) -> list:
    """The first rows, up to one that is unlike the first at least: equal ones tell no iteration from another."""
    unlike = next((number for number, row in enumerate(rows) if not _same(row, rows[0])), len(rows))
    return rows[: max(COMPARED, unlike + 1)]


def _same(one: Any, other: Any) -> bool:
    """Equal values, tensors and arrays entry by entry."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if torch.is_tensor(one):
        whole = not one.is_floating_point()
        alike = one.shape == other.shape and one.dtype == other.dtype
        return alike and bool(torch.equal(one, other) if whole else torch.equal(one.nan_to_num(), other.nan_to_num()))
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other, equal_nan=one.dtype.kind in "fc"))
    if isinstance(one, float):
        return one == other or one != one and other != other
    try:
        return bool(one == other)
    except (TypeError, ValueError, RuntimeError):  # objects with tables or arrays inside
        return False
