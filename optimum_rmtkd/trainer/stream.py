"""Training data that is iterated, not indexed: rows that are looked at, calibrated on and then trained on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..errors import RMTKDError
from .data import isolated_rng


__all__ = ["Stream", "is_stream"]

_END = object()


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
    """

    def __init__(self, dataset: Iterable, seed: int):
        self.dataset, self.held, self._seed = dataset, [], seed
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
                f"train_dataset ({type(self.dataset).__name__}) gave no row: it is empty, or a stream that can be "
                "read once and ran dry (an earlier run, or a look at it, has read it). Make a new one."
            )
        return self.held[:wanted]

    def settle(self) -> None:
        """Read one row of a new iteration: the first one again, or, where the data can be read once, the next."""
        with isolated_rng(self._seed):
            row = next(iter(self.dataset), _END)
        self._once = not _same(row, self.samples(1)[0])
        if self._once and row is not _END:
            self.held.append(row)

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
        yield from self.held if worker is None else self.held[worker.id :: worker.num_workers]
        yield from begun


class _Rewound(torch.utils.data.IterableDataset):
    """A stream that can be read once, as a dataset that begins with what was read of it."""

    def __init__(self, stream: Stream):
        self.stream = stream

    def __iter__(self) -> Iterator:
        return self.stream.rows()


class _SizedRewound(_Rewound):
    def __len__(self) -> int:
        return len(self.stream.dataset)


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
        return one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    return bool(one == other)
