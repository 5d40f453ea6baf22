from __future__ import annotations

import json
import math

import pytest

from optimum_rmtkd.config import RMTKDConfig
from optimum_rmtkd.errors import BudgetError, RMTKDError
from optimum_rmtkd.trainer.stages import (
    JOURNAL,
    Stage,
    check_target,
    geometric_shares,
    metric_dropped,
    metric_reached,
    narrowest,
    plan_cuts,
    spread_steps,
    stage_table,
    write_journal,
)


def site(name, before, after):
    return {"name": name, "kind": "hidden", "width_before": before, "width_after": after, "edge": 1.0, "rank": after}


def test_rounds_of_a_model_narrowed_before_go_on_from_there():
    shares = geometric_shares(0.9, 2, kept=0.4)
    assert [(1 - s) for s in shares] == pytest.approx([0.2, 0.1])
    assert len(plan_cuts(RMTKDConfig(target_reduction=0.8), 100, kept=0.4)) == 1
    assert len(plan_cuts(RMTKDConfig(target_reduction=0.8), 100)) == 2


def test_geometric_rounds_keep_the_same_share_each():
    shares = geometric_shares(0.8, 3)
    left = [1.0, *(1 - s for s in shares)]
    ratios = [b / a for a, b in zip(left, left[1:], strict=False)]
    assert shares[-1] == 0.8 and ratios == pytest.approx([0.2 ** (1 / 3)] * 3)


@pytest.mark.parametrize(("target", "cuts"), [(0.5, 1), (0.65, 1), (0.66, 2), (0.9, 2)])
def test_rounds_by_default_are_one_up_to_65_percent_and_two_above(target, cuts):
    plan = plan_cuts(RMTKDConfig(target_reduction=target), 100)
    assert len(plan) == cuts and plan[0].step == 0 and plan[-1].target_reduction == target


def test_rounds_without_target_leave_the_edge_to_decide():
    assert [(c.step, c.target_reduction) for c in plan_cuts(RMTKDConfig(rounds=2), 100)] == [(0, None), (30, None)]


def test_flops_rounds_remove_the_same_share_of_what_is_left():
    plan = plan_cuts(RMTKDConfig(target_flops=0.75, rounds=2), 10)
    assert [c.target_flops for c in plan] == pytest.approx([0.5, 0.5])


def test_layerwise_plans_a_cut_for_each_layer_in_order():
    plan = plan_cuts(RMTKDConfig(schedule="layerwise", target_reduction=0.5), 100, [["a"], ["b", "c"], ["d"]])
    assert [c.sites for c in plan] == [("a",), ("b", "c"), ("d",)]
    assert [c.step for c in plan] == [0, 15, 30] and {c.target_reduction for c in plan} == {None}


@pytest.mark.parametrize(
    ("cuts", "steps", "share"), [(1, 1, 0.3), (4, 4, 0.1), (5, 7, 0.01), (12, 1000, 0.3), (3, 9, 1.0)]
)
def test_cuts_start_at_once_and_lie_a_step_apart(cuts, steps, share):
    at = spread_steps(cuts, steps, share)
    assert at[0] == 0 and at[-1] < steps and all(b > a for a, b in zip(at, at[1:], strict=False))


def test_more_cuts_than_steps_are_refused():
    with pytest.raises(RMTKDError, match="5 cuts in 4 training steps"):
        spread_steps(5, 4, 0.3)


def test_a_model_that_meets_its_target_is_refused():
    with pytest.raises(BudgetError, match=r"has 40 parameters, 60\.0% less than the 100.*at most 50"):
        check_target(RMTKDConfig(target_reduction=0.5), 40, 100)
    check_target(RMTKDConfig(target_reduction=0.5), 51, 100)
    check_target(RMTKDConfig(), 40, 100)


def test_metric_rules_know_their_direction():
    assert metric_reached(0.9, 1.0, 0.9, True) and not metric_reached(0.89, 1.0, 0.9, True)
    assert metric_reached(1.1, 1.0, 0.9, False) and not metric_reached(1.2, 1.0, 0.9, False)
    assert metric_dropped(0.7, 0.8, 0.05, True) and not metric_dropped(0.76, 0.8, 0.05, True)
    assert metric_dropped(0.9, 0.8, 0.05, False) and not metric_dropped(0.1, 0.8, 0.05, False)
    assert metric_dropped(float("nan"), 0.8, 0.05, True)


def test_narrowest_site():
    assert narrowest([site("a", 32, 16), site("b", 64, 8)]) == ("b", 0.125)
    assert narrowest([]) is None


def test_record_and_journal_are_json_both_ways(tmp_path):
    stage = Stage(0, 3, ({**site("a", 4, 2), "edge": math.inf},), 10, 5, metric_after=math.nan, status="accepted")
    write_journal(tmp_path, [stage], RMTKDConfig(), 10, 5)
    journal = json.loads((tmp_path / JOURNAL).read_text())
    assert journal["reduction"] == 0.5 and journal["stages"][0]["sites"][0]["edge"] is None
    assert [f.name for f in tmp_path.iterdir()] == [JOURNAL]
    again = Stage.from_dict(journal["stages"][0])
    assert again.metric_after is None and again.sites[0]["width_after"] == 2 and again.accepted


def test_table_counts_reductions_from_the_uncut_model():
    rows = stage_table(
        [Stage(0, 0, (), 100, 50, metric_name="eval_loss"), Stage(1, 9, (), 50, 25, reason="why")]
    ).splitlines()
    assert "eval_loss" in rows[0] and "50.0%" in rows[1] and "75.0%" in rows[2] and "open (why)" in rows[2]
