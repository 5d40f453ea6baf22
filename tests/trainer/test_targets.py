"""Targets are met over several cuts, too, at the default steps of widths and on a model for which they are coarse."""

from __future__ import annotations

import pytest

from optimum_rmtkd import count_parameters
from optimum_rmtkd.surgery.budget import flops_of
from optimum_rmtkd.surgery.surgeon import Surgeon

from .conftest import tiny_bert


COARSE = {"round_to": 16, "min_width": 8, "refit": False}


@pytest.mark.parametrize("schedule", ["rounds", "layerwise"])
@pytest.mark.parametrize("target", [0.3, 0.55, 0.8])
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
    trainer = make_trainer(model, recipe=COARSE | {"target_reduction": None, "target_flops": 0.6, "rounds": rounds})

    def flops(model):
        surgeon = Surgeon(model, trainer.get_train_dataloader(), trainer.rmtkd_config, progress=False)
        return flops_of(surgeon.teacher, surgeon.anatomy, dict.fromkeys(surgeon._positions(), 10.0))({})

    before = flops(model)
    trainer.train()
    assert len(trainer.stages) == rounds
    assert 0 <= 1 - flops(trainer.model) / before - 0.6 <= 0.01 * rounds
