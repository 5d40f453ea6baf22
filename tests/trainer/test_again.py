"""A run is taken up with other steps than were planned, with its first step again, or where it was broken off."""

from __future__ import annotations

import json

import pytest

from optimum_rmtkd.trainer import fit as fitting
from optimum_rmtkd.trainer import pace as pacing
from optimum_rmtkd.trainer.again import moving
from optimum_rmtkd.trainer.rates import Rate
from optimum_rmtkd.trainer.schedule import factor_at

from .living import NEW, FakeHost, live, quick, run_of  # noqa: F401


GIVEN, LOW = 1e-3, 2e-6  # the peak that the user gave, and what a cut is distilled at


@pytest.fixture
def slow_after_a_cut(monkeypatch):
    monkeypatch.setattr(pacing, "distil_rate", lambda given, removed, steps: Rate(LOW, "for the test"))


def taken_up(part, max_steps, metrics=(0.9,), **recipe):
    """A run in another process, with other steps, from the state of one."""
    state = part.state_dict()
    state = {"values": json.loads(json.dumps(state["values"])), "tensors": dict(state["tensors"])}
    host = FakeHost(metrics, max_steps)
    host.step = part.host.step
    run = run_of(host, **recipe)
    run.load_state_dict(state)
    host.model.load_state_dict(part.host.model.state_dict())
    run.begin()
    return run


def rate_at(run, step):
    return GIVEN * factor_at(step, run.pace.phases, lambda steps: lambda at: max(0.0, 1 - at / steps))


def spans(run):
    return [(phase.name, phase.start, phase.steps) for phase in run.pace.phases]


def test_what_is_done_stays_where_it_is_and_the_rest_is_stretched():
    moved = moving(15, 20, 60)
    assert [moved(step) for step in (0, 10, 15, 16, 20)] == [0, 10, 15, 24, 60]
    assert moving(0, 60, 120)(24) == 48 and moving(20, 20, 40)(30) == 30
    assert moving(15, 20, 10)(18) == 15  # shorter than what is done


def test_more_steps_do_not_bring_the_rate_of_the_fit_back(slow_after_a_cut):
    recipe = {"fit_share": 0.5}
    part = live(run_of(FakeHost([0.9], 20), **recipe), steps=15)
    run = taken_up(part, 60, **recipe)
    assert spans(run) == [("fit", 0, 10), ("distil", 10, 50)] and run.fit.to_dict()["steps"] == 10
    assert run.stages[0].step == 10 and run.stages[0].learning_rate == pytest.approx(LOW)
    assert max(rate_at(run, step) for step in range(15, 60)) == pytest.approx(LOW)
    assert rate_at(run, 59) > 0


def test_in_the_fit_the_whole_plan_keeps_its_proportions():
    recipe = {"fit_share": 0.5, "rounds": 2}
    part = live(run_of(FakeHost([0.9], 20), **recipe), steps=5)
    run = taken_up(part, 60, **recipe)
    assert run.fit.going and spans(run) == [("fit", 0, 30), ("distil", 30, 30)]
    assert [cut.step for cut in run.plan] == [30, 39]


@pytest.mark.parametrize("follows", [True, False])
def test_only_cuts_to_come_move(slow_after_a_cut, follows):
    """Also where the learning rate is the user's own."""
    recipe = {"rounds": 2, "stage_share": 0.5}

    def host():
        made = FakeHost([0.9])
        made.follows_phases = follows
        return made

    part = live(run_of(host(), **recipe), steps=20)
    assert [cut.step for cut in part.plan] == [0, 50]
    part.agenda.look_at, part.agenda.delay = 30, 8
    run = taken_up(part, 180, **recipe)
    assert [cut.step for cut in run.plan] == [0, 80] and run.agenda.delay == 16 and run.agenda.look_at == 40
    assert run.agenda.stage_from == 0
    live(run)
    assert [stage.step for stage in run.stages] == [0, 96]


def test_warm_ups_and_stages_that_have_begun_stay(slow_after_a_cut, monkeypatch):
    monkeypatch.setattr(pacing, "warmup_steps", lambda steps: 3)
    recipe = {"rounds": 2, "stage_share": 0.5}
    part = live(run_of(FakeHost([0.9], 20), **recipe), steps=20)
    run = taken_up(part, 40, **recipe)
    (phase,) = run.pace.phases
    assert phase.warmups == ((0, 3), (10, 3)) and [stage.step for stage in run.stages] == [0, 10]
    assert rate_at(run, 20) == pytest.approx(LOW)


def restarted(run, max_steps):
    """As transformers does after running out of memory: from the first step, with the model as it is."""
    run.host.step, run.host.max_steps = 0, max_steps
    run.begin()
    return run


def test_a_cut_model_that_starts_again_is_not_fine_tuned_again(slow_after_a_cut):
    run = live(run_of(FakeHost([0.9], 20), fit_share=0.5), steps=10)
    fitted = run.fit.to_dict()
    restarted(run, 40)
    assert spans(run) == [("distil", 0, 40)] and run.fit.to_dict() == fitted and run.progress == 0
    assert max(rate_at(run, step) for step in range(40)) == pytest.approx(LOW)
    assert live(run).stages[0].status == "accepted"


def test_a_later_stage_that_starts_again_has_the_steps_that_there_are(slow_after_a_cut):
    run = live(run_of(FakeHost([0.9]), rounds=3, stage_share=0.5), steps=26)
    assert [stage.step for stage in run.stages] == [0, 25]
    restarted(run, 200)
    assert [cut.step for cut in run.plan[2:]] == [100] and run.agenda.stage_from == 0
    live(run)
    assert [stage.step for stage in run.stages] == [0, 25, 100]


def test_a_second_training_makes_its_cuts_in_the_steps_that_it_has(slow_after_a_cut):
    run = live(run_of(FakeHost([0.9]), rounds=2, stage_share=0.5), steps=20)
    run.agenda.retry_at, run.agenda.delay = 60, 7
    run.train_on()
    live(restarted(run, 10))
    assert [(stage.step, stage.status) for stage in run.stages] == [(0, "accepted"), (5, "accepted")]
    assert spans(run) == [("distil", 0, 10)]


def test_a_second_training_after_one_that_was_stopped_early_cuts_at_once(slow_after_a_cut):
    run = live(run_of(FakeHost([0.9]), rounds=2, stage_share=0.5), steps=20)
    run.end()
    run.train_on()
    restarted(run, 10)
    assert [stage.step for stage in run.stages] == [0, 0] and run.pace.rate == pytest.approx(LOW)


def test_a_second_training_does_not_forget_how_long_the_first_one_fitted():
    run = live(run_of(FakeHost([0.9], 20), fit_share=0.5))
    fitted = run.fit.to_dict()
    run.train_on()
    restarted(run, 100)
    run.host.step = 50
    assert run.fit.to_dict() == fitted and run.progress == 0.5 and not run.pace.phases


def test_a_second_training_of_a_broken_fit_fits():
    run = live(run_of(FakeHost([0.9], 20), fit_share=0.5), steps=5)
    run.train_on()
    live(restarted(run, 40))
    assert [stage.step for stage in run.stages] == [20] and run.fit.steps == 20


# -- broken off just after a cut --------------------------------------------------------------------------------------


def broken(at, metrics=(0.9,), **recipe):
    """A run whose evaluation number `at` is broken off."""
    host = FakeHost(metrics)
    measure, seen = host.measure, []

    def measured():
        seen.append(1)
        if len(seen) == at + 1:
            raise KeyboardInterrupt
        return measure()

    host.measure = measured
    return run_of(host, **recipe)


def test_a_cut_whose_evaluation_is_broken_off_is_on_record_and_measured_later():
    run = broken(1, [0.9, 0.8, 0.85])
    with pytest.raises(KeyboardInterrupt):
        run.begin()
    (stage,) = run.stages
    assert stage.status == "open" and stage.parameters_after == run.parameters and stage.metric_cut is None
    run.train_on()
    run.begin()
    assert run.stages[0].metric_cut == 0.8
    live(run)
    assert (run.stages[0].status, run.stages[0].metric_after, len(run.stages)) == ("accepted", 0.85, 1)


def test_a_loop_that_goes_on_in_the_midst_measures_it_as_well():
    run = broken(3, [0.9, 0.8, 0.9, 0.7, 0.9], rounds=2)
    with pytest.raises(KeyboardInterrupt):
        live(run)
    assert len(run.stages) == 2 and run.judge.pending
    state = json.loads(json.dumps(run.judge.state_dict()))
    run.judge.load_state_dict(state)
    run.begin_batch(run.host.calibration_batches())
    assert run.stages[1].metric_cut == 0.7 and not run.judge.pending


def test_a_model_that_is_broken_off_and_ended_is_judged():
    run = broken(1, [0.9, 0.8, 0.85])
    with pytest.raises(KeyboardInterrupt):
        run.begin()
    run.end()
    assert (run.stages[0].metric_cut, run.stages[0].metric_after) == (0.8, 0.85)


def test_whether_cuts_are_to_come_is_known_before_the_training():
    assert run_of(FakeHost()).cuts_to_come
    assert not run_of(FakeHost(), schedule="none", target_reduction=None).cuts_to_come


def test_the_teacher_of_a_new_head_is_measured_once(monkeypatch):
    monkeypatch.setattr(fitting, "readiness", lambda *a, **k: NEW)
    run = live(run_of(FakeHost([0.5, 0.9, 0.8, 0.85])))
    assert run.stages[0].metric_before == 0.9 and run.fit.earlier is None
