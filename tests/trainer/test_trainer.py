from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    EarlyStoppingCallback,
)

from optimum_rmtkd.distillation import (
    BatchTransform,
    CachedTeacher,
    DistillationObjective,
    HiddenStateLoss,
    KLDivergence,
    TaskLoss,
)
from optimum_rmtkd.errors import BudgetError, RMTKDError
from optimum_rmtkd.surgery import count_parameters
from optimum_rmtkd.trainer import RMTKDTrainer
from optimum_rmtkd.trainer.stages import JOURNAL

from ..surgery import zoo
from .conftest import ragged, tiny_bert, toy_data
from .test_accumulation import tiny_gpt2


def history(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_one_round_meets_its_target_and_tells_about_it(make_trainer, capsys):
    model = tiny_bert()
    trainer, size = make_trainer(model, max_steps=4), count_parameters(model)
    output = trainer.train()
    assert trainer.model is model and type(model).__name__ == "RMTKDBertForSequenceClassification"
    metrics = output.metrics
    assert metrics["parameters_before"] == size and metrics["parameters_after"] == count_parameters(model)
    assert metrics["reduction"] == pytest.approx(0.3, abs=0.02)
    (stage,) = trainer.stages
    assert (stage.index, stage.step, stage.status) == (0, 0, "accepted")
    assert {"name", "width_before", "width_after", "edge"} <= set(stage.sites[0])
    assert None not in (stage.metric_before, stage.metric_cut, stage.metric_after)
    journal = json.loads((Path(trainer.args.output_dir) / JOURNAL).read_text())
    assert journal["stages"][0]["sites"] == list(stage.sites) and journal["parameters_after"] == count_parameters(
        model
    )
    assert "metric: eval_loss" in capsys.readouterr().out


def test_later_cuts_come_inside_training_and_swallow_no_log_line(make_trainer):
    trainer = make_trainer(recipe={"target_reduction": 0.6, "rounds": 3, "stage_share": 0.5}, max_steps=8)
    trainer.train()
    assert [s.step for s in trainer.stages] == [0, 2, 4]
    steps = [e["step"] for e in trainer.state.log_history if "loss" in e]
    assert steps == list(range(1, 9))
    rates = history(trainer, "learning_rate")
    warm = [1 / 2, 1, 1 / 2, 1, 1 / 3, 2 / 3, 1, 1]  # after each cut
    assert rates == pytest.approx([1e-3 * (1 - i / 8) * w for i, w in enumerate(warm)])
    assert [s.parameters_after for s in trainer.stages][-1] == count_parameters(trainer.model)
    assert trainer.callback_handler.model is trainer.model and trainer.model_wrapped is trainer.model


def test_total_is_the_weighted_sum_of_the_logged_terms(make_trainer):
    trainer = make_trainer(recipe={"task_weight": 0.3, "kl_weight": 0.7, "hidden_weight": 2.0}, max_steps=3)
    trainer.train()
    terms = [history(trainer, f"loss/{name}") for name in ("task", "kl", "hidden")]
    for total, task, kl, hidden in zip(history(trainer), *terms, strict=True):
        assert total == pytest.approx(0.3 * task + 0.7 * kl + 2.0 * hidden, rel=1e-5)
    assert max(terms[2]) > 0


def test_terms_are_averaged_since_the_last_line(make_trainer):
    logs = {}
    for every in (1, 4):
        trainer = make_trainer(max_steps=4, logging_steps=every)
        trainer.train()
        logs[every] = history(trainer, "loss/hidden")
    assert logs[4] == pytest.approx([sum(logs[1]) / 4], rel=1e-5)


def test_evaluation_is_the_plain_task_loss(make_trainer):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    model = trainer.model.eval()
    with torch.no_grad():
        losses = [model(**trainer.data_collator(toy_data(16, seed=2)[i : i + 8])).loss.item() for i in (0, 8)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_the_cut_leaves_the_random_numbers_of_training_alone(make_trainer):
    """The order of the data and the dropout masks before a late cut do not depend on whether it comes."""
    losses = {}
    for rounds in (1, 2):
        torch.manual_seed(0)
        trainer = make_trainer(
            # by edges, so that the first cut is the same in both
            recipe={
                "rounds": rounds,
                "target_reduction": None,
                "edge_estimator": "mp_median",
                "disable_dropout": False,
            },
            max_steps=3,
        )
        seen = []
        step = trainer.training_step

        def spy(model, inputs, n=None, step=step, seen=seen):
            seen.append(inputs["input_ids"].clone())
            result = step(model, inputs, n)
            seen.append(torch.rand(1))
            return result

        trainer.training_step = spy
        trainer.train()
        losses[rounds] = seen
    # Dropout draws as many numbers as the tensors are large: compare up to the second cut, at step 1.
    assert all(torch.equal(a, b) for a, b in zip(losses[1][:3], losses[2][:3], strict=True))


def test_adam_keeps_the_moments_of_unchanged_tensors_only(make_trainer):
    trainer = make_trainer(
        recipe={
            "target_reduction": None,
            "sites": ("intermediate",),
            "schedule": "layerwise",
            "edge_estimator": "fixed",
            "fixed_rank": 16,
        },
        max_steps=4,
    )
    states = {}
    install = trainer.run._apply

    def spy(*given):
        if not trainer.stages:
            return install(*given)
        raw = trainer.optimizer.optimizer
        old = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        moments = {n: raw.state[p]["exp_avg"].clone() for n, p in trainer.model.named_parameters()}
        install(*given)
        states.update(old=old, moments=moments, raw=raw)
        for name, parameter in trainer.model.named_parameters():
            same = old[name].shape == parameter.shape and torch.equal(old[name], parameter)
            state = raw.state.get(parameter, {})
            assert ("exp_avg" in state) == same, name
            if same:
                assert torch.equal(state["exp_avg"], moments[name])
        states["kept"] = len(raw.state)

    trainer.run._apply = spy
    trainer.train()
    assert len(trainer.stages) == 2 and 0 < states["kept"] < len(states["old"])


def test_an_optimizer_given_by_the_user_survives(make_trainer):
    model = tiny_bert()
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1]
    rest = [p for n, p in model.named_parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest, "lr": 2e-3}], lr=1e-3)
    trainer = make_trainer(model, max_steps=2, trainer_kwargs={"optimizers": (optimizer, None)})
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    assert [(g["weight_decay"], g["lr"]) for g in optimizer.param_groups] == [(0.1, 0.0), (0.01, 0.0)]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert [{p.dim() > 1 for p in g["params"]} for g in optimizer.param_groups] == [{True}, {False}]


def test_frozen_parameters_stay_frozen(make_trainer):
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    trainer = make_trainer(model, max_steps=2)
    trainer.train()
    assert not any(p.requires_grad for p in model.bert.embeddings.parameters())
    assert model.classifier.weight.requires_grad


def test_dropout_is_off_while_distilling_and_back_afterwards(make_trainer):
    trainer, seen = make_trainer(max_steps=2), []
    step = trainer.training_step
    trainer.training_step = lambda m, i, n=None: (seen.append({x.p for x in rates(trainer.model)}), step(m, i, n))[1]
    trainer.train()
    assert seen == [{0.0}] * 2
    assert {x.p for x in rates(trainer.model)} == {0.1} and trainer.model.config.hidden_dropout_prob == 0.1


def rates(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]


def test_the_best_model_is_never_the_uncut_one(make_trainer):
    trainer = make_trainer(
        recipe={"target_reduction": 0.6, "rounds": 2, "stage_share": 0.5},
        max_steps=6,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="wide",
        greater_is_better=True,
        trainer_kwargs={"compute_metrics": lambda prediction: {"wide": 1e6 + count_parameters(trainer.model)}},
    )
    trainer.train()
    assert trainer.stages[-1].step == 3 and trainer.state.best_global_step >= 3
    assert count_parameters(trainer.model) == trainer.stages[-1].parameters_after
    assert trainer.state.best_metric == 1e6 + trainer.stages[-1].parameters_after


def test_stage_evaluations_do_not_feed_early_stopping(make_trainer):
    trainer = make_trainer(
        recipe={"rounds": 3, "stage_share": 1.0},
        max_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        save_steps=4,
        save_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        trainer_kwargs={"callbacks": [EarlyStoppingCallback(1)]},
    )
    trainer.train()
    assert trainer.state.global_step == 4


def test_saved_model_loads_with_the_auto_class(make_trainer, tmp_path):
    import optimum_rmtkd  # noqa: F401 - registers the reduced classes

    trainer = make_trainer(max_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final").eval()
    batch = trainer.data_collator(toy_data(4))
    with torch.no_grad():
        assert zoo.close(again(**batch).logits, trainer.model.eval()(**batch).logits)


@pytest.mark.parametrize("options", [None, {"use_reentrant": False}])
def test_recomputed_activations_survive_a_cut(make_trainer, weights, options):
    found = []
    for recompute in (False, True):
        asked = {"gradient_checkpointing": recompute, "gradient_checkpointing_kwargs": options}
        trainer = make_trainer(max_steps=3, out=f"recompute-{recompute}", **asked)
        trainer.train()
        assert len(trainer.stages) == 1
        flags = ("is_activation_checkpointing", "is_gradient_checkpointing")  # the latter until transformers 5.20
        assert any(getattr(trainer.model, flag, False) for flag in flags) == recompute
        found.append(weights(trainer.model))
    assert all(torch.allclose(tensor, found[1][name], atol=1e-6) for name, tensor in found[0].items())


def test_reentrant_checkpointing_is_refused_where_it_would_silence_an_objective(make_trainer):
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(RMTKDError, match="carries no gradient under reentrant"):
        make_trainer(objectives=["kl", "attention_relation"], max_steps=1, **reentrant).train()


@pytest.mark.parametrize("cut", [False, True])
def test_label_smoothing_shifts_the_labels_of_causal_models(make_trainer, cut):
    """transformers knows its own causal classes by name, a reduced one has another."""
    recipe = {"form": "factored", "target_reduction": 0.1} if cut else {"schedule": "none", "target_reduction": None}
    trainer = make_trainer(
        tiny_gpt2(n_embd=64),
        recipe=recipe,
        objectives=["task"],
        max_steps=1,
        label_smoothing_factor=0.1,
        trainer_kwargs={"train_dataset": ragged(16, kind="causal"), "eval_dataset": None},
    )
    trainer.train()
    rows = ragged(4, kind="causal", seed=9)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    model = trainer.model.eval()
    with torch.no_grad():
        found = trainer.compute_loss(model, dict(batch))
        logits = model(**batch).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, label_smoothing=0.1
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_label_smoothing_shifts_the_labels_under_peft(make_trainer):
    peft = pytest.importorskip("peft")
    student = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    data = {"train_dataset": ragged(16, kind="causal"), "eval_dataset": None}
    recipe = {"schedule": "none", "target_reduction": None}
    trainer = make_trainer(
        student,
        recipe,
        teacher_model=tiny_gpt2(1),
        objectives=["task"],
        label_smoothing_factor=0.1,
        trainer_kwargs=data,
    )
    batch = {name: torch.stack([row[name] for row in ragged(4, kind="causal")]) for name in ragged(1)[0]}
    with torch.no_grad():
        found, logits = trainer.compute_loss(student.eval(), dict(batch)), student(**batch).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, label_smoothing=0.1
    )
    assert trainer._shifted() and found.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"objectives": ["task", "correlation"]}, r"over 2 class\(es\)"),
        ({"objectives": [{"name": "projected_feature", "layers": {"nowhere": 0}}]}, "no module 'nowhere'"),
        ({"trainer_kwargs": {"transforms": "on_policy"}}, "OnPolicy with BertFor"),
    ],
)
def test_what_does_not_fit_the_models_is_refused_before_the_cut(make_trainer, parts, said):
    with pytest.raises(RMTKDError, match=said):
        make_trainer(**parts)


@pytest.mark.parametrize(
    ("change", "parts", "said"),
    [
        (
            lambda row: {k: v for k, v in row.items() if k != "labels"},
            {},
            "The task loss needs labels; the batch holds",
        ),
        (lambda row: row, {"teacher_model": CachedTeacher(), "objectives": ["kl"]}, "The batch has no teacher_values"),
        (None, {}, "train_dataset is empty"),
    ],
)
def test_data_that_lacks_something_is_refused_before_the_cut(make_trainer, change, parts, said):
    model, data = tiny_bert(), [] if change is None else [change(row) for row in toy_data()]
    trainer = make_trainer(model, trainer_kwargs={"train_dataset": data, "eval_dataset": None}, **parts)
    with pytest.raises(RMTKDError, match=said):
        trainer.train()
    assert not trainer.stages and trainer.model is model and type(model).__name__ == "BertForSequenceClassification"


def test_what_would_train_badly_or_nothing_is_said(make_trainer, caplog):
    make_trainer(tiny_bert().half())
    assert "weights are float16 and would be trained in it" in caplog.text
    caplog.clear()
    make_trainer(recipe={"schedule": "none", "target_reduction": None})
    assert "no teacher_model: nothing is cut" in caplog.text
    caplog.clear()
    make_trainer(recipe={"schedule": "none", "target_reduction": None}, teacher_model=tiny_bert(seed=3))
    assert "nothing is cut" not in caplog.text and "float16" not in caplog.text
    with pytest.raises(RMTKDError, match="rmtkd_config is a dict; expected RMTKDConfig"):
        RMTKDTrainer(tiny_bert(), rmtkd_config={"schedule": "none"})


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda step: step.student_outputs["logits"], r"Own.forward returned a tensor \(8, 2\); expected a scalar"),
        (lambda step: 1.0, "Own.forward returned float; expected a scalar"),
        (lambda step: None, "Own.forward returned NoneType; expected a scalar"),
        (lambda step: step.share("sample"), r"share\('sample'\): expected one of samples, tokens, labels"),
    ],
)
def test_objectives_of_a_users_own_that_answer_wrongly(make_trainer, answer, said):
    class Own(DistillationObjective):
        name = "own"

        def forward(self, step):
            return answer(step)

    with pytest.raises(RMTKDError, match=said):
        make_trainer(objectives=[Own()], max_steps=1).train()


def test_objectives_of_a_users_own_that_are_not_finished(make_trainer):
    class Nameless(DistillationObjective):
        pass

    class Unmade(DistillationObjective):
        name = "unmade"

        def __init__(self):
            torch.nn.Module.__init__(self)

    for given, said in (
        (Nameless(), "Nameless has no name"),
        (Unmade(), "Unmade has no label"),
        (TaskLoss, r"the class TaskLoss; expected an instance: TaskLoss\(\)"),
    ):
        with pytest.raises(RMTKDError, match=said):
            make_trainer(objectives=[given])
    with pytest.raises(RMTKDError, match="expected each label once. Give the second one another"):
        make_trainer(objectives=["kl", "kl"])


def test_parts_of_a_users_own_are_described_or_refused(make_trainer):
    class Plain(BatchTransform):
        name = "plain"

    class Forgetful(KLDivergence):
        name = "forgetful"

        def __init__(self, gain=1.0, **kwargs):
            super().__init__(**kwargs)

    saving = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(trainer_kwargs={"transforms": Plain()}, **saving).train()
    with pytest.raises(RMTKDError, match="Forgetful does not say what its gain was"):
        make_trainer(objectives=[Forgetful()])


def test_bf16_autocast_survives_a_cut(make_trainer):
    trainer = make_trainer(recipe={"target_reduction": 0.6, "rounds": 2, "stage_share": 0.5}, max_steps=4, bf16=True)
    dtypes, step = [], trainer.training_step

    def spy(model, inputs, n=None):
        handle = trainer.model.bert.encoder.layer[0].register_forward_hook(
            lambda m, i, o: dtypes.append((o[0] if isinstance(o, tuple) else o).dtype)
        )
        dense = trainer.model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(
            lambda m, i, o: dtypes.append(o.dtype)
        )
        result = step(model, inputs, n)
        handle.remove(), dense.remove()
        return result

    trainer.training_step = spy
    trainer.train()
    assert len(trainer.stages) == 2 and dtypes.count(torch.bfloat16) >= 4
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


# -- schedules and stop rules -----------------------------------------------------------------------------------------


def test_layerwise_cuts_layer_after_layer(make_trainer):
    recipe = {"schedule": "layerwise", "edge_estimator": "mp_quantile", "target_reduction": None}
    trainer = make_trainer(recipe=recipe | {"sites": ("intermediate",)})
    trainer.train()
    assert [s.step for s in trainer.stages] == [0, 2]
    names = [site["name"] for stage in trainer.stages for site in stage.sites]
    assert len(names) == len(set(names)) == 2


def test_layerwise_stops_once_the_target_is_met(make_trainer):
    recipe = {
        "schedule": "layerwise",
        "target_reduction": 0.02,
        "sites": ("intermediate",),
        "edge_estimator": "fixed",
        "fixed_rank": 8,
    }
    trainer = make_trainer(recipe=recipe)
    trainer.train()
    assert len(trainer.stages) == 1 and trainer.run.agenda.stopped == "target met"


def test_a_site_that_would_keep_too_little_stops_the_run(make_trainer, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(recipe={"target_reduction": 0.6, "min_rank_ratio": 0.9})
        output = trainer.train()
    (stage,) = trainer.stages
    assert stage.status == "rejected" and "min_rank_ratio is 0.9" in stage.reason
    assert output.metrics["reduction"] == 0.0 and "asks for 60.0 %" in caplog.text


def test_a_stage_that_costs_too_much_is_rolled_back(make_trainer):
    sizes = []

    def compute_metrics(prediction):
        sizes.append(count_parameters(trainer.model))
        return {"size": float(sizes[-1])}

    uncut = count_parameters(tiny_bert())
    trainer = make_trainer(
        # the metric is the size: the first stage (-22 %) is allowed, the second one (-40 %) is not
        recipe={"target_reduction": 0.4, "rounds": 2, "max_metric_drop": 0.3 * uncut, "stage_share": 0.5},
        metric_for_best_model="size",
        greater_is_better=True,
        trainer_kwargs={"compute_metrics": compute_metrics},
    )
    output = trainer.train()
    assert [s.status for s in trainer.stages] == ["accepted", "rolled_back"]
    assert "max_metric_drop" in trainer.stages[1].reason
    assert count_parameters(trainer.model) == trainer.stages[0].parameters_after == output.metrics["parameters_after"]
    assert {x.p for x in rates(trainer.model)} == {0.1}


def test_an_early_roll_back_trains_on_with_the_wider_model(make_trainer):
    trainer = make_trainer(
        recipe={"target_reduction": 0.4, "rounds": 2, "max_metric_drop": 0.5, "stage_share": 0.5},
        metric_for_best_model="size",
        greater_is_better=True,
        trainer_kwargs={"compute_metrics": lambda p: {"size": float(count_parameters(trainer.model))}},
    )
    trainer.train()
    assert [s.status for s in trainer.stages] == ["rolled_back"]
    assert trainer.state.global_step == 8 and len(history(trainer)) == 8
    assert type(trainer.model).__name__ == "BertForSequenceClassification"
    assert history(trainer, "loss/kl")[-1] == pytest.approx(0.0, abs=1e-2)


def test_a_stage_waits_for_its_threshold(make_trainer):
    values = iter([1.0, 0.5, 0.5, 0.95, 0.95, 0.95, 0.95])
    trainer = make_trainer(
        recipe={"target_reduction": 0.4, "rounds": 2, "stage_threshold": 0.9},
        max_steps=12,
        metric_for_best_model="m",
        trainer_kwargs={"compute_metrics": lambda p: {"m": next(values)}},
    )
    trainer.train()
    # uncut 1.0, after the cut 0.5; at step 4 still 0.5: wait; at step 5 it is 0.95
    assert [s.step for s in trainer.stages] == [0, 5]
    assert trainer.stages[1].metric_before == 0.95


# -- teachers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["initial", "previous", "ema"])
def test_every_teacher_has_a_known_projection(make_trainer, teacher):
    trainer = make_trainer(recipe={"teacher": teacher, "target_reduction": 0.6, "rounds": 2, "stage_share": 0.5})
    trainer.train()
    width = {"initial": 32, "ema": trainer.model.config.hidden_size}
    if teacher == "previous":
        assert type(trainer.run.teacher.model).__name__.startswith("RMTKD")
        assert count_parameters(trainer.run.teacher.model) == trainer.stages[0].parameters_after
    else:
        assert trainer.run.teacher.model.bert.embeddings.word_embeddings.embedding_dim == width[teacher]
    assert all(0 <= value < 100 for value in history(trainer, "loss/hidden"))


def test_given_teacher_drops_the_hidden_states_with_a_warning(make_trainer, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(teacher_model=tiny_bert(seed=5), max_steps=2)
    assert "HiddenStateLoss is dropped" in caplog.text
    assert [o.name for o in trainer.objectives] == ["task", "kl"]
    trainer.train()
    assert not history(trainer, "loss/hidden") and len(history(trainer, "loss/kl")) == 2


def test_given_teacher_that_is_the_uncut_model_keeps_them(make_trainer):
    trainer = make_trainer(teacher_model=tiny_bert(), max_steps=2)
    trainer.train()
    assert len(history(trainer, "loss/hidden")) == 2


def test_unlabelled_data_can_be_distilled(make_trainer):
    data = [{k: v for k, v in sample.items() if k != "labels"} for sample in toy_data()]
    trainer = make_trainer(
        objectives=[KLDivergence(1.0), HiddenStateLoss(1.0)],
        max_steps=2,
        trainer_kwargs={"train_dataset": data, "eval_dataset": None},
    )
    trainer.train()
    assert trainer.stages[0].metric_before is None and len(history(trainer)) == 2


def test_masked_language_model(make_trainer):
    data = [{**x, "labels": torch.where(torch.arange(10) % 3 == 0, x["input_ids"], -100)} for x in toy_data()]
    trainer = make_trainer(
        tiny_bert(cls=BertForMaskedLM), max_steps=2, trainer_kwargs={"train_dataset": data, "eval_dataset": data[:8]}
    )
    output = trainer.train()
    assert output.metrics["reduction"] == pytest.approx(0.3, abs=0.02)
    assert all(torch.isfinite(torch.tensor(history(trainer, "loss/kl"))))


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_settings_that_cannot_work_are_refused(make_trainer):
    with pytest.raises(RMTKDError, match="No reparameterization 'mp'; expected one of mpo, powerpropagation"):
        make_trainer(trainer_kwargs={"reparameterization": "mp"})
    with pytest.raises(
        RMTKDError, match="No batch transform 'mixup'; expected one of adaptive_off_policy, embedding_m"
    ):
        make_trainer(trainer_kwargs={"transforms": "mixup"})
    with pytest.raises(RMTKDError, match="TensorAlignment compares.*reparameterization='mpo'"):
        make_trainer(objectives=["task", "tensor_alignment"])
    with pytest.raises(RMTKDError, match="stage_threshold compares.*eval_dataset"):
        make_trainer(recipe={"stage_threshold": 0.9}, trainer_kwargs={"eval_dataset": None})
    with pytest.raises(RMTKDError, match="train\\(\\) without train_dataset"):
        make_trainer(trainer_kwargs={"train_dataset": None}).train()
    with pytest.raises(RMTKDError, match="vocab_size=61"):
        make_trainer(teacher_model=tiny_bert(vocab_size=61))
    with pytest.raises(RMTKDError, match="3 cuts in 2 training steps"):
        make_trainer(recipe={"rounds": 3}, max_steps=2).train()


@pytest.mark.parametrize("sharding", ["fsdp", "deepspeed"])
def test_sharded_training_is_refused(make_trainer, sharding, tmp_path):
    from optimum_rmtkd.trainer import RMTKDTrainer, RMTKDTrainingArguments

    args = RMTKDTrainingArguments(str(tmp_path), use_cpu=True)
    setattr(args, sharding, True)
    with pytest.raises(RMTKDError, match=f"{sharding} shards the parameters"):
        RMTKDTrainer(tiny_bert(), args, train_dataset=toy_data())


def test_a_reduced_model_that_meets_the_target_is_refused(make_trainer):
    first = make_trainer(recipe={"target_reduction": 0.5}, max_steps=1)
    first.train()
    with pytest.raises(BudgetError, match="already no more than the .* that were asked for"):
        make_trainer(first.model, recipe={"target_reduction": 0.3}, out="again").train()


def test_an_unknown_metric_is_answered_with_the_known_ones(make_trainer):
    trainer = make_trainer(metric_for_best_model="accuracy", trainer_kwargs={"compute_metrics": lambda p: {"f1": 1.0}})
    with pytest.raises(RMTKDError, match="eval_f1.*'eval_accuracy'"):
        trainer.train()


def test_default_objectives(make_trainer):
    assert [type(o) for o in make_trainer().objectives] == [TaskLoss, KLDivergence, HiddenStateLoss]


def test_a_name_or_a_class_in_place_of_a_model(tmp_path):
    for given, told in (("./my-bert", "Load it"), (BertForSequenceClassification, "Make one")):
        with pytest.raises(RMTKDError, match=told):
            RMTKDTrainer(model=given)


def test_no_epochs_are_named(make_trainer):
    with pytest.raises(RMTKDError, match="num_train_epochs=0 and max_steps=-1: no step would be trained"):
        make_trainer(max_steps=-1, num_train_epochs=0).train()


def test_the_way_to_train_without_labels_is_said_and_works(make_trainer):
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in toy_data()]
    given = {"train_dataset": rows, "eval_dataset": None}
    with pytest.raises(
        RMTKDError, match=r"objectives=\[KLDivergence\(\)\], with from optimum_rmtkd.objectives import"
    ):
        make_trainer(trainer_kwargs=given).train()
    from optimum_rmtkd.objectives import KLDivergence

    make_trainer(trainer_kwargs=given, objectives=[KLDivergence()]).check_first_batch()


def test_the_card_of_a_model_that_was_not_saved_names_its_auto_class(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    trainer.create_model_card()
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf8")
    assert "AutoModelForSequenceClassification.from_pretrained" in text and "AutoModel.from_pretrained" not in text
    assert "pipeline_tag: text-classification" in text


def test_a_metric_that_is_nan_leaves_the_run_to_the_loss(make_trainer, caplog):
    nan = {"compute_metrics": lambda answers: {"mcc": float("nan")}}
    trainer = make_trainer(max_steps=4, metric_for_best_model="mcc", trainer_kwargs=nan)
    trainer.train()
    stage = trainer.stages[0]
    assert stage.metric_name == "eval_loss" and None not in (stage.metric_before, stage.metric_cut, stage.metric_after)
    assert caplog.text.count("eval_mcc is nan for the uncut model") == 1
