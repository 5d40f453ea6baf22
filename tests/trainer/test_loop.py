"""RMTKDLoop: a script's own loop with Accelerate, in the shape of run_glue_no_trainer.py."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

import optimum_rmtkd
from optimum_rmtkd import RMTKDConfig, RMTKDLoop
from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.trainer import pace as pacing
from optimum_rmtkd.trainer.host import Host
from optimum_rmtkd.trainer.stages import JOURNAL

from ..tables import SLOW
from .conftest import RECIPE, tiny_bert, toy_data
from .looping import evaluate, looped, prepared, train


ROUNDS = {"target_reduction": 0.6, "rounds": 2, "stage_share": 0.5, "distil_learning_rate": 1e-3}  # at 0 and 4 of 8
FITTED = ROUNDS | {"fit_share": 0.25}  # and at 2 and 5, after two steps with dropout


def same(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_loop_is_a_host_of_a_run():
    assert isinstance(looped(prepared())._host, Host)


def test_the_model_of_the_script_is_cut_distilled_and_saved(tmp_path, capsys):
    script = prepared(max_steps=16)
    model, optimizer = script.model, script.optimizer.optimizer
    loop = looped(script, ROUNDS, output_dir=tmp_path)
    before = sum(p.numel() for p in model.parameters())
    losses, _ = train(script, loop)
    after = sum(p.numel() for p in model.parameters())
    assert script.accelerator.unwrap_model(model) is model and after <= 0.41 * before
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    first, second = loop.stages
    assert (first.step, second.step, second.status) == (0, 8, "accepted")
    assert first.metric_name == "loss" and set(first.metrics_before) == {"accuracy", "loss"}
    assert second.metrics_after["loss"] == pytest.approx(evaluate(script)["loss"])
    assert len(losses) == 16
    assert len(loop.reports) == 2 and {"loss/task", "loss/kl"} <= set(loop.terms())
    assert "metric before" in capsys.readouterr().out
    journal = json.loads((tmp_path / JOURNAL).read_text())
    assert journal["parameters_after"] == after and len(journal["stages"]) == 2
    assert loop.end() == {
        "parameters_before": before,
        "parameters_after": after,
        "reduction": pytest.approx(1 - after / before),
    }
    script.accelerator.unwrap_model(model).save_pretrained(tmp_path / "model", save_function=script.accelerator.save)
    batch = next(iter(script.validation))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    model.eval()
    assert torch.allclose(again(**batch).logits, model(**batch).logits, atol=1e-6)


def test_the_stages_are_those_of_the_trainer(make_trainer):
    trainer = make_trainer(recipe=ROUNDS, weight_decay=0.01, per_device_eval_batch_size=8)
    trainer.train()
    script = prepared()
    loop = looped(script, ROUNDS)
    train(script, loop)
    ours, theirs = loop.stages[0], trainer.stages[0]
    assert [(s["name"], s["width_after"], s["rank"]) for s in ours.sites] == [
        (s["name"], s["width_after"], s["rank"]) for s in theirs.sites
    ]
    assert [s["edge"] for s in ours.sites] == pytest.approx([s["edge"] for s in theirs.sites], rel=1e-6)
    assert ours.metric_before == pytest.approx(theirs.metric_before, rel=1e-5)
    assert ours.metric_cut == pytest.approx(theirs.metric_cut, rel=1e-5)
    assert [stage.step for stage in loop.stages] == [stage.step for stage in trainer.stages]
    assert [stage.parameters_after for stage in loop.stages] == [stage.parameters_after for stage in trainer.stages]


def test_a_loop_learns_the_task_from_a_new_head():
    """Fit, cut and distillation on a task that this model learns."""
    script = prepared(max_steps=96, batch_size=16, rows=toy_data(256), rate=3e-3)
    loop = looped(script, {"target_reduction": 0.4, "fit_share": 0.5}, metric_for_best_model="accuracy")
    train(script, loop)
    (stage,) = loop.stages
    assert stage.step == 48 and loop.run.fit.metrics["accuracy"] == stage.metric_before
    assert stage.metric_name == "accuracy" and stage.metric_before > 0.8 and stage.metric_after > 0.8


def test_the_schedule_of_the_script_runs_once_a_phase(monkeypatch):
    monkeypatch.setattr(pacing, "warmup_steps", lambda steps: 0)
    script = prepared(max_steps=8, rate=1e-3)
    loop = looped(script, {"fit_share": 0.5}, evaluate=None)
    _, rates = train(script, loop)
    assert loop.run.pace.phases[0].steps == 4
    assert [rates[step] for step in (1, 2, 3)] == pytest.approx([7.5e-4, 5e-4, 2.5e-4])
    peak = loop.run.pace.rate
    assert [rates[step] for step in (5, 6, 7, 8)] == pytest.approx([0.75 * peak, 0.5 * peak, 0.25 * peak, 0.0])


@pytest.mark.parametrize("kind", ["none", "other"])
def test_a_rate_that_is_not_ours_stays(kind):
    script = prepared(schedule="constant")
    if kind == "other":
        plain = torch.optim.lr_scheduler.StepLR(script.optimizer.optimizer, 4, gamma=0.1)
        script.scheduler = script.accelerator.prepare(plain)
    loop = looped(script, lr_scheduler=None if kind == "none" else script.scheduler)
    _, rates = train(script, loop)
    assert rates[1] == 1e-3 and rates[8] == pytest.approx(1e-3 if kind == "none" else 1e-5)
    assert loop.stages[0].learning_rate is None


def test_a_scheduler_stepped_at_other_moments_is_refused():
    script = prepared()
    loop = looped(script)
    batch = next(iter(script.train))
    script.accelerator.backward(loop.loss(batch))
    script.optimizer.step()
    with pytest.raises(RMTKDError, match="advanced by 0 in 1 optimizer step.*expected 1"):
        loop.loss(batch)


@pytest.mark.parametrize("by_hand", [False, True])
def test_accumulation_is_counted_by_the_optimizer(by_hand):
    script = prepared(max_steps=4, accumulation=3, batch_size=4, by_hand=by_hand)
    loop = looped(script, ROUNDS)
    train(script, loop)
    assert loop._host.step == 4 and [stage.step for stage in loop.stages] == [0, 2]


def test_accumulated_micro_batches_are_one_batch():
    """Of rows without padding: each micro-batch has as many tokens."""
    rows = [dict(row, attention_mask=torch.ones(10, dtype=torch.long)) for row in toy_data()]
    recipe = {"sites": ["intermediate"], "target_reduction": 0.15}  # neurons: other coordinates are free
    results = []
    for size, accumulation in ((8, 1), (4, 2)):
        script = prepared(max_steps=4, batch_size=size, accumulation=accumulation, rows=rows, optimizer="sgd")
        train(script, looped(script, recipe))
        results.append(script.model.state_dict())
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-4) for name in results[0])


@pytest.mark.parametrize(
    ("recipe", "step"), [(ROUNDS, 2), SLOW(ROUNDS, 4), (FITTED, 1), SLOW(FITTED, 4), SLOW(FITTED, 7)]
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, recipe, step):
    """In the middle of an epoch, with dropout in the fit; and at the step of a cut."""
    options = {"rows": toy_data(128)}
    script = prepared(**options)
    loop = looped(script, recipe)
    losses, rates = train(script, loop, save_to=tmp_path, save_every=1)
    other = prepared(**options)
    again = looped(other, recipe)
    torch.rand(100)
    ours, steps = train(other, again, resume=tmp_path / f"step_{step}")
    assert same(other.model, script.model) and type(other.model) is type(script.model)
    assert ours == {k: v for k, v in losses.items() if k > step}
    assert steps == {k: v for k, v in rates.items() if k > step}
    assert [s.to_dict() for s in again.stages] == [s.to_dict() for s in loop.stages]


@pytest.mark.parametrize("saved", ["before the evaluation", "after the evaluation"])
def test_what_a_script_draws_between_two_epochs_leaves_no_trace(tmp_path, saved):
    """Neither in the run, nor in one that goes on from there; there is dropout in the fit."""

    def made():
        script = prepared(rows=toy_data(32))
        return script, looped(script, {"fit_share": 0.7})

    plain, loop = made()
    train(plain, loop)
    assert loop.run.fit.steps > 4 == len(plain.train)
    script, loop = made()

    def between():
        evaluate(script)
        if saved == "after the evaluation" and loop.run.host.step == 4:
            script.accelerator.save_state(str(tmp_path / "step_4"))

    save = {"save_to": tmp_path, "save_every": 4} if saved == "before the evaluation" else {}
    train(script, loop, between=between, **save)
    other, loop = made()
    train(other, loop, resume=tmp_path / "step_4")
    assert same(script.model, plain.model) and same(other.model, plain.model)


@pytest.mark.parametrize(
    "parts",
    [
        {"reparameterization": "mpo"},
        {"objectives": {"kl": {}, "projected_feature": {"projection": {"name": "pca", "dim": 8}}}},
        {"recipe": {"teacher": "ema", "ema_decay": 0.5}},
        SLOW({"recipe": {"teacher": "previous"}}),
        SLOW({"transforms": "embedding_mixup"}),
    ],
    ids=["mpo", "pca", "ema", "previous", "mixup"],
)
def test_what_is_trained_beside_the_student_is_resumed(tmp_path, parts):
    parts = dict(parts)
    recipe = ROUNDS | parts.pop("recipe", {})
    script = prepared()
    train(script, looped(script, recipe, **parts), save_to=tmp_path, save_every=5)
    other = prepared()
    train(other, looped(other, recipe, **parts), resume=tmp_path / "step_5")
    assert same(other.model, script.model)
    script.model.save_pretrained(tmp_path / "model")
    assert not any("parametrizations" in name for name in script.model.state_dict())


def test_a_given_teacher_and_an_adapter_to_it_are_resumed(tmp_path):
    """The adapter is stepped with the optimizer, and lies in the checkpoint."""
    recipe = {"schedule": "none", "target_reduction": None, "fit_share": None}

    def make():
        teacher = tiny_bert(seed=5, hidden_size=48)
        script = prepared(accumulation=2, max_steps=4, rows=toy_data(128))
        parts = {"teacher_model": teacher, "objectives": {"kl": {}, "projected_feature": {"projection": "random"}}}
        return script, looped(script, recipe, **parts)

    script, loop = make()
    assert not loop.cuts_to_come
    start = prepared().model
    train(script, loop, save_to=tmp_path, save_every=2)
    (adapter,) = loop.run.tutor.companions.parameters
    assert adapter.grad is None and not same(script.model, start)
    other, again = make()
    train(other, again, resume=tmp_path / "step_2")
    assert same(other.model, script.model)
    assert torch.equal(again.run.tutor.companions.parameters[0], adapter)


def test_a_run_that_fits_first_is_taken_up_with_another_random_head(tmp_path):
    script = prepared()
    train(script, looped(script, FITTED), save_to=tmp_path, save_every=1)
    for step in (1, 4):
        other = prepared(tiny_bert(seed=9))
        train(other, looped(other, FITTED), resume=tmp_path / f"step_{step}")
        assert same(other.model, script.model)


def test_the_same_script_can_go_back_to_its_own_checkpoint(tmp_path):
    script = prepared()
    loop = looped(script, FITTED)
    train(script, loop, save_to=tmp_path, save_every=3)
    end = {name: tensor.clone() for name, tensor in script.model.state_dict().items()}
    train(script, loop, resume=tmp_path / "step_3")
    assert all(torch.equal(tensor, end[name]) for name, tensor in script.model.state_dict().items())


FRESH = """
import sys, torch
torch.set_num_threads(1)
from tests.trainer.looping import looped, prepared, train
script = prepared()
train(script, looped(script, {recipe}), resume={folder!r})
torch.save(script.model.state_dict(), {out!r})
"""


def test_a_new_process_takes_the_run_up(tmp_path):
    script = prepared()
    train(script, looped(script, FITTED), save_to=tmp_path, save_every=4)
    code = FRESH.format(recipe=FITTED, folder=str(tmp_path / "step_4"), out=str(tmp_path / "weights.pt"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = torch.load(tmp_path / "weights.pt")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in script.model.state_dict().items())


def test_a_resumed_run_that_has_no_step_left_ends(tmp_path):
    script = prepared()
    loop = looped(script, ROUNDS)
    train(script, loop, save_to=tmp_path, save_every=8)
    other = prepared()
    again = looped(other, ROUNDS)
    train(other, again, resume=tmp_path / "step_8")
    assert same(other.model, script.model) and again.stages[-1].to_dict() == loop.stages[-1].to_dict()


def test_bf16_goes_on_after_the_cut(tmp_path):
    script = prepared(mixed_precision="bf16")
    loop = looped(script, ROUNDS)
    train(script, loop, save_to=tmp_path, save_every=5)
    assert len(loop.stages) == 2 and all(p.dtype == torch.float32 for p in script.model.parameters())
    seen = []
    handle = script.model.classifier.register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    batch = next(iter(script.validation))
    assert script.model(**batch).logits.dtype == torch.float32 and seen == [torch.bfloat16]
    handle.remove()
    other = prepared(mixed_precision="bf16")
    train(other, looped(other, ROUNDS), resume=tmp_path / "step_5")
    assert same(other.model, script.model)


def test_gradient_checkpointing_goes_on_after_the_cut():
    model = tiny_bert()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    script = prepared(model)
    loop = looped(script, ROUNDS)
    train(script, loop)
    assert script.model.is_gradient_checkpointing and len(loop.stages) == 2


def test_a_second_model_of_the_script_keeps_its_place(tmp_path):
    script = prepared()
    other = script.accelerator.prepare(torch.nn.Linear(2, 2))
    loop = looped(script, ROUNDS)
    train(script, loop)
    first, second = script.accelerator._models[-2:]
    assert first is script.model and second is other


def test_a_task_loss_of_the_script_is_the_task_term():
    seen = []

    def weighted(outputs, batch):
        seen.append((outputs.loss, set(batch)))
        return torch.nn.functional.cross_entropy(outputs.logits, batch["labels"]) * batch["weight"].mean()

    rows = [dict(row, weight=2.0) for row in toy_data()]
    script = prepared(rows=rows)
    loop = looped(script, ROUNDS, task_loss=weighted)
    train(script, loop)
    assert len(seen) == 8 and seen[0] == (None, {"input_ids", "attention_mask", "labels", "weight"})
    plain = prepared()
    train(plain, looped(plain, ROUNDS))
    assert not same(plain.model, script.model)


def test_an_evaluation_leaves_no_trace():
    """Neither in the modes, nor in the random numbers, nor in Accelerate's place in the data."""
    results = []
    for given in (None, evaluate):
        script = prepared(accumulation=2, max_steps=6)

        def breaks_off(script=script):
            torch.rand(3)
            script.model.eval()
            next(iter(script.validation))
            return {"loss": 1.0}

        loop = looped(script, FITTED, evaluate=None if given is None else breaks_off)
        train(script, loop)
        assert script.model.training and script.accelerator.gradient_state.active_dataloader is not script.validation
        results.append(script.model)
    assert same(*results)


def test_step_does_at_once_what_is_due():
    script = prepared()
    loop = looped(script, {"fit_share": 0.125})
    assert loop.cuts_to_come  # also before the first step
    batch = next(iter(script.train))
    script.accelerator.backward(loop.loss(batch))
    script.optimizer.step()
    script.scheduler.step()
    script.optimizer.zero_grad()
    assert not loop.stages and loop.cuts_to_come
    loop.step()
    assert len(loop.stages) == 1 and not loop.cuts_to_come
    loop.step()
    assert len(loop.stages) == 1


def test_a_stream_is_calibrated_on_its_first_rows():
    class Rows(torch.utils.data.IterableDataset):
        def __init__(self, rows):
            self.rows = rows

        def __iter__(self):
            yield from self.rows

    script = prepared()
    collate = script.train.collate_fn
    script.train = script.accelerator.prepare(DataLoader(Rows(toy_data()), batch_size=8, collate_fn=collate))
    loop = looped(script)
    for batch in script.train:
        script.accelerator.backward(loop.loss(batch))
        script.optimizer.step()
        script.scheduler.step()
        script.optimizer.zero_grad()
    loop.end()
    assert len(loop.stages) == 1 and loop._host.step == 8
    script = prepared()
    once = DataLoader(Rows(iter(toy_data())), batch_size=8, collate_fn=collate)
    script.train = script.accelerator.prepare(once)
    with pytest.raises(RMTKDError, match="can be read once"):
        looped(script)


# -- refusals, before anything expensive ----------------------------------------------------------------------------


def test_what_was_not_prepared_is_refused():
    script = prepared()
    options = {"rmtkd_config": RMTKDConfig(**RECIPE), "max_steps": 8}
    accelerator, model, optimizer, rows = script.accelerator, script.model, script.optimizer, script.train
    with pytest.raises(RMTKDError, match="BertForSequenceClassification was not prepared by this accelerator"):
        RMTKDLoop(accelerator, tiny_bert(), optimizer, rows, **options)
    with pytest.raises(RMTKDError, match=r"optimizer \(AdamW\) was not prepared"):
        RMTKDLoop(accelerator, model, torch.optim.AdamW(model.parameters()), rows, **options)
    other = accelerator.prepare(torch.optim.AdamW(tiny_bert().parameters()))
    with pytest.raises(RMTKDError, match="holds no parameter of BertForSequenceClassification"):
        RMTKDLoop(accelerator, model, other, rows, **options)
    with pytest.raises(RMTKDError, match="got a Bert.* first; expected the script's Acc"):
        RMTKDLoop(model, accelerator, optimizer, rows, **options)
    with pytest.raises(RMTKDError, match="train_dataloader is a list"):
        RMTKDLoop(accelerator, model, optimizer, toy_data(), **options)


def test_parameters_beside_the_one_optimizer_are_refused_or_told(caplog):
    script = prepared()
    script.accelerator.prepare(torch.optim.SGD(script.model.classifier.parameters(), lr=0.1))
    with pytest.raises(RMTKDError, match=r"classifier\.weight and 1 more of Bert.* by an optimizer \(SGD\) beside"):
        looped(script)
    assert "in no optimizer" not in caplog.text
    script = prepared()
    script.optimizer.param_groups[1]["params"].clear()
    looped(script)
    assert "more trainable parameters are in no optimizer" in caplog.text


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_sharded_parameters_are_refused(monkeypatch, kind):
    from accelerate.utils import DistributedType

    script = prepared()
    monkeypatch.setattr(Accelerator, "distributed_type", getattr(DistributedType, kind))
    with pytest.raises(RMTKDError, match="shards the parameters"):
        looped(script)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_steps": 0}, "max_steps=0; expected the number"),
        ({"max_steps": None}, "max_steps=None"),
        ({"evaluate": {"loss": 1.0}}, "evaluate is a dict; expected a function"),
        ({"evaluate": None, "metric_for_best_model": "f1"}, "metric_for_best_model.*expected evaluate="),
        ({"evaluate": None, "recipe": {"max_metric_drop": 0.1}}, "max_metric_drop.*expected evaluate="),
        ({"objectives": ["no_such"]}, "no_such"),
        ({"recipe": {"target_reduction": 0.999}}, "A reduction to 21 parameters was asked for"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, said):
    with pytest.raises(RMTKDError, match=said):
        looped(prepared(), **options)


def test_a_recipe_of_another_kind_is_refused():
    script = prepared()
    with pytest.raises(RMTKDError, match="rmtkd_config is a dict"):
        RMTKDLoop(script.accelerator, script.model, script.optimizer, script.train, rmtkd_config={}, max_steps=8)


def test_unlabelled_rows_are_refused_and_distil_without_the_task():
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in toy_data()]
    with pytest.raises(RMTKDError, match="task loss needs labels"):
        looped(prepared(rows=rows), evaluate=None)
    script = prepared(rows=rows)
    loop = looped(script, {"task_weight": 0.0}, evaluate=None)
    train(script, loop)
    assert len(loop.stages) == 1


def test_an_evaluation_that_gives_no_metrics_by_name_is_refused():
    script = prepared()
    loop = looped(script, evaluate=lambda: 0.9)
    with pytest.raises(RMTKDError, match=r"evaluate\(\) returned a float; expected the metrics by name"):
        loop.loss(next(iter(script.train)))
    script = prepared()
    loop = looped(script, evaluate=lambda: {"f1": 0.9}, metric_for_best_model="accuracy")
    with pytest.raises(RMTKDError, match="gave f1; the stages are judged by 'accuracy'"):
        loop.loss(next(iter(script.train)))


@pytest.mark.parametrize(
    ("metric", "judges", "said"),
    [("f1", "f1", "the stages are judged by f1"), ("wonder", None, "judged without a metric")],
)
def test_without_a_name_and_a_loss_a_line_says_what_judges(caplog, metric, judges, said):
    script = prepared()
    loop = looped(script, evaluate=lambda: {metric: torch.tensor(0.9)})
    train(script, loop)
    assert loop.stages[0].metric_name == judges and loop.stages[0].metrics_before == {metric: pytest.approx(0.9)}
    assert said in caplog.text


def test_the_loss_is_that_of_a_training_step():
    script = prepared()
    loop = looped(script)
    batch = next(iter(script.train))
    with torch.no_grad(), pytest.raises(RMTKDError, match="without gradients"):
        loop.loss(batch)
    with pytest.raises(RMTKDError, match="got a tuple; expected a batch"):
        loop.loss((batch["input_ids"], batch["labels"]))
    loss, outputs = loop.loss(batch, return_outputs=True)
    assert loss.requires_grad and outputs.logits.shape == (8, 2)


def test_the_order_of_a_script_is_told(tmp_path, caplog):
    script = prepared()
    loop = looped(script)
    with pytest.raises(RMTKDError, match="before the first loop.loss"):
        script.accelerator.save_state(str(tmp_path / "early"))
    with pytest.raises(RMTKDError, match=r"loop.end\(\) without a single loop.loss"):
        loop.end()
    batch = next(iter(script.train))
    script.accelerator.backward(script.model(**batch).loss)
    script.optimizer.step()
    assert "without loop.loss(batch) since the last one" in caplog.text and loop._host.step == 0
    script.optimizer.zero_grad()
    train(script, loop)
    with pytest.raises(RMTKDError, match=r"after loop.end\(\)"):
        loop.loss(batch)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    plain = prepared()
    plain.accelerator.save_state(str(tmp_path / "plain"))
    with pytest.raises(RMTKDError, match="in a script without RMTKDLoop"):
        script = prepared()
        looped(script)
        script.accelerator.load_state(str(tmp_path / "plain"))
    script = prepared()
    train(script, looped(script, ROUNDS), save_to=tmp_path, save_every=4)
    other = prepared(tiny_bert(seed=9))
    looped(other, ROUNDS)
    with pytest.raises(RMTKDError, match="must be the same"):
        other.accelerator.load_state(str(tmp_path / "step_4"))


def test_a_second_loop_takes_over(tmp_path):
    """Of a script that tries again with a smaller batch, or trains the narrow model on."""
    script = prepared()
    looped(script, ROUNDS)
    loop = looped(script, ROUNDS)
    train(script, loop, save_to=tmp_path, save_every=4)
    assert [known is loop for known in script.accelerator._custom_objects] == [True]
    other = prepared()
    train(other, looped(other, ROUNDS), resume=tmp_path / "step_4")
    assert same(other.model, script.model)


@pytest.mark.parametrize(
    ("name", "given", "greater"),
    [("accuracy", None, True), ("eval_loss", None, False), ("perplexity", None, False), ("perplexity", True, True)],
)
def test_the_direction_of_a_metric(name, given, greater):
    loop = looped(prepared(), metric_for_best_model=name, greater_is_better=given)
    assert loop._host.greater_is_better is greater


def test_it_is_public():
    assert optimum_rmtkd.RMTKDLoop is RMTKDLoop and "RMTKDLoop" in optimum_rmtkd.__all__
