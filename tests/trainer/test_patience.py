"""Early stopping waits for the last cut; what stops for another reason stops."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from optimum_rmtkd.trainer import RMTKDTrainer

from ..tables import SLOW
from .conftest import toy_data


TWO = {"target_reduction": 0.5, "rounds": 2, "stage_share": 0.5}  # cuts at steps 0 and 10 of 20
STEPS = {"max_steps": 20, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 20}
BEST = {"metric_for_best_model": "score", "greater_is_better": True, "learning_rate": 1e-4}
SAVE = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}


def falling(start=0):
    """A metric that gets worse at every evaluation, by too little to be a ruin."""
    count = itertools.count(start)
    return lambda prediction: {"score": 100.0 - 1e-3 * next(count)}


def stopped(make_trainer, callback, metric=None, **options):
    given = {"compute_metrics": metric or falling(), "callbacks": [callback], "train_dataset": toy_data(32)}
    trainer = make_trainer(recipe=TWO, trainer_kwargs=given, **STEPS | BEST | options)
    trainer.train()
    return trainer


class HomeMade(TrainerCallback):
    """Counts against a best value of its own."""

    def __init__(self, patience):
        self.patience, self.best, self.bad = patience, None, 0

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        value = metrics["eval_score"]
        if self.best is None or value > self.best:
            self.best, self.bad = value, 0
        else:
            self.bad += 1
            control.should_training_stop = self.bad >= self.patience


class Impatient(HomeMade):
    """The same; it does not call it patience, and returns the control."""

    def __init__(self, allowed):
        self.allowed, self.best, self.bad = allowed, None, 0

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.patience = self.allowed
        super().on_evaluate(args, state, control, metrics)
        del self.patience
        return control


@pytest.mark.parametrize("saving", [{}, SAVE], ids=["last", "best"])
@pytest.mark.parametrize("patience", [1, SLOW(3)])
@pytest.mark.parametrize("kind", [EarlyStoppingCallback, HomeMade])
def test_patience_counts_from_the_last_cut(make_trainer, caplog, kind, patience, saving):
    if saving and kind is HomeMade:
        pytest.skip("keeps no best model")
    with caplog.at_level(logging.WARNING):
        trainer = stopped(make_trainer, kind(patience), **saving)
    assert [stage.step for stage in trainer.stages] == [0, 10]
    expected = 11 + patience if kind is HomeMade or saving else 10 + patience
    # the cut after step 10 comes before that step's evaluation, which is the first to count
    assert 10 + patience <= trainer.state.global_step <= expected
    assert caplog.text.count("patience counts from the last cut") == 1
    assert "planned cuts were not made" not in caplog.text


def test_a_callback_that_stops_after_evaluations_waits_too(make_trainer):
    trainer = stopped(make_trainer, Impatient(2))
    assert [stage.step for stage in trainer.stages] == [0, 10] and 10 <= trainer.state.global_step < 20


def test_without_further_cuts_early_stopping_is_as_ever(make_trainer):
    for recipe, steps in (({"target_reduction": 0.3, "rounds": 1}, 3), ({"schedule": "none"}, 3)):
        given = {"compute_metrics": falling(), "callbacks": [EarlyStoppingCallback(2)]}
        recipe = {"target_reduction": None} | recipe
        trainer = make_trainer(recipe=recipe, out=str(steps), trainer_kwargs=given, **STEPS | BEST | SAVE)
        trainer.train()
        assert trainer.state.global_step == steps


@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_step_begin"])
def test_other_stops_are_granted_with_a_warning(make_trainer, caplog, event):
    callback = TrainerCallback()

    def stop(args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 4

    setattr(callback, event, stop)
    with caplog.at_level(logging.WARNING):
        trainer = stopped(make_trainer, callback, logging_steps=2)
    assert 4 <= trainer.state.global_step <= 5 and len(trainer.stages) == 1
    assert "1 of 2 planned cuts were not made" in caplog.text and "patience" not in caplog.text


def test_a_metric_that_is_not_finite_may_stop_the_run(make_trainer):
    class NoNumber(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            control.should_training_stop = math.isnan(metrics["eval_score"])

    trainer = stopped(make_trainer, NoNumber(), metric=lambda prediction: {"score": math.nan})
    assert trainer.state.global_step == 1


def test_a_resumed_run_waits_and_ends_alike(make_trainer, weights):
    def make(out):
        given = {"compute_metrics": falling(), "callbacks": [EarlyStoppingCallback(2)]}
        return make_trainer(recipe=TWO, out=out, trainer_kwargs=given, **STEPS | BEST | SAVE)

    whole, resumed = make("whole"), make("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    assert whole.state.global_step == resumed.state.global_step < 20
    assert [stage.step for stage in resumed.stages] == [0, 10]
    ours, theirs = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


# -- a cut that waits -------------------------------------------------------------------------------------------------

WAITS = {"target_reduction": 0.5, "rounds": 2, "stage_share": 0.3, "stage_threshold": 0.9}  # due at step 6


def lost():
    """A metric that the first cut loses for good."""
    count = itertools.count()
    return lambda prediction: {"score": 1.0 if next(count) == 0 else 0.1}


def waiting(make_trainer, recipe, **options):
    given = {"compute_metrics": lost(), "callbacks": [EarlyStoppingCallback(2)], "train_dataset": toy_data(32)}
    trainer = make_trainer(recipe=recipe, trainer_kwargs=given, **STEPS | BEST | options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("saving", [{}, SAVE], ids=["last", "best"])
def test_a_cut_that_waits_for_its_threshold_does_not_hold_the_run(make_trainer, caplog, saving):
    with caplog.at_level(logging.WARNING):
        trainer = waiting(make_trainer, WAITS, **saving)
    assert len(trainer.stages) == 1 and 6 < trainer.state.global_step <= 9
    assert "stayed below stage_threshold" in caplog.text


def test_no_cut_is_waited_for_once_the_target_is_met(make_trainer, caplog):
    recipe = {"schedule": "layerwise", "target_reduction": 0.02, "stage_share": 0.9, "stage_threshold": 0.9}
    with caplog.at_level(logging.WARNING):
        trainer = waiting(make_trainer, recipe, **SAVE)
    assert len(trainer.stages) == 1 and trainer.state.global_step <= 3
    assert "planned cuts were not made" not in caplog.text


def test_a_loss_that_is_not_finite_may_stop_the_run(make_trainer):
    class Broken(RMTKDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, True)
            loss = loss if model.training else loss * math.nan
            return (loss, outputs) if return_outputs else loss

    class NoNumber(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            control.should_training_stop = math.isnan(metrics["eval_loss"])

    trainer = stopped(make_trainer, NoNumber(), trainer_class=Broken)  # the metric itself is a number
    assert trainer.state.global_step == 1


def test_a_stop_at_the_log_line_of_an_evaluation_is_granted(make_trainer):
    class Limit(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 4

    trainer = stopped(make_trainer, Limit())  # training itself logs at step 20
    assert trainer.state.global_step == 4 and len(trainer.stages) == 1


def test_counting_restored_from_a_checkpoint_begins_anew_at_the_cut(make_trainer, weights):
    def make(out):
        given = {"compute_metrics": lambda p: {"score": float(p.predictions[0, 0])}}
        given |= {"callbacks": [EarlyStoppingCallback(3, 10.0)]}  # nothing is an improvement
        options = STEPS | BEST | SAVE | {"restore_callback_states_from_checkpoint": True}
        return make_trainer(recipe=TWO, out=out, trainer_kwargs=given, **options)

    whole, resumed = make("whole"), make("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert whole.state.global_step == resumed.state.global_step == 13
    ours, theirs = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
