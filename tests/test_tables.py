"""Do the quick cases of a table of tests show each row and column?"""

from __future__ import annotations

import pytest

from .tables import covering


@pytest.mark.parametrize("times", [1, 2])
def test_each_row_and_column_with_a_case_has_a_quick_one(times):
    rows, columns = [{}, {"a": 1}, {"b": 2}, {"c": 3}], ["x", "y", "z"]
    without = [(rows[0], "x"), (rows[3], "x"), (rows[2], "x"), (rows[1], "y"), (rows[1], "z")]
    cases = covering(rows, columns, without, times)
    quick = [case.values for case in cases if not case.marks]
    assert len(cases) == 7 and not [case for case in quick if case in without]
    assert all(any(case[0] == row for case in quick) for row in rows)
    assert all(any(case[1] == column for case in quick) for column in columns)
