"""Trainers and callbacks of the user's own, with names, loaders and moments that nobody foresaw."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, default_data_collator

from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.trainer import RMTKDMixin, RMTKDTrainer
from optimum_rmtkd.trainer.hooks.callbacks import Patience
from optimum_rmtkd.trainer.hooks.names import instead, with_wrapper_in_use
from optimum_rmtkd.trainer.swap import rewrapped

from .conftest import tiny_bert, toy_data


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


# -- names ------------------------------------------------------------------------------------------------------------

TAKEN = ("run", "patience", "transforms", "stages", "objectives", "reports", "stream", "metric_name")
TAKEN += ("greater_is_better", "reparameterization", "own_loss", "cuts_to_come")


class Named:
    """In front of the mixin or behind it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in TAKEN:
            setattr(self, name, f"my {name}")


def keeps_its_names(trainer):
    return all(getattr(trainer, name) == f"my {name}" for name in TAKEN)


def test_what_stands_in_for_a_method_goes_away_again():
    trainer = SimpleNamespace(kept=1)
    with instead(trainer, kept=2, new=3):
        assert (trainer.kept, trainer.new) == (2, 3)
    assert vars(trainer) == {"kept": 1}


# -- the wrapper in use -----------------------------------------------------------------------------------------------


def test_a_class_in_front_keeps_its_names_and_gets_the_wrapper_in_use(make_trainer):
    """As a method of the training loop's would be called with a stale one."""
    seen = []

    class Front(Named, RMTKDTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            seen.append(model)
            return super().training_step(model, inputs, num_items_in_batch)

        def _clip_grad_norm(self, model):
            seen.append(model)
            return super()._clip_grad_norm(model)

    trainer = make_trainer(trainer_class=Front, max_steps=2)
    stale, trainer.model_wrapped = trainer.model, torch.nn.Sequential(trainer.model)
    with with_wrapper_in_use(trainer):
        trainer._clip_grad_norm(stale)
        trainer._clip_grad_norm(model=stale)
    assert seen == [trainer.model_wrapped] * 2 and "_clip_grad_norm" not in vars(trainer)
    trainer.model_wrapped = trainer.model
    assert trainer.train().metrics["reduction"] > 0.25 and keeps_its_names(trainer)
    assert len(seen) == 6 and all(model is trainer.model_wrapped for model in seen[2:])


def test_a_wrapper_that_is_retired_goes_on_with_the_one_in_use(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel
        model = torch.nn.Linear(3, 2)
        old = ddp(model)
        model.weight = torch.nn.Parameter(torch.ones(2, 3))
        made = []
        accelerator = SimpleNamespace(_models=[old], prepare=lambda inner: made.append(ddp(inner)) or made[-1])
        fresh = rewrapped(accelerator, model, old, lambda: made[-1])
        old(torch.ones(1, 3)).sum().backward()
        assert fresh is made[-1] and old.module is model and torch.equal(model.weight.grad, torch.ones(2, 3))
    finally:
        torch.distributed.destroy_process_group()


# -- patience ---------------------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    """Counts, keeps time, and writes into a file that it opens."""

    def __init__(self):
        self.patience, self.best, self.bad, self.file, self.began = 3, None, 0, None, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.file, self.began = open(__file__), time.time()


class MyStop(EarlyStoppingCallback):
    def __init__(self, patience, warmup=0):
        super().__init__(early_stopping_patience=patience)
        self.warmup = warmup


def test_what_a_training_began_with_is_no_count():
    stop = Stop()
    patience = Patience(SimpleNamespace(), SimpleNamespace(callbacks=[stop]))
    stop.on_train_begin(None, None, None)
    patience.begin()
    opened, began = stop.file, stop.began
    stop.best, stop.bad = 0.5, 2
    patience.renew()
    assert stop.file is opened and stop.began == began and (stop.best, stop.bad) == (None, 0)
    opened.close()
    stop.best, stop.bad = 0.5, 2
    patience.remember()  # a second training
    stop.on_train_begin(None, None, None)
    patience.begin()
    patience.renew()
    stop.file.close()
    assert stop.began > began and (stop.best, stop.bad) == (None, 0)


def test_early_stopping_with_a_constructor_of_its_own_counts_anew():
    stop = MyStop(2, warmup=1)
    patience = Patience(SimpleNamespace(), SimpleNamespace(callbacks=[stop]))
    stop.early_stopping_patience_counter = 2  # as a resumed run gives it back
    patience.begin()
    patience.renew()
    assert (stop.early_stopping_patience_counter, stop.early_stopping_patience, stop.warmup) == (0, 2, 1)


# -- evaluations and loaders ------------------------------------------------------------------------------------------


class OwnData(Named, Trainer):
    """Brings its own validation data, and training data whose rows are whole batches."""

    def get_eval_dataloader(self, eval_dataset=None):
        return DataLoader(toy_data(16, seed=2), batch_size=8, collate_fn=default_data_collator)

    def get_train_dataloader(self):
        return self.accelerator.prepare(DataLoader(Batches(), batch_size=None, shuffle=True))


class Batches(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, at):
        return default_data_collator(toy_data()[8 * at : 8 * at + 8])


class OwnDataDistilled(RMTKDMixin, OwnData):
    logged = ()

    def log(self, logs, *args, **kwargs):
        self.logged = [*self.logged, *logs]
        super().log(logs, *args, **kwargs)


class Keeper(TrainerCallback):
    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_data_and_moments_of_a_trainers_own(make_trainer, weights):
    """Evaluations of a model with more outputs than labels; the last of them finds a ruin."""
    model, keeper, seen = tiny_bert(), Keeper(), itertools.count()
    model.config.output_hidden_states = True

    def ruined(prediction):
        assert not isinstance(prediction.predictions, tuple)
        return {"accuracy": [0.9, 0.8, 0.2][min(next(seen), 2)]}

    given = {"eval_dataset": None, "compute_metrics": ruined, "callbacks": [keeper]}
    options = {"metric_for_best_model": "accuracy", "trainer_class": OwnDataDistilled, "max_steps": 4}
    trainer = make_trainer(model=model, trainer_kwargs=given, **options)
    trainer.train(ignore_keys_for_eval=["hidden_states"])
    assert keeps_its_names(trainer)
    (stage,) = trainer._host.run.stages
    assert (stage.metric_cut, stage.metric_after) == (0.8, 0.8) and "the weights just after the cut stay" in stage.note
    ours = weights(trainer.model)
    assert all(torch.equal(tensor, keeper.kept[name]) for name, tensor in ours.items())
    assert "loss" in trainer.logged and not any(name.startswith("eval") for name in trainer.logged)


def test_an_evaluation_that_needs_data_after_all_is_none(make_trainer, caplog):
    class Needs(RMTKDTrainer):
        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
            return {"eval_loss": float(len(self.eval_dataset))}

    given = {"eval_dataset": None}
    trainer = make_trainer(trainer_class=Needs, trainer_kwargs=given, max_steps=2)
    trainer.train()
    assert trainer.stages[0].metrics_after is None
    assert caplog.text.count("evaluate() without an eval_dataset ends with TypeError") == 1
    with pytest.raises(RMTKDError, match="max_metric_drop is about .* ends with TypeError"):
        make_trainer(trainer_class=Needs, trainer_kwargs=given, recipe={"max_metric_drop": 0.1}).train()


@pytest.mark.slow
def test_a_second_training_goes_on_with_a_cut_that_was_broken_off(make_trainer):
    seen = itertools.count()

    def broken(prediction):
        if next(seen) == 1:
            raise KeyboardInterrupt
        return accuracy(prediction)

    trainer = make_trainer(trainer_kwargs={"compute_metrics": broken}, max_steps=4)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [stage.status for stage in trainer.stages] == ["open"]
    trainer.train()
    assert [stage.status for stage in trainer.stages] == ["accepted"]
    assert "eval_accuracy" in trainer.stages[0].metrics_cut


def test_a_forward_that_gives_a_tuple_is_named(make_trainer):
    class Tuples(type(tiny_bert())):
        def forward(self, input_ids=None, attention_mask=None, labels=None):
            outputs = super().forward(input_ids, attention_mask=attention_mask, labels=labels)
            return tuple(outputs.values())

    recipe = {"schedule": "none", "target_reduction": None, "fit_share": None}
    trainer = make_trainer(model=tiny_bert(cls=Tuples), recipe=recipe, max_steps=2)
    with pytest.raises(RMTKDError, match="The forward of Tuples returns a tuple"):
        trainer.train()
