"""The life of a run, driven by a host of twenty lines: no Trainer, no data, no optimizer."""

from __future__ import annotations

import ast
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import optimum_rmtkd.trainer
from optimum_rmtkd.distillation import FrozenTeacher
from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.trainer import fit as fitting
from optimum_rmtkd.trainer import pace as pacing
from optimum_rmtkd.trainer import run as life
from optimum_rmtkd.trainer.columns import Columns
from optimum_rmtkd.trainer.host import Host
from optimum_rmtkd.trainer.rates import Rate
from optimum_rmtkd.trainer.readiness import Readiness

from .living import NEW, UNKNOWN, FakeHost, live, quick, run_of, tiny  # noqa: F401


def test_the_host_of_the_test_is_a_host():
    assert isinstance(FakeHost(), Host)


def test_a_model_that_can_teach_is_cut_at_once():
    run = live(run_of(FakeHost([0.9, 0.8, 0.85])))
    (stage,) = run.stages
    assert (stage.step, stage.status, stage.metric_before, stage.metric_cut, stage.metric_after) == (
        0, "accepted", 0.9, 0.8, 0.85,
    )  # fmt: skip
    assert stage.metrics_before == {"eval_accuracy": 0.9, "eval_loss": 0.4} and run.fit.to_dict() is None
    assert [phase.name for phase in run.pace.phases] == ["distil"]


def test_a_model_that_cannot_teach_is_fine_tuned_first(monkeypatch):
    monkeypatch.setattr(fitting, "readiness", lambda *a, **k: Readiness(False, 0.69, 0.69, "a new head"))
    host = FakeHost([0.5, 0.9, 0.8, 0.85])
    run = run_of(host)
    live(run, steps=59)
    assert run.fit.going and run.active and run.teacher is None and not run.stages
    assert [objective.label for objective in run.loss.objectives] == ["task"]
    run.host.step = 60
    fitted = [p.detach().clone() for p in host.model.parameters()]
    run.after_step(60)
    assert [s.step for s in run.stages] == [60] and not run.fit.going and run.fit.metrics["eval_accuracy"] == 0.9
    teacher = list(run.teacher.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(teacher, fitted, strict=True))  # as it is at the end of the fit
    assert [(p.name, p.start, p.steps) for p in run.pace.phases] == [("fit", 0, 60), ("distil", 60, 40)]
    assert run.pace.phases[0].factor == pytest.approx(1.5)  # few steps


def test_a_fit_that_taught_nothing_is_said(monkeypatch, caplog):
    monkeypatch.setattr(fitting, "readiness", lambda *a, **k: Readiness(False, 0.69, 0.69, "no better than chance"))
    live(run_of(FakeHost([0.5, 0.5, 0.5])))
    assert caplog.text.count("The teacher still knows nothing of the task: no better than chance") == 1


@pytest.mark.parametrize(("share", "first"), [(0, 0), (0.25, 25), (0.001, 1)])
def test_a_share_that_is_given_is_taken(monkeypatch, share, first):
    monkeypatch.setattr(fitting, "readiness", lambda *a, **k: Readiness(False, 0.69, 0.69, "a new head"))
    run = live(run_of(FakeHost([0.9]), fit_share=share))
    assert run.stages[0].step == first


def test_training_that_ends_while_it_fits_says_so(caplog):
    run = run_of(FakeHost([0.9]), fit_share=0.5)
    live(run, steps=20)
    run.end()
    assert not run.stages and "in the 50 steps of fine-tuning: nothing was cut" in caplog.text


def test_a_second_cut_follows_a_model_that_has_come_back():
    run = live(run_of(FakeHost([0.9, 0.8, 0.88, 0.7, 0.75, 0.86]), rounds=2))
    assert [(s.step, s.status) for s in run.stages] == [(0, "accepted"), (30, "accepted")]
    assert run.stages[1].metric_before == 0.88 and run.stages[0].metric_after == 0.88


def test_a_second_cut_waits_for_a_model_that_has_not(caplog):
    # before, cut, due at 30: 0.5, 35: 0.5, 40: 0.9; then the second cut and its look
    run = live(run_of(FakeHost([0.9, 0.4, 0.5, 0.5, 0.9, 0.8, 0.85, 0.88]), rounds=2))
    assert [s.step for s in run.stages] == [0, 40]
    assert caplog.text.count("the next cut waits until it has come back") == 1


def test_a_cut_that_waits_too_long_is_not_made(caplog):
    run = live(run_of(FakeHost([0.9, 0.4, 0.5]), rounds=2))
    assert len(run.stages) == 1 and "had not come back to the 0.9 of the uncut model" in run.agenda.stopped
    assert "No further cut is made" in caplog.text and "target_reduction asks for" in caplog.text


def test_where_the_metric_is_not_there_a_known_one_judges(caplog):
    host = FakeHost([0.9, 0.8, 0.85])
    host.metric_name = "eval_nothing"
    run = live(run_of(host))
    assert run.stages[0].metric_name == "eval_loss" and run.stages[0].metric_after == 0.45
    assert caplog.text.count("the stages are judged by eval_loss") == 1
    host = FakeHost([70.0, 60.0, 65.0])
    host.metric_name, measure = "eval_loss", host.measure
    host.measure = lambda: {"eval_exact_match": 1.0, "eval_f1": measure()["eval_accuracy"]}
    run = live(run_of(host))
    assert (run.stages[0].metric_name, run.stages[0].metric_after) == ("eval_f1", 65.0)


def test_a_loss_that_nobody_asked_for_does_not_undo_what_another_metric_gained():
    host = FakeHost([0.9, 0.8, 0.88])
    host.metric_name, host.greater_is_better, measure = "eval_loss", False, host.measure
    confident = iter([0.3, 0.5, 0.5, 0.6])
    host.measure = lambda: measure() | {"eval_loss": next(confident)}
    run = live(run_of(host))
    assert run.stages[0].note is None and run.stages[0].metric_after == 0.6


def judged_by_loss(pairs, rows=1000):
    """A host whose user named no metric: (loss, accuracy) of each measurement, the last one again and again."""
    host, pairs = FakeHost(), list(pairs)
    host.metric_name, host.greater_is_better, host.validation_rows = "eval_loss", False, rows

    def measure():
        loss, accuracy = pairs.pop(0) if len(pairs) > 1 else pairs[0]
        return {"eval_loss": loss, "eval_accuracy": accuracy, "eval_other": 1.0}

    host.measure = measure
    return host


LOSES = [(0.45, 0.90), (0.52, 0.86), (0.50, 0.78)]  # uncut, just after the cut, and then: the loss mends, the rest not


def test_a_metric_that_falls_beside_a_loss_is_seen_early_and_at_the_end(caplog):
    run = live(run_of(judged_by_loss(LOSES)))
    (stage,) = run.stages
    assert stage.metric_name == "eval_loss" and stage.metrics_after["eval_accuracy"] == 0.86  # just after the cut
    assert caplog.text.count("begins anew from its cut") == 2  # as often as a stage may be
    assert "eval_accuracy 0.78, 0.86 just after the cut" in stage.note
    assert "eval_accuracy fell from 0.9 to 0.86" in caplog.text


@pytest.mark.parametrize(("rows", "after"), [(100, 0.80), (None, 0.80), (1000, 0.84)])
def test_a_metric_beside_a_loss_undoes_nothing_by_noise(caplog, rows, after):
    run = live(run_of(judged_by_loss([*LOSES[:2], (0.50, after)], rows)))
    assert run.stages[0].metrics_after["eval_accuracy"] == after and run.stages[0].note is None
    assert f"eval_accuracy fell from 0.9 to {after}" in caplog.text  # it is said


def test_a_metric_that_the_user_named_judges_alone():
    host = judged_by_loss(LOSES)
    host.metric_asked_for = True
    run = live(run_of(host))
    assert run.stages[0].metrics_after["eval_accuracy"] == 0.78 and run.stages[0].note is None


def test_no_cut_follows_where_a_metric_beside_the_loss_has_not_come_back(caplog):
    ruined = [(0.45, 0.90), (0.55, 0.75), (0.46, 0.75)]
    run = live(run_of(judged_by_loss(ruined), rounds=2))
    assert len(run.stages) == 1 and "eval_accuracy 0.75 had not come back to the 0.9" in run.agenda.stopped


def test_a_run_that_turns_out_longer_is_stretched(monkeypatch):
    monkeypatch.setattr(fitting, "readiness", lambda *a, **k: Readiness(False, 0.69, 0.69, "a new head"))
    run = run_of(FakeHost([0.9, 0.8, 0.85, 0.9]), rounds=2)
    run.begin()
    run.host.max_steps = 200  # half the batch, after running out of memory
    run.begin()
    live(run)
    assert [s.step for s in run.stages] == [120, 144]
    assert [(p.start, p.steps) for p in run.pace.phases] == [(0, 120), (120, 80)]


def test_nothing_is_fine_tuned_without_the_tasks_loss(monkeypatch):
    monkeypatch.setattr(fitting, "readiness", lambda *a, **k: Readiness(False, None, None, "a new head"))
    terms = {"task_weight": 0.0, "kl_weight": 1.0}
    assert live(run_of(FakeHost([0.9]), **terms)).stages[0].step == 0
    with pytest.raises(RMTKDError, match="fine-tuning needs the task's loss"):
        live(run_of(FakeHost([0.9]), fit_share=0.5, **terms))


@pytest.mark.parametrize(
    ("found", "recipe", "said"),
    [
        (NEW, {"task_weight": 0.0}, r"though it cannot teach: its head is newly.*\(task_weight, TaskLoss\)"),
        (NEW, {"fit_share": 0}, r"though it cannot teach: its head is newly.*fit_share=0\.4\) fine-tunes it first"),
        (UNKNOWN, {}, r"could not be checked.*fit_share=0\.4\) fine-tunes it first; fit_share=0 says"),
        (UNKNOWN, {"fit_share": 0}, None),
        (UNKNOWN, {"task_weight": 0.0}, None),
        (Readiness(True, 0.3, 0.69, "it can"), {}, None),
    ],
)
def test_a_model_that_is_cut_at_once_and_may_know_nothing_draws_a_line(monkeypatch, caplog, found, recipe, said):
    monkeypatch.setattr(fitting, "readiness", lambda *a, **k: found)
    run = live(run_of(FakeHost([0.9]), **recipe))
    assert run.stages[0].step == 0
    assert re.search(said, caplog.text) if said else "The model is cut at once" not in caplog.text


def test_another_model_that_teaches_makes_up_for_one_that_cannot(monkeypatch, caplog):
    monkeypatch.setattr(fitting, "readiness", lambda *a, **k: UNKNOWN)
    run = run_of(FakeHost([0.9]))
    run.tutor.given = FrozenTeacher(tiny())
    live(run)
    assert len(run.stages) == 1 and "The model is cut at once" not in caplog.text


def test_a_loss_of_the_users_own_is_not_held_against_that_of_knowing_nothing():
    """A focal loss, for example, of which 0.69 nats say nothing: six times its value is a ruin."""
    host = judged_by_loss([(0.05, 0.9), (0.32, 0.9), (0.30, 0.9)])
    host.columns = Columns(host.model, own_loss=True)
    run = live(run_of(host, rounds=2))
    assert len(run.stages) == 1 and "eval_loss 0.3 had not come back to the 0.05" in run.agenda.stopped


def test_a_second_training_is_measured_as_well():
    run = live(run_of(FakeHost([0.9, 0.8, 0.85, 0.85, 0.95])))
    assert run.stages[0].metric_after == 0.85
    run.train_on()
    run.host.step = 0
    run.begin()
    live(run)
    assert run.stages[0].metric_after == 0.95 and len(run.stages) == 1


def test_a_training_that_follows_one_that_was_broken_off_begins_its_stage_anew(monkeypatch):
    monkeypatch.setattr(pacing, "distil_rate", lambda given, removed, steps: Rate(given * steps, "for the test"))
    run = live(run_of(FakeHost([0.9, 0.8, 0.85])), steps=20)
    run.train_on()
    run.host.step, run.host.max_steps = 0, 60
    run.begin()
    assert run.stages[0].learning_rate == run.pace.rate == pytest.approx(0.06)
    assert (run.agenda.stage_from, run.agenda.look_at) == (0, 30)
    live(run)
    assert run.stages[0].status == "accepted" and run.stages[0].metric_after == 0.85


def test_a_correlation_that_was_none_just_after_the_cut_undoes_nothing():
    run = live(run_of(FakeHost([0.9, float("nan"), 0.85])))
    assert run.stages[0].metric_after == 0.85 and run.stages[0].note is None


def test_what_is_not_finite_goes_through_a_checkpoint():
    run = run_of(FakeHost([0.9, float("nan"), 0.85]))
    live(run, steps=10)
    values = json.loads(json.dumps(run.judge.state_dict(), allow_nan=False))
    run.judge.load_state_dict(values)
    assert math.isnan(run.judge.just_cut.value) and run.judge.baseline.value == 0.9


def test_a_ruin_is_seen_early_and_begun_anew_at_a_lower_rate(caplog):
    host = FakeHost([0.9, 0.8, 0.3, 0.85])
    run = run_of(host)
    run.begin()
    cut = [p.detach().clone() for p in host.model.parameters()]
    live(run, steps=50)
    assert all(torch.equal(a, b) for a, b in zip(cut, host.model.parameters(), strict=True))  # just after the cut
    assert "forget" in host.done and run.pace.phases[-1].factor == pytest.approx(1 / 3)
    for step in range(51, 101):
        host.step = step
        run.after_step(step)
    run.end()
    assert run.stages[0].status == "accepted" and run.stages[0].metric_after == 0.85
    words = "eval_accuracy 0.3, 0.8 just after the cut, eval_loss 1, 0.5 just after the cut, after 50 steps"
    assert words in run.stages[0].note
    assert caplog.text.count("begins anew from its cut") == 1


def test_no_cut_follows_a_stage_that_only_gets_worse():
    values = [0.9, 0.8, 0.79, *[0.2] * 20]
    run = live(run_of(FakeHost(values), rounds=2))
    assert len(run.stages) == 1 and run.stages[0].metric_after == 0.8  # the model just after the cut
    assert "made the model worse" in run.agenda.stopped


def test_at_the_end_the_better_of_both_is_kept(caplog):
    host = FakeHost([0.9, 0.8, 0.81, 0.7])
    run = run_of(host)
    run.begin()
    cut = [p.detach().clone() for p in host.model.parameters()]
    live(run)
    assert all(torch.equal(a, b) for a, b in zip(cut, host.model.parameters(), strict=True))
    assert run.stages[0].metric_after == 0.8 and "the weights just after the cut stay" in caplog.text


def test_within_the_noise_the_distilled_model_is_kept():
    run = live(run_of(FakeHost([0.9, 0.8, 0.8, 0.795])))
    assert run.stages[0].metric_after == 0.795 and run.stages[0].note is None


@pytest.mark.parametrize("recipe", [{}, {"stage_threshold": 0.99}, {"max_metric_drop": 0.05}])
def test_a_ruin_is_begun_anew_also_without_a_metric_or_with_a_rule_of_the_user(monkeypatch, caplog, recipe):
    host = FakeHost([0.9, 0.88, 0.5] if recipe else ())
    away = iter([0.2, 5.0, 0.1, 0.1])
    monkeypatch.setattr(life.Judge, "_divergence", lambda judge, uncut: None if uncut is None else next(away))
    live(run_of(host, **recipe), steps=50)
    assert caplog.text.count("begins anew from its cut") == 1 and "forget" in host.done


def test_a_stage_that_a_rule_of_the_user_calls_good_is_not_begun_anew(caplog):
    live(run_of(FakeHost([0.9, 0.88, 0.8]), max_metric_drop=0.2), steps=50)
    assert "begins anew" not in caplog.text


def test_a_stage_is_rolled_back():
    host = FakeHost([0.9, 0.5, 0.6])
    run = live(run_of(host, max_metric_drop=0.1))
    assert run.stages[0].status == "rolled_back" and host.done.count("install 16") == 1
    assert run.agenda.stopped == run.stages[0].reason and not run.cuts_to_come


def test_a_stage_is_rejected(monkeypatch):
    usual = life.reduced

    def narrow(*args):
        found = usual(*args)
        site = {"name": "hidden", "width_before": 10, "width_after": 1}
        found.sites = (SimpleNamespace(to_dict=lambda: site),)
        return found

    monkeypatch.setattr(life, "reduced", narrow)
    host = FakeHost([0.9])
    run = live(run_of(host, min_rank_ratio=0.5))
    assert run.stages[0].status == "rejected" and not any("install" in done for done in host.done)


def test_a_threshold_of_the_user_holds_the_next_cut_back():
    run = live(run_of(FakeHost([0.9, 0.85, 0.85, 0.85, 0.9]), rounds=2, stage_threshold=0.99))
    assert [s.step for s in run.stages] == [0, 40]


def test_without_validation_data_the_cuts_are_made_as_planned():
    run = live(run_of(FakeHost(), rounds=2))
    assert [(s.step, s.status, s.metric_after) for s in run.stages] == [(0, "accepted", None), (30, "accepted", None)]


def test_an_evaluation_without_the_metric_judges_nothing_and_says_so_once(caplog):
    host = FakeHost([0.9, 0.1])
    host.metric_name = "eval_nothing"
    host.measure = lambda: {"eval_mystery": 1.0}
    run = live(run_of(host, rounds=2))
    assert [s.metric_name for s in run.stages] == [None, None] and run.stages[0].metrics_before["eval_mystery"] == 1.0
    assert caplog.text.count("the stages are judged without a metric") == 1
    host = FakeHost([0.9])
    host.metric_name, host.metric_asked_for = "eval_nothing", True
    with pytest.raises(RMTKDError, match="judged by 'eval_nothing'"):
        live(run_of(host))


@pytest.mark.parametrize("at", [10, 30, 55, 80])
def test_a_run_goes_on_from_its_state(monkeypatch, at):
    """Fit, first cut, a wait, a second cut: the rest is the same from any moment, through JSON."""
    monkeypatch.setattr(fitting, "readiness", lambda *a, **k: Readiness(False, 0.69, 0.69, "a new head"))
    recipe = {"rounds": 2, "fit_share": 0.2}
    values = [0.9, 0.8, 0.5, 0.82, 0.85, 0.9, 0.84, 0.86, 0.88]
    whole = live(run_of(FakeHost(values), **recipe))
    part = live(run_of(FakeHost(values), **recipe), steps=at)
    state = part.state_dict()
    state = {"values": json.loads(json.dumps(state["values"])), "tensors": dict(state["tensors"])}
    weights = {name: tensor.clone() for name, tensor in part.host.model.state_dict().items()}
    host = FakeHost(part.host.metrics)
    host.step = at
    resumed = run_of(host, **recipe)
    resumed.load_state_dict(state)
    host.model.load_state_dict(weights)
    live(resumed)
    assert [s.to_dict() for s in resumed.stages] == [s.to_dict() for s in whole.stages]
    assert resumed.pace.phases == whole.pace.phases and resumed.fit.to_dict() == whole.fit.to_dict()
    sides = (lambda run: run.host.model, lambda run: run.teacher.model)
    for side in sides:
        ours, theirs = side(resumed).state_dict(), side(whole).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_no_import_of_the_room_leads_back_to_where_it_came_from():
    """Those for the type checker included."""
    room = Path(optimum_rmtkd.trainer.__file__).parent
    package = "optimum_rmtkd.trainer"
    known = {
        ".".join((package, *path.relative_to(room).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in room.rglob("*.py")
    }

    def imported(name, path):
        parts = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = ".".join(parts[: len(parts) - node.level + 1] + ([node.module] if node.module else []))
                inner = {f"{base}.{alias.name}" for alias in node.names} & set(known)
                yield from inner or {base} & set(known)

    graph = {name: set(imported(name, path)) - {name} for name, path in known.items()}

    def reaches(start, goal, seen):
        return any(n == goal or (n not in seen and not seen.add(n) and reaches(n, goal, seen)) for n in graph[start])

    assert {name for name in graph if reaches(name, name, set())} == set()
    assert not any("mixin" in inner or "hooks" in inner for inner in graph[f"{package}.run"])
