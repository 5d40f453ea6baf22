"""Targets are met over several cuts, too, at the default steps of widths and on a model for which they are coarse."""

from __future__ import annotations

import pytest
import torch

from optimum_rmtkd import count_parameters
from optimum_rmtkd.errors import BudgetError, LatencyError, RMTKDError
from optimum_rmtkd.surgery.budget import flops_of
from optimum_rmtkd.surgery.sites import linear_layers
from optimum_rmtkd.surgery.surgeon import anatomy_of

from ..surgery.timing import machine, model_seconds  # noqa: F401
from ..tables import covering
from .conftest import tiny_bert, toy_data


COARSE = {"round_to": 16, "min_width": 8, "refit": False}


@pytest.mark.parametrize(("schedule", "target"), covering(["rounds", "layerwise"], [0.8, 0.3, 0.55]))
def test_a_schedule_ends_at_its_target(make_trainer, schedule, target):
    recipe = COARSE | {"schedule": schedule, "target_reduction": target}
    if schedule == "rounds":
        recipe["rounds"] = 3
    else:  # edges that ask for more than the target, so that it has to trim the last cut
        recipe |= {"edge_estimator": "fixed", "fixed_rank": 4}
    model = tiny_bert()
    before = count_parameters(model)
    trainer = make_trainer(model, recipe=recipe)
    trainer.train()
    reached = 1 - count_parameters(trainer.model) / before
    assert len(trainer.stages) >= 1 if schedule == "layerwise" else len(trainer.stages) == 3
    assert -1e-9 <= reached - target <= 0.01


@pytest.mark.parametrize("rounds", [1, 2])
def test_rounds_of_flops_end_near_their_target(make_trainer, rounds):
    model = tiny_bert()
    rows = [row | {"attention_mask": torch.ones_like(row["attention_mask"])} for row in toy_data()]  # of one length
    recipe = COARSE | {"target_reduction": None, "target_flops": 0.6, "rounds": rounds}
    trainer = make_trainer(model, recipe=recipe, trainer_kwargs={"train_dataset": rows})

    def flops(model):
        anatomy = anatomy_of(model, trainer.rmtkd_config)
        positions = {path: 1.0 if "pooler" in path or "classifier" in path else 10.0 for path in linear_layers(model)}
        return flops_of(model, anatomy, positions)({})

    before = flops(model)
    trainer.train()
    assert len(trainer.stages) == rounds
    assert 0 <= 1 - flops(trainer.model) / before - 0.6 <= 0.01


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize(
    ("target", "what"),
    [({"target_reduction": 0.99}, "parameters"), ({"target_reduction": None, "target_flops": 0.99}, "FLOPs")],
)
def test_a_target_out_of_reach_is_refused_before_the_first_step(make_trainer, rounds, target, what):
    """The first of several cuts could still be made, and the last one would end the run hours later."""
    trainer = make_trainer(recipe=COARSE | target | {"rounds": rounds})
    with pytest.raises(BudgetError, match=f"{what} was asked for.* cannot get below"):
        trainer.train()
    assert trainer.state.global_step == 0 and not trainer.stages


def test_training_goes_on_after_the_target_is_met(make_trainer):
    trainer = make_trainer(recipe=COARSE | {"target_reduction": 0.5, "rounds": 1})
    trainer.train()
    reached = count_parameters(trainer.model)
    trainer.train()
    assert len(trainer.stages) == 1 and count_parameters(trainer.model) == reached


def sized(trainer):
    """The metric is the number of parameters: a search ends where it is known to."""
    return {"compute_metrics": lambda prediction: {"size": float(count_parameters(trainer().model))}}


def test_a_trainer_finds_the_size(make_trainer, capsys):
    made = []
    trainer = make_trainer(
        recipe={"target_reduction": None, "tolerance": 30, "rounds": 3, "round_share": 0.2, "stage_share": 0.75},
        metric_for_best_model="size",
        greater_is_better=True,
        trainer_kwargs=sized(lambda: made[0]),
    )
    made.append(trainer)
    whole = count_parameters(trainer.model)
    output = trainer.train()
    assert [s.status for s in trainer.stages] == ["accepted", "rolled_back"] and trainer.state.global_step == 8
    assert output.metrics["reduction"] == pytest.approx(0.2, abs=0.01)
    assert trainer.stages[1].parameters_after == pytest.approx(0.64 * whole, rel=0.02)
    assert "rolled_back" in capsys.readouterr().out
    trainer.train()  # on, without another cut
    assert len(trainer.stages) == 2


def test_a_tolerance_needs_something_to_measure(make_trainer):
    recipe = {"target_reduction": None, "tolerance": 0.5}
    with pytest.raises(RMTKDError, match="tolerance compares validation metrics; expected an eval_dataset"):
        make_trainer(recipe=recipe, trainer_kwargs={"eval_dataset": None})


def test_a_trainer_meets_a_time(make_trainer, machine):  # noqa: F811
    machine()
    model = tiny_bert()
    before = model_seconds(model)
    trainer = make_trainer(model, recipe={"target_reduction": None, "target_latency": 0.9, "latency_length": 10})
    trainer.train()
    assert model_seconds(trainer.model) / before == pytest.approx(0.9, rel=0.1)
    (stage,) = trainer.stages
    assert stage.note.startswith("latency ") and "batch 1, length 10, cpu" in stage.note


def test_a_time_out_of_reach_is_refused_before_the_first_step(make_trainer, machine):  # noqa: F811
    machine()
    trainer = make_trainer(recipe={"target_reduction": None, "target_latency": 0.01, "fit_share": 0.5})
    with pytest.raises(LatencyError, match="at least"):
        trainer.train()
    assert trainer.state.global_step == 0 and not trainer.stages
