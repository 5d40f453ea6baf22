"""Every way in which transformers can train works with cuts on the way, or is refused by name before them."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForSequenceClassification, TrainerCallback, TrainingArguments

from ..surgery import zoo
from .conftest import tiny_bert, toy_data
from .modes import KINDS, MODES, model_of, table


GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "modes.md"
RECIPE = {"target_reduction": 0.4, "rounds": 2, "stage_share": 0.5}  # a cut before the first step, one in the midst
KNOWN = {field.name for field in fields(TrainingArguments) if field.init and not field.name.startswith("_")}


class Watched(TrainerCallback):
    """What the model was after each step: its class, and a sum that changes with its weights."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weights = sum(float(parameter.detach().double().abs().sum()) for parameter in model.parameters())
        self.steps.append((sum(parameter.numel() for parameter in model.parameters()), weights))


@pytest.fixture(autouse=True)
def nothing_stays():
    """Some arguments reach beyond their run: into the environment, accelerate's state, and torch."""
    before = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "mode", [pytest.param(m, id=m.title, marks=() if m.quick else pytest.mark.slow) for m in MODES]
)
def test_it_trains_and_is_cut_or_is_refused(make_trainer, tmp_path, mode):
    if mode.needs and importlib.util.find_spec(mode.needs) is None:
        pytest.skip(f"needs {mode.needs}")
    if unknown := set(mode.arguments) - KNOWN:
        pytest.skip(f"this transformers has no {', '.join(unknown)}")
    model = model_of(mode)

    def made():
        given = mode.given(model)
        objectives = given.pop("objectives", None) if isinstance(given, dict) else None
        arguments = {"max_steps": 6, **mode.arguments}
        return make_trainer(model, recipe=RECIPE, objectives=objectives, trainer_kwargs=dict(given), **arguments)

    if mode.refused is not None:
        kind, text = mode.refused
        with pytest.raises(kind, match=text):
            made().train()
        assert type(model).__name__ == "BertForSequenceClassification"
        return
    trainer, watched = made(), Watched()
    trainer.add_callback(watched)
    trainer.train()
    _check_training(trainer, watched, model)
    _check_reload(trainer, model, tmp_path / "saved")


def _check_training(trainer, watched, model):
    assert len(trainer.stages) == 2 and trainer.stages[-1].accepted, trainer.stages
    assert trainer.model is model and model.config.model_type == "rmtkd_bert"
    uncut = sum(parameter.numel() for parameter in tiny_bert().parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) <= 0.61 * uncut
    sizes = [size for size, _ in watched.steps]
    assert len(watched.steps) == trainer.state.global_step and len(set(sizes)) == 2  # of which one after each cut
    for size in set(sizes):
        weights = [weight for this, weight in watched.steps if this == size]
        assert len(set(weights)) >= 2  # it trains after each cut
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses and all(math.isfinite(loss) for loss in losses)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def _check_reload(trainer, model, folder):
    trainer.save_model(str(folder))
    again = AutoModelForSequenceClassification.from_pretrained(folder, dtype=model.dtype)
    tensors = model.state_dict()
    assert again.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.state_dict().items())
    rows = toy_data(4)
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
    plain = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    with torch.no_grad():
        assert zoo.close(again.eval()(**batch).logits, plain(**batch).logits)


def test_the_guide_shows_what_is_tested():
    assert table() in GUIDE.read_text(encoding="utf8")


def test_every_training_argument_was_thought_of():
    """A new one of transformers fails here: is it tied to the layers of a model? Then into `modes`, else into
    the guide's list."""
    declared = {name for mode in MODES for name in mode.arguments}
    listed = GUIDE.read_text(encoding="utf8").split("## Several processes", 1)[1]
    missing = {name for name in KNOWN - declared if f"`{name}`" not in listed}
    assert not missing and KINDS


def test_a_schedule_that_follows_a_metric_counts_anew_after_each_cut(make_trainer):
    """The best of the larger network is none to be reached by a narrower one."""
    bests = []

    class Bests(TrainerCallback):
        def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
            bests.append(lr_scheduler.best)

    trainer = make_trainer(
        recipe=RECIPE, max_steps=6, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1
    )
    trainer.callback_handler.callbacks.insert(0, Bests())  # before the cut of the same step
    trainer.add_callback(Bests())  # after it
    trainer.train()
    cut = trainer.stages[1].step
    assert math.isfinite(bests[2 * (cut - 1)]) and math.isinf(bests[2 * (cut - 1) + 1])
    assert all(map(math.isfinite, bests[2 * cut :]))


@pytest.mark.parametrize("given", [False, True])
def test_adagrad_knows_its_new_parameters(make_trainer, given):
    """It gives each parameter its state when it is made, and stops at one that has none."""
    model = tiny_bert()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=1e-3, initial_accumulator_value=0.5) if given else None
    trainer = make_trainer(
        model,
        recipe=RECIPE,
        max_steps=4,
        optim="adagrad",
        trainer_kwargs={"optimizers": (optimizer, None), "eval_dataset": None},
    )
    trainer.train()
    raw = trainer.optimizer.optimizer
    assert set(raw.state) == set(model.parameters())
    assert all(raw.state[p]["sum"].shape == p.shape and (raw.state[p]["sum"] >= 0.5 * given).all() for p in raw.state)
