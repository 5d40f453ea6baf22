"""Which ids stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import numpy as np

from ..errors import BudgetError


__all__ = ["Choice", "begun", "choose"]


class Choice:
    """A growing set of ids, closed under what each of them needs.

    Args:
        needs: id -> all ids without which it would not be built.
        limit: how many may stay at most.
    """

    def __init__(self, needs: Callable[[int], set[int]], limit: int):
        self.needs, self.limit = cache(needs), limit
        self.kept: set[int] = set()

    def add(self, ids: Iterable[int], limit: int | None = None) -> None:
        """Those that fit, in this order, each with what it needs."""
        limit = self.limit if limit is None else limit
        for i in ids:
            if i not in self.kept and len(self.kept) < limit:
                fresh = {i, *self.needs(i)} - self.kept
                if len(self.kept) + len(fresh) <= limit:
                    self.kept |= fresh


def begun(
    required: Iterable[int],
    needs: Callable[[int], set[int]],
    rows: int,
    max_size: int | None = None,
    multiple: int = 1,
) -> Choice:
    """What stays in any case, and room for what else `choose` may add. Arguments as there.

    Raises:
        BudgetError: `max_size` has no room for what is required.
    """
    limit = rows if max_size is None else min(rows, max_size)
    if limit < rows:  # else nobody asked for fewer: all that occurs stays
        limit -= limit % multiple
    choice = Choice(needs, rows)
    choice.add(sorted(required))
    least = len(choice.kept)
    if least > limit:
        raise BudgetError(
            f"{least:,} rows stay in any case (special tokens, single characters or bytes, what `always` and the "
            f"config name, and their parts); the table has {rows:,} rows, max_size is {max_size}, pad_to_multiple_of "
            f"{multiple}, which leaves room for {limit:,}. Expected a max_size of "
            f"{-(-least // multiple) * multiple:,} or more."
        )
    choice.limit = limit
    return choice


def choose(
    required: Iterable[int],
    needs: Callable[[int], set[int]],
    counts: np.ndarray,
    second: np.ndarray,
    rows: int,
    *,
    min_count: int = 1,
    second_size: int = 0,
    max_size: int | None = None,
    multiple: int = 1,
) -> np.ndarray:
    """The ids that stay, ascending, int64.

    Args:
        required: ids that stay in any case.
        needs: id -> all ids without which it would not be built.
        counts: how often each id occurs in the texts, (ids of the tokenizer,).
        second: the same in a second corpus.
        rows: of the table; those beyond the tokenizer's ids have no token.
        min_count: an id that occurs less often in the texts goes.
        second_size: so many of the most frequent ids of the second corpus stay as well.
        max_size: no more rows than this, rounded down to a multiple; the rarest go.
        multiple: the number of rows is a multiple of this. What is short of one is made up by the most frequent of
            those that would go, so that each row has its token.

    Raises:
        BudgetError: `max_size` has no room for what is required, or the table has too few rows for a multiple.
    """
    choice = begun(required, needs, rows, max_size, multiple)
    # a stable sort: of equally frequent ids the lower ones, which are the more frequent ones of most vocabularies
    order = np.argsort(-counts, kind="stable")
    choice.add(int(i) for i in order if counts[i] >= min_count)
    other = np.argsort(-second, kind="stable")[:second_size]
    choice.add(int(i) for i in other if second[i] > 0)
    short = -len(choice.kept) % multiple
    if len(choice.kept) + short > rows:
        below = rows - rows % multiple
        cure = f", or a max_size of {below:,}, for which the rarest tokens go" if below else ""
        raise BudgetError(
            f"{len(choice.kept):,} rows stay, and the table has {rows:,}: no multiple of {multiple} lies between. "
            f"Expected a multiple that fits{cure}."
        )
    if short:
        _fill(choice, len(choice.kept) + short, np.argsort(-(counts + second), kind="stable"), rows)
    return np.asarray(sorted(choice.kept), np.int64)


def _fill(choice: Choice, goal: int, order: np.ndarray, rows: int) -> None:
    """Up to `goal` ids: the most frequent of those that went, and then rows without a token."""
    before = -1
    while before != len(choice.kept) < goal:  # what was too much at first, with all that it needs, may fit then
        before = len(choice.kept)
        choice.add(map(int, order), goal)
    choice.add(range(len(order), rows), goal)
