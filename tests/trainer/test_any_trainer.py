"""What a subclass of a trainer overrides keeps its meaning behind the mixin."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from optimum_rmtkd import RMTKDConfig, RMTKDError
from optimum_rmtkd.trainer import RMTKDMixin, RMTKDTrainer, pace

from .conftest import tiny_bert, toy_data
from .test_stream import Rows
from .test_trainer import history


def unlabelled(samples=16):
    return [{k: v for k, v in row.items() if k != "labels"} for row in toy_data(samples, seed=2)]


class Answering(Trainer):
    """In the shape of question answering: evaluation data without labels, metrics from post-processing."""

    asked = 0

    def evaluate(self, eval_dataset=None, eval_examples=None, ignore_keys=None, metric_key_prefix="eval"):
        type(self).asked += 1
        loader = self.get_eval_dataloader(self.eval_dataset if eval_dataset is None else eval_dataset)
        output = self.evaluation_loop(loader, description="Evaluation", prediction_loss_only=False)
        torch.rand(3)  # post-processing may draw
        metrics = {f"{metric_key_prefix}_spread": float(output.predictions.std()), f"{metric_key_prefix}_f1": 50.0}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class RMTKDAnswering(RMTKDMixin, Answering):
    pass


class Counter(TrainerCallback):
    def __init__(self):
        self.evaluations = 0

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.evaluations += 1


def test_stages_are_judged_by_what_evaluate_returns(make_trainer):
    trainer = make_trainer(
        trainer_class=RMTKDAnswering,
        max_steps=4,
        metric_for_best_model="f1",
        trainer_kwargs={"eval_dataset": unlabelled()},
    )
    counter = Counter()
    trainer.add_callback(counter)
    trainer.train()
    (stage,) = trainer.stages
    assert stage.metric_name == "eval_f1" and stage.metric_before == stage.metric_after == 50.0
    assert set(stage.metrics_before) == set(stage.metrics_after) == {"eval_spread", "eval_f1"}
    assert counter.evaluations == 0 and not any("eval_f1" in line for line in trainer.state.log_history)
    trainer.evaluate()
    assert counter.evaluations == 1 and trainer.state.log_history[-1]["eval_f1"] == 50.0


def test_what_evaluate_draws_does_not_reach_the_training(make_trainer):
    losses = []
    for given in (unlabelled(), None):
        torch.manual_seed(0)
        trainer = make_trainer(
            trainer_class=RMTKDAnswering, max_steps=4, recipe={"disable_dropout": False},
            metric_for_best_model="f1", trainer_kwargs={"eval_dataset": given},
        )  # fmt: skip
        trainer.train()
        losses.append(history(trainer))
    assert losses[0] == losses[1]


def test_evaluation_data_without_labels_is_said_once(make_trainer, caplog):
    trainer = make_trainer(
        max_steps=4, recipe={"rounds": 2, "target_reduction": 0.5}, trainer_kwargs={"eval_dataset": unlabelled()}
    )
    trainer.train()
    assert [stage.metric_name for stage in trainer.stages] == [None, None]
    assert all(stage.divergence_after is not None for stage in trainer.stages)
    assert caplog.text.count("judged without a metric") == 1


class OwnData(Trainer):
    """Rows and a collator of its own."""

    collated = 0

    def get_train_dataloader(self):
        def collate(rows):
            type(self).collated += 1
            batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
            return batch | {"input_ids": batch["input_ids"].flip(1), "attention_mask": batch["attention_mask"].flip(1)}

        loader = torch.utils.data.DataLoader(self.train_dataset, batch_size=8, shuffle=True, collate_fn=collate)
        return self.accelerator.prepare(loader)


class OwnBatches(Trainer):
    """A loader that is none of torch's."""

    def get_train_dataloader(self):
        rows, collate = self.train_dataset, self.data_collator

        class Loader:
            def __iter__(self):
                return (collate(rows[i : i + 8]) for i in range(0, len(rows), 8))

            def __len__(self):
                return len(rows) // 8

        return Loader()


def test_calibration_goes_through_the_loader_of_a_subclass(make_trainer):
    own = make_trainer(trainer_class=type("Own", (RMTKDMixin, OwnData), {}), max_steps=2)
    batch = next(iter(own.calibration_batches()))
    assert type(own).collated and not bool(batch["attention_mask"][:, 0].all())  # padding lies on the left there
    assert len({tuple(row.tolist()) for b in own.calibration_batches() for row in b["input_ids"]}) == 32
    own.train()
    assert own.stages[0].accepted


def test_batches_of_a_loader_without_rows_calibrate_a_cut(make_trainer):
    own = make_trainer(trainer_class=type("Own", (RMTKDMixin, OwnBatches), {}), max_steps=2)
    batches = list(own.calibration_batches())
    assert [len(batch["input_ids"]) for batch in batches] == [8] * 4  # calibration_samples is 32
    again = list(own.calibration_batches())
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    own.train()
    assert own.stages[0].accepted


class OwnGenerator(Trainer):
    """Batches that come once, and anew for each loader that is asked for."""

    def get_train_dataloader(self):
        rows, collate = self.train_dataset, self.data_collator
        return (collate(rows[i : i + 8]) for i in range(0, len(rows), 8))


def test_a_second_look_begins_at_the_first_row(make_trainer):
    """A few batches were looked at before, of a loader that is one generator."""
    own = make_trainer(trainer_class=type("Own", (RMTKDMixin, OwnGenerator), {}))
    few = list(own.calibration_batches(samples=8))
    batches = list(own.calibration_batches())
    assert [len(batch["input_ids"]) for batch in batches] == [8] * 4
    assert torch.equal(batches[0]["input_ids"], few[0]["input_ids"])
    assert len({tuple(row.tolist()) for batch in batches for row in batch["input_ids"]}) == 32


class OwnStream(Trainer):
    """A loader over data that are iterated."""

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=8, collate_fn=self.data_collator)


@pytest.mark.parametrize("once", [False, True])
def test_rows_that_come_once_do_not_get_lost_in_a_loader_of_a_subclass(make_trainer, once):
    """The calibration would take them from the training, without a word."""
    rows, kind = Rows(1000, once), type("Own", (RMTKDMixin, OwnStream), {})
    own = make_trainer(trainer_class=kind, max_steps=2, trainer_kwargs={"train_dataset": rows})
    if once:
        with pytest.raises(RMTKDError, match=r"get_train_dataloader\(\) reads a Rows that can be read once"):
            own.train()
        assert rows.read < 16 and not own.stages
        return
    own.train()
    assert own.stages[0].accepted


@pytest.mark.parametrize("teacher", [None, "another"])
def test_models_that_answer_in_tuples_train(make_trainer, teacher):
    model = tiny_bert(return_dict=False)
    given = None if teacher is None else tiny_bert(seed=3, return_dict=False)
    trainer = make_trainer(model, teacher_model=given, max_steps=3)
    trainer.train()
    assert len(history(trainer, "loss/kl")) == 3 and trainer.stages[0].metrics_after["eval_loss"] > 0
    assert trainer.model.config.return_dict is False
    assert isinstance(trainer.model(**trainer.data_collator(toy_data(2))), tuple)


class Accuracy:
    def __call__(self, prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean()), "wide": 1}


def test_every_metric_of_the_evaluation_is_measured_before_and_after(make_trainer):
    trainer = make_trainer(max_steps=3, trainer_kwargs={"compute_metrics": Accuracy()})
    trainer.train()
    (stage,) = trainer.stages
    for metrics in (stage.metrics_before, stage.metrics_cut, stage.metrics_after):
        assert set(metrics) == {"eval_loss", "eval_accuracy", "eval_wide"}
    assert stage.metrics_after["eval_accuracy"] == trainer.evaluate()["eval_accuracy"]


# -- learning rates ---------------------------------------------------------------------------------------------------


def rates(trainer):
    return [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]


@pytest.fixture
def plain_rate(monkeypatch):
    """The rate as given, and a warm-up of two steps."""
    from optimum_rmtkd.trainer.rates import Rate

    monkeypatch.setattr(pace, "distil_rate", lambda given, removed, steps: Rate(given / 2, "for the test"))
    monkeypatch.setattr(pace, "warmup_steps", lambda steps: 2)


def test_one_schedule_a_phase(make_trainer, plain_rate, caplog):
    trainer = make_trainer(max_steps=10, recipe={"fit_share": 0.4, "distil_learning_rate": None}, learning_rate=1e-3)
    trainer.train()
    fit = [1e-3 * (1 - round(step * 10 / 4) / 10) for step in range(4)]  # the whole schedule, in its own steps
    half, warm = 5e-4, [1 / 3, 2 / 3, 1, 1, 1, 1]
    distil = [half * (1 - round(step * 10 / 6) / 10) * w for step, w in zip(range(6), warm, strict=True)]
    assert rates(trainer) == pytest.approx([*fit, *distil])
    assert trainer.stages[0].step == 4 and "Distilling at a peak for the test" in caplog.text
    assert trainer.stages[0].learning_rate == pytest.approx(half)


FIT = {"fit_share": 0.4, "distil_learning_rate": None}


def linear(optimizer, steps):
    return transformers.get_linear_schedule_with_warmup(optimizer, 0, steps)


class OwnSchedule(RMTKDTrainer):
    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = linear(self.optimizer if optimizer is None else optimizer, num_training_steps)
        return self.lr_scheduler


@pytest.mark.parametrize("whose", ["given", "of a subclass"])
def test_a_schedule_of_the_users_own_has_phases(make_trainer, plain_rate, whose, caplog):
    model, given = tiny_bert(), {}
    if whose == "given":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        given = {"trainer_kwargs": {"optimizers": (optimizer, linear(optimizer, 10))}}
    usual = make_trainer(max_steps=10, recipe=FIT, out="usual")
    usual.train()
    caplog.clear()
    cls = RMTKDTrainer if given else OwnSchedule
    trainer = make_trainer(model, max_steps=10, recipe=FIT, trainer_class=cls, **given)
    trainer.train()
    assert rates(trainer) == pytest.approx(rates(usual)) and "Distilling at a peak for the test" in caplog.text
    if whose == "given":  # as it was where nothing is cut any more
        trainer.lr_scheduler.last_epoch = 0
        trainer.train()
        assert rates(trainer)[-10:] == pytest.approx([1e-3 * (1 - step / 10) for step in range(10)])


def test_a_schedule_that_is_no_function_of_the_step_stays_whole_and_is_told(make_trainer, plain_rate, caplog):
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    recipe = {"distil_learning_rate": None}
    trainer = make_trainer(model, max_steps=4, recipe=recipe, trainer_kwargs={"optimizers": (optimizer, schedule)})
    trainer.train()
    assert rates(trainer) == pytest.approx([1e-3 * 0.5**step for step in range(4)])
    assert trainer.stages[0].learning_rate is None
    assert "The learning rate stays yours: its schedule is not known as a function of the step" in caplog.text


def test_rates_that_differ_by_group_stay_and_are_told(make_trainer, plain_rate, caplog):
    model = tiny_bert()
    head = list(model.classifier.parameters())
    groups = [{"params": list(model.bert.parameters()), "lr": 1e-4}, {"params": head, "lr": 1e-3}]
    recipe = {"distil_learning_rate": None}
    trainer = make_trainer(
        model, max_steps=2, recipe=recipe, trainer_kwargs={"optimizers": (torch.optim.AdamW(groups), None)}
    )
    trainer.train()
    assert "its groups have rates of their own" in caplog.text and "allow 2e-05 to" in caplog.text


@pytest.mark.parametrize("kind", ["constant", "cosine", "polynomial", "inverse_sqrt"])
def test_every_schedule_of_transformers_has_phases(make_trainer, plain_rate, kind):
    trainer = make_trainer(
        max_steps=8, recipe={"fit_share": 0.5, "distil_learning_rate": None}, lr_scheduler_type=kind, warmup_steps=1
    )
    trainer.train()
    found = rates(trainer)
    assert len(found) == 8 and max(found[4:]) == pytest.approx(5e-4, rel=0.7) and max(found) <= 1e-3


def test_a_rate_of_the_recipe_is_taken(make_trainer):
    trainer = make_trainer(max_steps=4, recipe={"distil_learning_rate": 2e-4}, lr_scheduler_type="constant")
    trainer.train()
    assert rates(trainer)[-1] == pytest.approx(2e-4)


# -- fine-tuning first ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_run_that_fits_first_resumes_with_the_same_bits(make_trainer, weights, step):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    whole = make_trainer(recipe={"fit_share": 0.5}, out="whole", **saving)
    whole.train()
    assert [stage.step for stage in whole.stages] == [4] and history(whole, "loss/task")
    resumed = make_trainer(recipe={"fit_share": 0.5}, out="resumed", **saving)
    torch.rand(9)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
    ours, theirs = weights(resumed.model), weights(whole.model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert history(resumed) == history(whole) and rates(resumed) == rates(whole)
    assert [s.to_dict() for s in resumed.stages] == [s.to_dict() for s in whole.stages]


def test_a_new_head_is_fine_tuned_first_without_being_asked(make_trainer, caplog):
    trainer = make_trainer(max_steps=10, recipe={"fit_share": None})
    trainer.train()
    assert trainer.stages[0].step == 6
    assert "fine-tuned for 6 of 10 steps before its first cut, at 1.5 times the learning rate" in caplog.text
    highest = max(entry["learning_rate"] for entry in trainer.state.log_history[:6] if "learning_rate" in entry)
    assert highest > 1.2 * trainer.args.learning_rate


def test_what_a_run_lost_is_said_at_its_end(make_trainer, caplog):
    caplog.set_level(logging.WARNING)
    worth = iter([0.9, 0.8, 0.8])
    trainer = make_trainer(
        max_steps=2,
        metric_for_best_model="worth",
        trainer_kwargs={"compute_metrics": lambda prediction: {"worth": next(worth)}},
    )
    trainer.train()
    assert "eval_worth fell from 0.9 to 0.8. Three things to try" in caplog.text


def test_a_trainer_of_transformers_behind_the_mixin_is_the_shipped_one():
    assert issubclass(RMTKDTrainer, RMTKDMixin) and issubclass(RMTKDTrainer, Trainer)


class Ordered(Trainer):
    """As DPOTrainer has it: the arguments are not the second of the parameters."""

    def __init__(self, model, reference=None, args=None, train_dataset=None, eval_dataset=None):
        self.reference = reference
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset)


class RMTKDOrdered(RMTKDMixin, Ordered):
    pass


def test_arguments_keep_the_order_of_the_trainer_behind(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
    for given in (("reference", args, toy_data()), ()):
        named = {} if given else {"reference": "reference", "args": args, "train_dataset": toy_data()}
        trainer = RMTKDOrdered(tiny_bert(), *given, rmtkd_config=RMTKDConfig(target_reduction=0.3), **named)
        assert trainer.args is args and trainer.reference == "reference" and len(trainer.train_dataset) == 64
    endless = (row for row in toy_data())
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(RMTKDError, match="max_steps"):
        RMTKDOrdered(tiny_bert(), None, args, endless)


# -- what judges ------------------------------------------------------------------------------------------------------


def test_an_error_is_to_be_small_whatever_the_arguments_make_of_its_name(make_trainer, caplog):
    """TrainingArguments takes greater for better wherever a name does not end in "loss"."""
    worth = iter([0.9, 0.8, 0.5, 0.5])
    trainer = make_trainer(
        max_steps=2,
        metric_for_best_model="mse",
        trainer_kwargs={"compute_metrics": lambda prediction: {"mse": next(worth)}},
    )
    assert caplog.text.count("greater_is_better=True for metric_for_best_model='mse'") == 1
    assert trainer.greater_is_better is False and trainer.args.greater_is_better is False
    trainer.train()
    assert trainer.stages[0].metric_after == 0.5 and not trainer.stages[0].note
    caplog.clear()
    for name, greater in (("accuracy", True), ("neg_mean_squared_error", True), ("eval_loss", False)):
        assert make_trainer(out=name, metric_for_best_model=name).args.greater_is_better is greater
    assert "greater_is_better" not in caplog.text


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [RMTKDTrainer, type("Own", (RMTKDMixin, OwnData), {})], ids=["usual", "own loader"])
def test_calibration_takes_no_larger_batches_than_training(make_trainer, cls):
    """It has a backward pass, for which a batch of the evaluation may be too large."""
    trainer = make_trainer(trainer_class=cls, per_device_train_batch_size=4, per_device_eval_batch_size=16)
    assert {len(batch["input_ids"]) for batch in trainer.calibration_batches()} == {4}
    trainer._train_batch_size = 2  # found by running out of memory
    assert {len(batch["input_ids"]) for batch in trainer.calibration_batches()} == {2}
