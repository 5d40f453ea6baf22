"""Which ids stay: counts, closures, limits, multiples."""

from __future__ import annotations

import numpy as np
import pytest

from optimum_rmtkd.errors import BudgetError
from optimum_rmtkd.vocabulary.choice import choose


NONE = np.zeros(10, np.int64)
COUNTS = np.array([0, 0, 9, 1, 5, 5, 0, 2, 0, 7])


def needs(i: int) -> set[int]:
    """9 is made of 6 and 7, 7 of 6."""
    return {9: {6, 7}, 7: {6}}.get(i, set())


def chosen(**options) -> list[int]:
    given = {"required": [0], "needs": needs, "counts": COUNTS, "second": NONE, "rows": 12} | options
    return choose(**given).tolist()


def test_what_occurs_stays_with_its_parts():
    assert chosen() == [0, 2, 3, 4, 5, 6, 7, 9]
    assert chosen(min_count=5) == [0, 2, 4, 5, 6, 7, 9]
    assert chosen(min_count=100, required=[7]) == [6, 7]


def test_the_rarest_go_first_and_an_equal_count_prefers_the_lower_id():
    assert chosen(max_size=2) == [0, 2]
    assert chosen(max_size=4) == [0, 2, 4, 5]  # 9 needs three rows, 4 and 5 one each
    assert chosen(max_size=5) == [0, 2, 6, 7, 9]


def test_the_most_frequent_of_a_second_corpus_stay_behind_those_of_the_first():
    second = np.array([0, 8, 0, 0, 0, 0, 0, 0, 4, 0])
    assert chosen(second=second, second_size=1) == [0, 1, 2, 3, 4, 5, 6, 7, 9]
    assert chosen(second=second, second_size=5) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert chosen(second=second, second_size=5, max_size=2) == [0, 2]


def test_a_multiple_is_filled_up_with_what_would_go_and_never_exceeds_the_limit():
    assert chosen(multiple=3) == [0, 1, 2, 3, 4, 5, 6, 7, 9]
    assert chosen(multiple=4, max_size=7, min_count=9) == [0, 2, 4, 5]
    assert len(chosen(multiple=4, max_size=11)) == 8
    assert chosen(multiple=6, max_size=11) == [0, 2, 4, 6, 7, 9]  # 3 and 5 would have made it eight
    assert chosen(multiple=12) == list(range(12))  # two rows have no token


def test_a_limit_below_what_must_stay_is_refused():
    with pytest.raises(BudgetError, match="3 rows stay in any case .* max_size of 3 or more"):
        chosen(required=[9], max_size=2)
    with pytest.raises(BudgetError, match="8 rows stay, and the table has 12.*max_size of 7, for which the rarest"):
        chosen(multiple=7)  # rounding down would lose what occurs
    with pytest.raises(BudgetError, match="no multiple of 16 lies between. Expected a multiple that fits"):
        chosen(multiple=16)
