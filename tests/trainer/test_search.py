"""A training that looks for its size: rounds until one loses too much and is rolled back; the last good one stays."""

from __future__ import annotations

import json

import pytest
import torch

from optimum_rmtkd import BudgetError
from optimum_rmtkd.config import RMTKDConfig
from optimum_rmtkd.trainer import run as life
from optimum_rmtkd.trainer.stages import plan_cuts, stage_table

from .test_run import FakeHost, live, quick, run_of  # noqa: F401


SEARCH = {"target_reduction": None, "tolerance": 1.0, "rounds": 3}  # cuts at 0, 40 and 80 of 100 steps
GOOD = [0.9, 0.8, 0.895, 0.895]  # uncut, cut, half-way, before the second cut


def searching(metrics, **recipe):
    return run_of(FakeHost(metrics), **(SEARCH | recipe))


def weights_of(run):
    return {name: tensor.clone() for name, tensor in run.host.model.state_dict().items()}


def test_rounds_remove_the_same_share_of_what_is_left():
    cuts = plan_cuts(RMTKDConfig(tolerance=1, rounds=3, round_share=0.2), 100)
    assert [cut.target_reduction for cut in cuts] == pytest.approx([0.2, 0.36, 0.488])
    assert [cut.step for cut in cuts] == [0, 40, 80]
    usual = plan_cuts(RMTKDConfig(tolerance=1), 1000)
    assert len(usual) == 8 and usual[-1].step == 800 and usual[-1].target_reduction == pytest.approx(1 - 0.75**8)
    assert len(plan_cuts(RMTKDConfig(tolerance=1), 5)) == 5  # no more than there are steps
    half = plan_cuts(RMTKDConfig(tolerance=1, rounds=2), 100, kept=0.5)
    assert [cut.target_reduction for cut in half] == pytest.approx([0.625, 0.71875])  # narrowed before


def test_the_first_round_that_loses_too_much_is_rolled_back_and_the_last_good_model_distilled_on():
    # second cut: 0.7, half-way 0.85, at its end 0.88 where 0.89 is the least; the end: 0.9
    run = searching([*GOOD, 0.7, 0.85, 0.88, 0.9])
    live(run, steps=79)
    assert [s.status for s in run.stages] == ["accepted", "open"] and run.host.model.config.intermediate_size == 4
    live(run)
    assert [s.status for s in run.stages] == ["accepted", "rolled_back"]
    assert run.host.model.config.intermediate_size == 8
    assert (run.stages[0].metric_after, run.stages[1].metric_after) == (0.9, 0.88)
    reason = "eval_accuracy 0.8800, uncut 0.9000, tolerance 1 allows a loss of 0.01"
    assert run.stages[1].reason == run.agenda.stopped == reason
    assert not run.agenda.stays and run.agenda.next_cut() is None
    table = stage_table(run.stages)
    assert "rolled_back" in table and "accepted" in table and reason in table


def test_what_is_left_distils_from_the_good_weights_at_a_rate_of_its_own():
    run = searching([*GOOD, 0.7, 0.85, 0.88, 0.9])
    live(run, steps=39)
    run.host.step = 40
    with torch.no_grad():
        for parameter in run.host.model.parameters():
            parameter += 1.0
    good = weights_of(run)
    run.after_step(40)
    live(run, steps=80)
    assert all(torch.equal(value, good[name]) for name, value in weights_of(run).items())
    assert run.agenda.stays and run.pace.phases[-1].since == 80
    live(run)
    assert any(not torch.equal(value, good[name]) for name, value in weights_of(run).items())


@pytest.mark.parametrize("last", [0.88, 0.2, float("nan")])
def test_distilling_on_never_ends_below_the_tolerance(last, caplog):
    run = searching([*GOOD, 0.7, 0.85, 0.88, last])
    live(run, steps=80)
    good = weights_of(run)
    live(run)
    assert all(torch.equal(value, good[name]) for name, value in weights_of(run).items())
    assert run.stages[0].metric_after == 0.895 and run.judge.last.value == 0.895
    assert caplog.text.count("Distilling on made the model worse") == 1


def test_the_last_round_is_judged_at_the_end():
    fine = [*GOOD, 0.7, 0.895, 0.895, 0.6]
    run = live(searching([*fine, 0.895]))
    assert [s.status for s in run.stages] == ["accepted"] * 3 and run.host.model.config.intermediate_size == 2
    run = live(searching([*fine, 0.85]))
    assert [s.status for s in run.stages] == ["accepted", "accepted", "rolled_back"]
    assert run.host.model.config.intermediate_size == 4 and run.stages[1].metric_after == 0.895


def test_where_the_first_round_loses_too_much_the_model_is_uncut(caplog):
    run = live(searching([0.9, 0.5, 0.6, 0.7, 0.9]))
    assert [s.status for s in run.stages] == ["rolled_back"] and run.host.model.config.intermediate_size == 16
    assert "No round kept tolerance=1: the model is uncut" in caplog.text


def test_a_size_that_cannot_be_reached_ends_the_rounds(monkeypatch, caplog):
    first = life.reduced

    def reduced(host, config, cut, reference):
        if cut.index:
            raise BudgetError("the model cannot get below 9")
        return first(host, config, cut, reference)

    monkeypatch.setattr(life, "reduced", reduced)
    run = live(searching([*GOOD, 0.9]))
    assert len(run.stages) == 1 and run.stages[0].metric_after == 0.9
    assert run.agenda.stopped == "there is no smaller size (the model cannot get below 9)"
    monkeypatch.setattr(life, "reduced", lambda *a: (_ for _ in ()).throw(BudgetError("out of reach")))
    with pytest.raises(BudgetError, match="out of reach"):  # nothing was found at all
        live(searching([*GOOD, 0.9]))


@pytest.mark.parametrize("at", [10, 40, 60, 80, 90])
def test_a_search_is_resumed_bit_for_bit(at):
    """In the first round, at the second cut, in it, just after the roll-back, and in what is left."""
    values = [*GOOD, 0.7, 0.85, 0.88, 0.2]  # the end is worse: the kept weights must have come along
    whole = live(searching(values))
    part = live(searching(values), steps=at)
    state = part.state_dict()
    state = {"values": json.loads(json.dumps(state["values"])), "tensors": dict(state["tensors"])}
    weights = weights_of(part)
    resumed = searching(part.host.metrics)
    resumed.host.step = at
    resumed.load_state_dict(state)
    resumed.host.model.load_state_dict(weights)
    live(resumed)
    assert [s.to_dict() for s in resumed.stages] == [s.to_dict() for s in whole.stages]
    assert resumed.pace.phases == whole.pace.phases and not resumed.agenda.stays
    ours, theirs = weights_of(resumed), weights_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_of_an_earlier_version_is_taken_up():
    part = live(run_of(FakeHost([0.9, 0.8, 0.85])), steps=10)
    state = part.state_dict()
    del state["values"]["agenda"]["stays"]
    host = FakeHost([0.85])
    host.step = 10
    resumed = run_of(host)
    resumed.load_state_dict(state)
    assert resumed.agenda.stays is False
