from __future__ import annotations

import json
import math
import re

import pytest

from optimum_rmtkd.config import RMTKDConfig
from optimum_rmtkd.errors import BudgetError, RMTKDError
from optimum_rmtkd.hub.measures import of_quality
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
    plan = plan_cuts(RMTKDConfig(target_reduction=0.9, rounds=2), 100, kept=0.4)
    assert [cut.target_reduction for cut in plan] == pytest.approx([0.8, 0.9])


def test_geometric_rounds_keep_the_same_share_each():
    shares = geometric_shares(0.8, 3)
    left = [1.0, *(1 - s for s in shares)]
    ratios = [b / a for a, b in zip(left, left[1:], strict=False)]
    assert shares[-1] == 0.8 and ratios == pytest.approx([0.2 ** (1 / 3)] * 3)


@pytest.mark.parametrize("target", [0.5, 0.9])
@pytest.mark.parametrize(("rounds", "cuts"), [(None, 1), (1, 1), (2, 2)])
def test_one_cut_reaches_the_target_unless_more_rounds_are_asked_for(target, rounds, cuts):
    plan = plan_cuts(RMTKDConfig(target_reduction=target, rounds=rounds), 100)
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


MEASURED = {
    "metric_name": "eval_accuracy",
    "metric_before": 0.9,
    "metric_cut": 0.6,
    "metric_after": 0.88,
    "metrics_before": {"eval_loss": 0.3, "eval_accuracy": 0.9, "eval_f1": 0.91},
    "metrics_cut": {"eval_loss": 0.8, "eval_accuracy": 0.6, "eval_f1": 0.5},
    "metrics_after": {"eval_loss": 0.35, "eval_accuracy": 0.88, "eval_f1": 0.89},
}


def test_the_table_shows_all_metrics_and_what_the_cut_was_predicted_to_cost():
    first = Stage(
        0, 0, (), 100, 50, **MEASURED, predicted_loss=0.25, divergence=0.4, learning_rate=1e-4, note="a note"
    )
    table = stage_table([first, Stage(1, 9, (), 50, 25, metrics_before={"eval_f1": 0.7})])
    head, rest = table.split("\n\n")
    assert re.search(r"50\.0% +0\.9000 +0\.6000 +0\.8800 +open", head) and "eval_f1" not in head
    rows = [re.split(r"  +", line) for line in rest.splitlines()]
    assert ["eval_loss", "0", "0.3000", "0.8000", "0.3500"] in rows and ["eval_f1", "1", "0.7000", "-", "-"] in rows
    assert ["added loss, predicted", "0", "-", "0.2500", "-"] in rows
    assert ["divergence from uncut, nats", "0", "-", "0.4000", "-"] in rows
    assert "eval_accuracy" not in rest and "stage 0: learning rate 0.0001; a note" in rest
    assert max(map(len, rest.splitlines())) <= 80


def test_the_table_tells_of_the_fine_tuning_before_the_first_cut():
    fit = {"steps": 1200, "share": 0.4, "why": "its head is newly initialised"}
    line = stage_table([Stage(0, 1200, (), 100, 50, **MEASURED)], fit).splitlines()[0]
    assert line == (
        "fine-tuned first: 1,200 steps, 40% of the training (its head is newly initialised); eval_accuracy 0.9000 "
        "at its end"
    )


def test_the_journal_holds_all_metrics_and_the_fine_tuning(tmp_path):
    stages = [Stage(0, 3, (), 10, 5, **MEASURED, status="accepted"), Stage(1, 4, (), 5, 4, status="rolled_back")]
    fit = {"steps": 3, "share": 0.4, "why": "new"}
    write_journal(tmp_path, stages, RMTKDConfig(), 10, 5, fit=fit)
    journal = json.loads((tmp_path / JOURNAL).read_text())
    assert journal["fit"] == fit and journal["stages"][0]["metrics_cut"]["eval_f1"] == 0.5
    assert journal["metrics"] == {"before": MEASURED["metrics_before"], "after": MEASURED["metrics_after"]}
    write_journal(
        tmp_path, stages[1:], RMTKDConfig(), 10, 5, metrics={"before": {"eval_loss": math.nan}, "after": None}
    )
    journal = json.loads((tmp_path / JOURNAL).read_text())
    assert journal["metrics"] == {"before": {"eval_loss": None}, "after": None} and journal["fit"] is None


def test_records_of_earlier_versions_still_load():
    old = Stage(0, 3, (site("a", 4, 2),), 10, 5, metric_after=0.5).to_dict()
    for name in (
        "metrics_before",
        "metrics_cut",
        "metrics_after",
        "predicted_loss",
        "divergence",
        "learning_rate",
        "note",
    ):
        del old[name]
    stage = Stage.from_dict(old)
    assert stage.metrics_after is None and stage.note is None and stage.metric_after == 0.5
    assert Stage.from_dict(Stage(0, 3, (), 10, 5, **MEASURED).to_dict()) == Stage(0, 3, (), 10, 5, **MEASURED)


def test_numbers_of_quality_are_told_from_times_and_speeds():
    returned = {
        "eval_loss": 0.5,
        "eval_accuracy": 1,
        "eval_runtime": 3.2,
        "eval_samples_per_second": 10.0,
        "eval_steps_per_second": 1.0,
        "eval_model_preparation_time": 0.1,
        "eval_mem_cpu_alloc_delta": 7,
        "eval_num_tokens": 100.0,
        "epoch": 1.0,
        "eval_words": "many",
        "eval_flag": True,
    }
    assert of_quality(returned) == {"eval_loss": 0.5, "eval_accuracy": 1.0}


def test_stages_that_say_the_same_share_a_line_and_no_divergence_is_negative():
    stages = [Stage(i, i, (), 9, 8, learning_rate=2e-5, divergence=-1e-9) for i in range(3)]
    table = stage_table([*stages, Stage(3, 3, (), 9, 8, learning_rate=1e-5)])
    assert table.splitlines()[-2:] == ["stages 0 to 2: learning rate 2e-05", "stage 3: learning rate 1e-05"]
    assert "divergence from uncut, nats" in table and "-1e-09" not in table
