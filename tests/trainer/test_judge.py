"""Which metrics judge, by what an evaluation returns."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from optimum_rmtkd.config import RMTKDConfig
from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.hub.measures import of_quality
from optimum_rmtkd.trainer.evaluations import numbers_of
from optimum_rmtkd.trainer.judge import Judge, Measured


def judge_of(*moments, **host):
    """A judge of evaluations that return these, one after the other."""
    moments = list(moments)
    given = {
        "metric_name": "eval_loss",
        "greater_is_better": False,
        "metric_asked_for": False,
        "loss_name": "eval_loss",
    }
    given |= {"validation_rows": 200, "measure": lambda: moments.pop(0)} | host
    return Judge(SimpleNamespace(**given), RMTKDConfig(target_reduction=0.5))


def is_worse(cut, now):
    judge = judge_of()
    judge.just_cut = Measured(cut, cut["eval_loss"])
    return judge.worse(Measured(now, now["eval_loss"]))


@pytest.mark.parametrize("name", ["gen_len", "nll", "false_positives", "bits_per_byte", "mystery"])
def test_a_number_of_which_nothing_is_known_does_not_excuse_a_ruin(name):
    assert is_worse({"eval_loss": 0.5, f"eval_{name}": 20.0}, {"eval_loss": 2.0, f"eval_{name}": 60.0})


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "mrr"])
def test_a_known_metric_that_got_better_excuses_a_loss_that_grew(name):
    assert not is_worse({"eval_loss": 0.5, f"eval_{name}": 0.8}, {"eval_loss": 0.6, f"eval_{name}": 0.9})


def test_one_of_several_sets_judges_where_none_is_named(caplog):
    found = {f"eval_{name}_{what}": value for name in "ab" for what, value in (("loss", 0.5), ("accuracy", 0.8))}
    judge = judge_of(found, found)
    assert judge.measure().value == 0.5 and judge.name == "eval_a_loss" and not judge.greater_is_better
    assert judge.second(judge.last, judge.last) == "eval_a_accuracy"
    assert judge.measure().value == 0.5 and caplog.text.count("the stages are judged by eval_a_loss") == 1


def test_a_metric_that_is_named_is_found_under_another_prefix():
    named = {"metric_name": "eval_accuracy", "greater_is_better": True, "metric_asked_for": True}
    judge = judge_of({"valid_loss": 0.5, "valid_accuracy": 0.8}, **named)
    assert judge.measure().value == 0.8 and judge.greater_is_better
    with pytest.raises(RMTKDError, match="judged by 'eval_accuracy'"):  # of which set?
        judge_of({"eval_a_accuracy": 0.8, "eval_b_accuracy": 0.9}, **named).measure()


def test_every_kind_of_single_number_is_one():
    kinds = [
        0.5,
        np.float16(0.5),
        np.float64(0.5),
        np.array(0.5),
        np.array([0.5]),
        torch.tensor(0.5),
        torch.ones(1) / 2,
    ]
    assert all(of_quality({"f1": kind}) == {"f1": 0.5} for kind in kinds)
    others = [np.array([0.5, 0.6]), torch.ones(2), "0.5", None, np.bool_(True), [0.5]]
    assert not any(of_quality({"f1": kind}) for kind in others)


MCC = {"metric_name": "eval_mcc", "greater_is_better": True, "metric_asked_for": True}


def test_a_metric_that_is_not_finite_is_replaced_by_the_loss_and_a_resumed_run_knows(caplog):
    at_first, cut, ruined = ({"eval_mcc": math.nan, "eval_loss": loss} for loss in (0.5, 0.6, 2.0))
    judge = judge_of(at_first, cut, ruined, ruined, **MCC)
    assert judge.begin(judge.measure()).value == 0.5 and judge.name == "eval_loss" and not judge.greater_is_better
    judge.just_cut = judge.measure()
    resumed = judge_of(ruined, **MCC)
    resumed.load_state_dict(json.loads(json.dumps(judge.state_dict())))
    for one in (judge, resumed):
        now = one.measure()
        assert now.value == 2.0 and one.worse(now) and one.spoiled(now) and one.behind(now) == "eval_loss"
    assert caplog.text.count("eval_mcc is nan for the uncut model") == 1 and "eval_loss judges" in caplog.text


def test_without_a_finite_loss_the_divergence_judges_in_place_of_a_metric(monkeypatch, caplog):
    away = [0.1, 0.9]
    monkeypatch.setattr(Judge, "_divergence", lambda self, uncut: away.pop(0))
    judge = judge_of(*[{"eval_mcc": math.nan}] * 3, **MCC)
    assert judge.begin(judge.measure()).value is None
    judge.just_cut = judge.measure(uncut=torch.nn.Identity())
    assert judge.worse(judge.measure(uncut=torch.nn.Identity())) and "uncut model's judges" in caplog.text


def test_a_metric_that_is_nan_after_the_cut_alone_leaves_the_stage_to_the_loss():
    moments = [{"eval_mcc": value, "eval_loss": loss} for value, loss in ((0.8, 0.5), (math.nan, 0.6), (math.nan, 2))]
    judge = judge_of(*moments, **MCC)
    judge.begin(judge.measure())
    judge.just_cut = judge.measure()
    assert judge.worse(judge.measure()) and judge.name == "eval_mcc"


def test_a_rule_of_the_users_own_cannot_be_held_against_nan():
    judge = judge_of({"eval_mcc": math.nan, "eval_f1": 0.5}, **MCC)
    judge.config = RMTKDConfig(target_reduction=0.5, max_metric_drop=0.1)
    with pytest.raises(RMTKDError, match=r"eval_mcc is nan .* max_metric_drop expects.*finite are eval_f1"):
        judge.begin(judge.measure())


@pytest.mark.parametrize("value", [None, "0.9", [0.5, 0.6], np.ones(2)])
def test_a_metric_that_was_asked_for_and_is_no_number_was_given_and_is_nan(value, caplog):
    said = set()
    for _ in range(2):
        assert math.isnan(numbers_of({"eval_mcc": value, "eval_note": "x"}, "eval_mcc", said)["eval_mcc"])
    assert caplog.text.count("The evaluation gave eval_mcc=") == 1 and "eval_note" not in caplog.text


def test_a_mistyped_metric_is_answered_with_the_nearest():
    with pytest.raises(RMTKDError, match=r"Did you mean eval_accuracy\?"):
        judge_of({"eval_accuracy": 0.8}, **(MCC | {"metric_name": "eval_acuracy"})).measure()
