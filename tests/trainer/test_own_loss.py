"""A loss of the user's own is the task's term; the other terms stay."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import BertForTokenClassification, Trainer

from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.trainer import RMTKDMixin, RMTKDTrainer

from ..tables import some_slow
from .conftest import ragged, tiny_bert, toy_data
from .test_accumulation import tiny_gpt2


NONE = {"schedule": "none", "target_reduction": None}
WEIGHTS = torch.tensor([1.0, 5.0])


@pytest.fixture(params=["in front", "behind"])
def placed(request):
    """placed(loss): a trainer with that `compute_loss` in front of the mixin, or behind it."""

    def place(loss):
        bases = (loss, RMTKDTrainer) if request.param == "in front" else (RMTKDMixin, loss, Trainer)
        return type(loss.__name__, bases, {})

    return place


class WeightedLoss:
    """As the documentation of transformers weighs classes."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels, weight=WEIGHTS)
        return (loss, outputs) if return_outputs else loss


class Weighted(WeightedLoss, RMTKDTrainer):
    pass


class DoubledLoss:
    """Builds on the loss of the parent."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (2 * loss, outputs) if return_outputs else 2 * loss


class SummedLoss:
    """A sum over the labels divided by the number that it is told, as transformers' own losses."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs.logits.flatten(0, -2)
        loss = F.cross_entropy(logits, labels.flatten(), reduction="sum") / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


SPLITS = [(given, kind) for given in ("in front", "function") for kind in ("three", "token", "causal")]
SPLITS += [("behind", "token"), ("behind", "causal")]
SPLITS = some_slow(
    SPLITS, [("in front", "token"), ("function", "three"), ("function", "causal"), ("behind", "causal")]
)


SPLITS = [(given, kind) for given in ("in front", "function") for kind in ("three", "token", "causal")]
SPLITS += [("behind", "token"), ("behind", "causal")]


SPLITS = [(given, kind) for given in ("in front", "function") for kind in ("three", "token", "causal")]
SPLITS += [("behind", "token"), ("behind", "causal")]


SPLITS = [(given, kind) for given in ("in front", "function") for kind in ("three", "token", "causal")]
SPLITS += [("behind", "token"), ("behind", "causal")]


SPLITS = [(given, kind) for given in ("in front", "function") for kind in ("three", "token", "causal")]
SPLITS += [("behind", "token"), ("behind", "causal")]


def terms(trainer):
    return [e for e in trainer.state.log_history if "loss" in e]


def total(trainer, line):
    return sum(objective.weight * line[f"loss/{objective.label}"] for objective in trainer.objectives)


def silent(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def test_class_weights_are_the_task_term_and_the_other_terms_stay(make_trainer, placed):
    trainer = make_trainer(trainer_class=placed(WeightedLoss), max_steps=3)
    trainer.train()
    for line in terms(trainer):
        assert line["loss"] == pytest.approx(total(trainer, line), rel=1e-5)
    batch = {k: torch.stack([torch.as_tensor(r[k]) for r in trainer.eval_dataset]) for k in trainer.eval_dataset[0]}
    labels = batch.pop("labels")
    with torch.no_grad():
        # two batches of eight, each a weighted mean
        logits = trainer.model.eval()(**batch).logits
        halves = [F.cross_entropy(logits[s], labels[s], weight=WEIGHTS) for s in (slice(8), slice(8, 16))]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(sum(halves) / 2), rel=1e-5)
    assert trainer.stages[-1].metric_after == pytest.approx(float(sum(halves) / 2), rel=1e-5)


def test_an_override_that_calls_the_parent_distils_once(make_trainer, placed):
    plain, doubled = (
        make_trainer(silent(tiny_bert()), out=cls.__name__, trainer_class=cls, recipe=NONE, max_steps=1,
                     teacher_model=tiny_bert(3), objectives=["task", "kl"])
        for cls in (RMTKDTrainer, placed(DoubledLoss))
    )  # fmt: skip
    asked = []
    doubled.run.tutor.given.model.register_forward_hook(lambda *_: asked.append(1))
    plain.train()
    doubled.train()
    ours, theirs = terms(doubled)[0], terms(plain)[0]
    assert len(asked) == 2  # before the training, to see what it answers; and in the one step
    assert ours["loss/task"] == pytest.approx(2 * theirs["loss/task"], rel=1e-5)
    assert ours["loss/kl"] == pytest.approx(theirs["loss/kl"], rel=1e-5)
    assert doubled.evaluate()["eval_loss"] > 1.5 * plain.evaluate()["eval_loss"]


def test_a_function_set_on_the_trainer_counts_as_an_override(make_trainer):
    trainer = make_trainer(max_steps=2)
    mine = Weighted.compute_loss.__get__(trainer)
    trainer.compute_loss = mine
    trainer.train()
    assert "loss/kl" in terms(trainer)[-1] and trainer.compute_loss is mine


@pytest.mark.parametrize(("given", "kind"), SPLITS)
def test_the_split_of_a_batch_changes_nothing(make_trainer, weights, given, kind):
    """A sum over labels divided by their number, over ragged rows."""

    def summed(outputs, labels, num_items_in_batch):
        logits = outputs.logits
        if kind == "causal":
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum") / num_items_in_batch

    class Ragged:
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = summed(outputs, labels, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

    classes = {
        "function": RMTKDTrainer,
        "in front": type("Front", (Ragged, RMTKDTrainer), {}),
        "behind": type("Behind", (RMTKDMixin, Ragged, Trainer), {}),
    }
    classes = {
        "function": RMTKDTrainer,
        "in front": type("Front", (Ragged, RMTKDTrainer), {}),
        "behind": type("Behind", (RMTKDMixin, Ragged, Trainer), {}),
    }
    classes = {
        "function": RMTKDTrainer,
        "in front": type("Front", (Ragged, RMTKDTrainer), {}),
        "behind": type("Behind", (RMTKDMixin, Ragged, Trainer), {}),
    }
    classes = {
        "function": RMTKDTrainer,
        "in front": type("Front", (Ragged, RMTKDTrainer), {}),
        "behind": type("Behind", (RMTKDMixin, Ragged, Trainer), {}),
    }
    classes = {
        "function": RMTKDTrainer,
        "in front": type("Front", (Ragged, RMTKDTrainer), {}),
        "behind": type("Behind", (RMTKDMixin, Ragged, Trainer), {}),
    }
    models = {
        "three": lambda seed: tiny_bert(seed, num_labels=3),
        "token": lambda seed: tiny_bert(seed, BertForTokenClassification, num_labels=3),
        "causal": lambda seed: tiny_gpt2(seed, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    }
    results = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            silent(models[kind](0)),
            out=f"{batch}",
            recipe=NONE,
            teacher_model=models[kind](1),
            objectives=["task", "kl"],
            trainer_class=classes[given],
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            optim="sgd",
            learning_rate=0.05,
            trainer_kwargs={"train_dataset": ragged(kind=kind), "eval_dataset": ragged(16, kind=kind)}
            | ({"compute_loss_func": summed} if given == "function" else {}),
        )
        trainer.train()
        rows = [(e["loss"], e["loss/task"], e["loss/kl"], e["grad_norm"]) for e in terms(trainer)]
        results.append((torch.tensor(rows), weights(trainer.model)))
        assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))
    (whole, ours), (parts, theirs) = results
    assert torch.allclose(whole, parts, rtol=2e-4), (whole, parts)
    assert all(torch.allclose(tensor, theirs[name], atol=2e-6) for name, tensor in ours.items())


def test_columns_that_only_the_override_reads(make_trainer):
    class Rowwise(RMTKDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            weight, labels = inputs.pop("weight"), inputs.pop("labels")
            outputs = model(**inputs)
            loss = (F.cross_entropy(outputs.logits, labels, reduction="none") * weight).mean()
            return (loss, outputs) if return_outputs else loss

    rows = [row | {"weight": float(i % 3)} for i, row in enumerate(toy_data())]
    trainer = make_trainer(
        trainer_class=Rowwise, max_steps=2, remove_unused_columns=False,
        trainer_kwargs={"train_dataset": rows, "eval_dataset": rows[:16]},
    )  # fmt: skip
    trainer.train()
    assert "loss/hidden" in terms(trainer)[-1] and trainer.stages[0].accepted


def test_two_passes_of_one_batch(make_trainer):
    """R-Drop: the loss compares two passes with different dropout."""

    class Twice(RMTKDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            first, outputs = super().compute_loss(model, dict(inputs), True)
            second, again = super().compute_loss(model, dict(inputs), True)
            loss = first + second + (outputs["logits"] - again["logits"]).square().mean()
            return (loss, outputs) if return_outputs else loss

    trainer = make_trainer(trainer_class=Twice, max_steps=2)
    trainer.train()
    assert {"loss/task", "loss/kl", "loss/hidden"} <= set(terms(trainer)[-1])


def test_a_subclass_may_replace_the_whole_loss(make_trainer, placed):
    class Whole(SummedLoss):
        replaces_loss = True

    class Scaled(RMTKDTrainer):
        replaces_loss = True

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, True)  # the weighted sum of all terms
            return (10 * loss, outputs) if return_outputs else 10 * loss

    trainer = make_trainer(trainer_class=placed(Whole), max_steps=2)
    trainer.train()
    assert not any(key.startswith("loss/") for line in terms(trainer) for key in line)
    assert trainer.evaluate()["eval_loss"] < 2  # a mean
    scaled = make_trainer(trainer_class=Scaled, out="scaled", max_steps=2)
    scaled.train()
    for line in terms(scaled):
        assert line["loss"] == pytest.approx(10 * total(scaled, line), rel=1e-5)


def test_a_task_term_that_is_not_used_draws_a_warning(make_trainer, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(trainer_class=Weighted, recipe={"task_weight": 0.0}, max_steps=1)
        trainer.train()
    assert "compute_loss of Weighted" in caplog.text and "loss/kl" in terms(trainer)[0]


def test_a_training_step_that_passes_us_by_draws_a_warning(make_trainer, caplog):
    class Bare(RMTKDTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**self._prepare_inputs(inputs)).loss
            self.accelerator.backward(loss)
            return loss.detach()

    class Usual(RMTKDTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    for cls, warned in ((Bare, True), (Usual, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            trainer = make_trainer(out=cls.__name__, trainer_class=cls, max_steps=2)
            trainer.train()
        assert (caplog.text.count("trains on a loss of its own") == 1) is warned
        assert ("loss/kl" in terms(trainer)[0]) is not warned


@pytest.mark.parametrize("said", [False, True])
def test_a_loss_that_replaces_all_terms_weighs_accumulation_as_it_says(make_trainer, placed, said):
    """A mean over the micro-batch, or a part of the accumulated batch that it says it is scaled for."""
    losses = []
    whole = type("Whole", (SummedLoss,), {"replaces_loss": True} | ({"loss_is_scaled_for_ga": True} if said else {}))
    for size, steps in ((8, 1), (2, 4)):
        trainer = make_trainer(
            silent(tiny_bert()), recipe=NONE, teacher_model=tiny_bert(1), trainer_class=placed(whole), max_steps=1,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, out=str(size),
        )  # fmt: skip
        trainer.train()
        losses.append((terms(trainer)[0]["loss"], terms(trainer)[0]["grad_norm"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_an_override_returns_is_checked(make_trainer, placed):
    class Alone:
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return model(**inputs).loss

    class Bare:
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)
            return outputs.loss, tuple(outputs.values())

    for cls, message in ((Alone, r"of Alone returned a Tensor; expected \(loss, outputs\)"), (Bare, "are a tuple")):
        with pytest.raises(RMTKDError, match=message):
            trainer_kwargs = {"eval_dataset": None}
            make_trainer(trainer_class=placed(cls), out=cls.__name__, trainer_kwargs=trainer_kwargs).train()
    evaluated = make_trainer(trainer_class=placed(Alone), out="evaluated")
    with pytest.raises(RMTKDError, match="of Alone returned a Tensor"):
        evaluated.evaluate()


def test_labels_under_another_name(make_trainer):
    class Targets(RMTKDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            targets = inputs.pop("targets")
            outputs = model(**inputs)
            loss = F.cross_entropy(outputs.logits, targets)
            return (loss, outputs) if return_outputs else loss

    rows = [{"targets" if k == "labels" else k: v for k, v in row.items()} for row in toy_data()]
    trainer = make_trainer(
        trainer_class=Targets, max_steps=2, remove_unused_columns=False, label_names=["targets"],
        trainer_kwargs={"train_dataset": rows, "eval_dataset": rows[:16]},
    )  # fmt: skip
    trainer.train()
    assert "loss/hidden" in terms(trainer)[-1] and trainer.stages[0].metric_after > 0


class DatedLoss:
    """Written before the Trainer told a loss how many items there are."""

    def compute_loss(self, model, inputs, return_outputs=False):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels, weight=WEIGHTS)
        return (loss, outputs) if return_outputs else loss


def test_a_loss_that_takes_no_number_of_items(make_trainer, placed):
    def bare(outputs, labels):
        return F.cross_entropy(outputs.logits, labels, weight=WEIGHTS)

    results = []
    for number, (cls, given) in enumerate(
        [(Weighted, {}), (placed(DatedLoss), {}), (RMTKDTrainer, {"compute_loss_func": bare})]
    ):
        trainer = make_trainer(
            silent(tiny_bert()), out=str(number), trainer_class=cls, max_steps=2, eval_strategy="steps", eval_steps=1,
            trainer_kwargs=given,
        )  # fmt: skip
        trainer.train()
        results.append([terms(trainer)[-1][name] for name in ("loss", "loss/task", "loss/kl")])
        results[-1].append(trainer.evaluate()["eval_loss"])
        assert number or "compute_loss" not in vars(trainer)
    assert results[1] == results[0] and results[2] == pytest.approx(results[0], rel=1e-6)


def test_a_loss_that_cannot_return_outputs_is_refused_at_once(make_trainer, placed):
    class Bare:
        def compute_loss(self, model, inputs):
            return model(**inputs).loss

    with pytest.raises(RMTKDError, match=r"compute_loss\(model, inputs\) of Bare does not take return_outputs"):
        make_trainer(trainer_class=placed(Bare))


def test_a_loss_a_sample_is_refused_by_name(make_trainer):
    class Rowwise(RMTKDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)
            loss = F.cross_entropy(outputs.logits, inputs["labels"], reduction="none")
            return (loss, outputs) if return_outputs else loss

    with pytest.raises(RMTKDError, match=r"compute_loss of Rowwise returned a loss of shape \(8,\)"):
        make_trainer(trainer_class=Rowwise, recipe=NONE, teacher_model=tiny_bert(1), objectives=["task"]).train()
