"""Tables of tests: all combinations, of which the quick suite takes those that show each row and each column."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any

import pytest


__all__ = ["SLOW", "covering", "some_slow"]

SLOW = partial(pytest.param, marks=pytest.mark.slow)  # one case of a table


def some_slow(cases: Iterable[Any], quick: Collection[Any]) -> list:
    """The cases of a table as parameters; those that are not among the quick ones are slow."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    chosen = [case if isinstance(case, tuple) else (case,) for case in quick]
    assert all(case in values for case in chosen), "a quick case is none of the table"
    return [pytest.param(*case) if case in chosen else SLOW(*case) for case in values]


def covering(rows: Sequence[Any], columns: Sequence[Any], without: Collection[tuple[Any, Any]] = (), times: int = 1):
    """(row, column) for all of them but some, so that each row and column that has a case is in a quick one; `times`
    times, as far as those are none of the left out."""
    table = [(row, column) for row in rows for column in columns if (row, column) not in without]
    count = max(len(rows), len(columns))
    diagonals = [
        (rows[i % len(rows)], columns[(i + shift * count // times) % len(columns)])
        for shift in range(times)
        for i in range(count)
    ]
    quick = [case for case in diagonals if case not in without]
    for side in (0, 1):  # where all that lie on the diagonals are left out
        for case in table:
            if not any(case[side] == other[side] for other in quick):
                quick.append(case)
    return some_slow(table, quick)
