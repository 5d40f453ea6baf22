"""The learning rate of a distillation: a band that follows cut and steps, and what becomes of a rate outside."""

from __future__ import annotations

import itertools
import math

import pytest

from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.trainer.rates import CEILING, FLOOR, Rate, distil_rate, few_steps, fit_pace, rate_band, warmup_steps


REMOVED = (0.01, 0.3, 0.5, 0.63, 0.8, 0.9, 0.97, 0.999)
STEPS = (1, 5, 64, 171, 512, 2105, 6315, 10**6)
CASES = list(itertools.product(REMOVED, STEPS))


# Removed, steps of the stage, the rate that it began with and ended best, rates that did harm: docs/guides/rates.md
MEASURED = [
    (0.68, 58, 3e-5, (1e-4, 3e-4)),  # 1.1 points below the accuracy just after the cut; 5.3; 8.6
    (0.8, 64, 3e-5, (1e-4, 3e-4)),  # 0.2; 1.2; 6.0
    (0.8, 2210, 2.1e-4, ()),  # second stage of a run that lost 0.6 points
    (0.8, 2105, 1.6e-4, ()),  # one cut of SST-2: 0.5
    (0.9, 2105, 1.6e-4, ()),  # the same: 2.0
    (0.8, 512, 1e-4, (3e-5, 3e-4)),  # 1.4 points below the teacher; 1.8; 3.7
    (0.63, 2105, 1e-4, (3e-4,)),  # 0.0; 1.0
]


@pytest.mark.parametrize(("removed", "steps", "good", "bad"), MEASURED)
def test_the_band_holds_what_was_measured_to_end_well_and_not_what_did_harm(removed, steps, good, bad):
    low, high = rate_band(removed, steps)
    assert low <= good * 1.1 and good / 1.1 <= high
    assert not any(low <= rate <= high for rate in bad)


@pytest.mark.parametrize("given", [2e-5, 5e-5, 1e-4, 3e-4, 1e-3])
@pytest.mark.parametrize(("removed", "steps"), CASES)
def test_every_rate_ends_inside_the_band_as_near_as_it_can(given, removed, steps):
    low, high = rate_band(removed, steps)
    rate = distil_rate(given, removed, steps)
    assert low <= rate.value <= high
    nearest = min((low, high), key=lambda border: abs(math.log(border / given)))
    assert rate.value == (given if low <= given <= high else nearest)


@pytest.mark.parametrize(("removed", "steps"), CASES)
def test_the_band_is_neither_empty_nor_outside_of_its_limits(removed, steps):
    low, high = rate_band(removed, steps)
    assert FLOOR <= low <= high <= CEILING


def test_more_steps_and_larger_cuts_never_lower_the_band():
    for removed in REMOVED:
        bands = [rate_band(removed, steps) for steps in STEPS]
        assert bands == sorted(bands) and bands[0][1] < bands[-1][1]
    for steps in STEPS[2:-1]:
        bands = [rate_band(removed, steps) for removed in REMOVED]
        assert bands == sorted(bands) and bands[0][1] < bands[-1][1]


def test_four_times_the_steps_stand_twice_the_rate():
    low, high = rate_band(0.8, 500)
    assert rate_band(0.8, 2000) == pytest.approx((2 * low, min(2 * high, CEILING)))


def test_the_log_line_says_which_rate_was_used_and_why():
    kept, raised, lowered = (distil_rate(given, 0.8, 512).why for given in (1e-4, 2e-5, 1e-3))
    assert "0.0001 as given" in kept
    assert "instead of 2e-05" in raised and "lowest" in raised and "distil_learning_rate=2e-05" in raised
    assert "instead of 0.001" in lowered and "highest" in lowered
    for line in (kept, raised, lowered):
        assert "80%" in line and "512 steps" in line and "\n" not in line


def test_a_rate_of_zero_trains_nothing():
    assert distil_rate(0.0, 0.8, 512) == Rate(0.0, "learning rate 0: nothing is trained")


@pytest.mark.parametrize("removed", [0.0, 1.0, -0.1, 80, math.nan])
def test_a_share_outside_of_its_range_is_refused(removed):
    with pytest.raises(RMTKDError, match="removed"):
        rate_band(removed, 100)


@pytest.mark.parametrize("given", [-1e-4, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(given):
    with pytest.raises(RMTKDError, match="learning rate"):
        distil_rate(given, 0.8, 100)


@pytest.mark.parametrize("check", [warmup_steps, lambda steps: rate_band(0.8, steps)])
def test_no_steps_are_refused(check):
    with pytest.raises(RMTKDError, match="at least 1"):
        check(0)


def test_a_warm_up_is_short_and_leaves_most_of_the_stage():
    assert [warmup_steps(steps) for steps in (1, 2, 10, 100, 1000, 10**5)] == [0, 1, 5, 6, 60, 200]
    counts = [warmup_steps(steps) for steps in range(1, 5000)]
    assert counts == sorted(counts) and all(count <= steps / 2 for steps, count in enumerate(counts, 1))


def test_few_steps_after_a_large_cut_are_said_to_be_few():
    assert "138 steps are few" in few_steps(0.8, 138) and "80% of the parameters" in few_steps(0.8, 138)
    assert few_steps(0.8, 511) and not few_steps(0.8, 512) and not few_steps(0.5, 64)


def test_a_fit_of_few_steps_is_longer_and_quicker():
    assert fit_pace(6315) == fit_pace(1250) == (0.4, 1.0)
    assert fit_pace(345) == fit_pace(1) == (0.6, pytest.approx(1.5))
    assert fit_pace(1000) == (0.5, 1.25)
    with pytest.raises(RMTKDError, match="at least 1"):
        fit_pace(0)
