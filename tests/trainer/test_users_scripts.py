"""What scripts do with a plain Trainer works behind the mixin as well."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from transformers import Trainer, TrainerCallback

from optimum_rmtkd import RMTKDMixin

from .conftest import toy_data


CUT = {"fit_share": 0.5, "target_reduction": 0.4, "round_to": 4, "min_width": 4}  # its model has a tensor more


class ItsOwnRows(Trainer):
    """A loader that knows of its data by itself."""

    def get_train_dataloader(self):
        rows = torch.utils.data.DataLoader(toy_data(), batch_size=8, shuffle=True, collate_fn=self.data_collator)
        return self.accelerator.prepare(rows)


def test_a_loader_may_know_of_its_data_by_itself(make_trainer):
    kind = type("Own", (RMTKDMixin, ItsOwnRows), {})
    own = make_trainer(trainer_class=kind, max_steps=2, trainer_kwargs={"train_dataset": None})
    own.train()
    assert own.stages[0].accepted and own.train_dataset is None


class LayerByLayer(Trainer):
    """Rates that fall from parameter to parameter: a group for each, of which a narrowed model may have more."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            names = list(dict(self.model.named_parameters()))
            rates = {name: self.args.learning_rate * 0.97**i for i, name in enumerate(reversed(names))}
            groups = [{"params": [p], "lr": rates[name]} for name, p in self.model.named_parameters()]
            self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer


def test_groups_that_depend_on_the_architecture_follow_it(make_trainer, weights):
    kind, seen = type("Own", (RMTKDMixin, LayerByLayer), {}), []

    def made(out):
        return make_trainer(out=out, trainer_class=kind, max_steps=4, recipe=CUT, save_strategy="steps", save_steps=1)

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
            groups = optimizer.param_groups
            held = {id(p): group["lr"] for group in groups for p in group["params"]}
            rates = [held[id(p)] for p in model.parameters()]  # of every parameter, and of no other
            assert len(held) == len(rates) == len(groups) == len(lr_scheduler.base_lrs)
            steps = [a / b for a, b in zip(rates, rates[1:], strict=False) if b]
            assert steps == pytest.approx([0.97] * len(steps))
            seen.append(len(rates))

    whole = made("whole")
    whole.add_callback(Look())
    whole.train()
    assert whole.stages[0].step == 2 and seen[0] == seen[1] != seen[2] == seen[3]
    resumed = made("resumed")
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
    ours, theirs = weights(resumed.model), weights(whole.model)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_metrics_that_are_no_numbers_do_not_end_a_run(make_trainer):
    def metrics(prediction):
        right = prediction.predictions.argmax(-1) == prediction.label_ids
        return {"accuracy": right.mean(), "confusion": numpy.eye(2), "each": [0.5, 0.5], "tool": "mine"}

    trainer = make_trainer(
        max_steps=2, eval_strategy="steps", eval_steps=1, trainer_kwargs={"compute_metrics": metrics}
    )
    trainer.train()
    assert set(trainer.stages[0].metrics_after) == {"eval_accuracy", "eval_loss"}
    told = json.loads((Path(trainer.args.output_dir) / "rmtkd_results.json").read_text())
    line = next(line for line in told["log_history"] if "eval_accuracy" in line)
    assert line["eval_confusion"] == [[1, 0], [0, 1]] and line["eval_tool"] == "mine"
