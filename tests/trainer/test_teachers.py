"""Teachers that a user can pass: several, online ones, cached answers."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, BertForMaskedLM, BertForTokenClassification

from optimum_rmtkd.distillation import (
    CachedTeacher,
    EMATeacher,
    FrozenTeacher,
    OnlineTeacher,
    SnapshotTeacher,
    WeightedTeachers,
    cache_answers,
)
from optimum_rmtkd.errors import RMTKDError

from .conftest import ragged, tiny_bert


NONE = {"schedule": "none", "target_reduction": None}


def batch_of(rows):
    return {k: torch.stack([torch.as_tensor(r[k]) for r in rows]) for k in rows[0]}


def history(trainer, key="loss"):
    return [e[key] for e in trainer.state.log_history if key in e]


# -- several ----------------------------------------------------------------------------------------------------------


def test_several_teachers_are_their_weighted_mean():
    models = [tiny_bert(seed) for seed in (1, 2)]
    inputs = batch_of(ragged(4))
    answers = [m.eval()(**{k: v for k, v in inputs.items() if k != "labels"}).logits for m in models]
    outputs, features = WeightedTeachers(models, [3, 1])(inputs, ["bert.encoder.layer.1"], drop=("labels",))
    assert torch.allclose(outputs["logits"], 0.75 * answers[0] + 0.25 * answers[1])
    alone, first = WeightedTeachers(models[:1])(inputs, ["bert.encoder.layer.1"], drop=("labels",))
    assert torch.equal(first["bert.encoder.layer.1"], features["bert.encoder.layer.1"])
    for weights in ([1], [1, 0], [1, "a"], [1, float("inf")]):
        with pytest.raises(RMTKDError, match="one positive weight each|expected a number"):
            WeightedTeachers(models, weights)


def test_a_list_of_teachers_in_the_trainer(make_trainer):
    trainer = make_trainer(
        recipe=NONE, teacher_model=[(tiny_bert(1), 2.0), (tiny_bert(2), 1.0)], objectives=["kl"], max_steps=2
    )
    trainer.train()
    assert len(history(trainer, "loss/kl")) == 2 and trainer.run.teacher.weights == pytest.approx([2 / 3, 1 / 3])
    with pytest.raises(RMTKDError, match="vocab_size=61"):
        make_trainer(teacher_model=[tiny_bert(1), tiny_bert(2, vocab_size=61)])
    with pytest.raises(RMTKDError, match="teacher_model is a str"):
        make_trainer(teacher_model="bert")


def test_frozen_teachers_may_be_given_as_such(make_trainer):
    student = tiny_bert()
    for given, kind in (
        (FrozenTeacher(tiny_bert(3)), FrozenTeacher),
        (SnapshotTeacher(tiny_bert(4)), SnapshotTeacher),
    ):
        trainer = make_trainer(
            student, recipe=NONE, out=kind.__name__, teacher_model=given, objectives=["kl"], max_steps=1
        )
        trainer.train()
        assert trainer.run.teacher is given and len(history(trainer, "loss/kl")) == 1
    for given in (FrozenTeacher(student), SnapshotTeacher(student)):
        itself = make_trainer(student, teacher_model=given)
        assert itself.run.tutor.given is None and itself.rmtkd_config.teacher == "initial"
        assert itself.run.tutor.config.teacher == "initial"


def test_teachers_that_would_move_with_the_student_are_refused(make_trainer):
    student = tiny_bert()
    with pytest.raises(RMTKDError, match="one of its own teachers"):
        make_trainer(student, teacher_model=[student, tiny_bert(3)])
    for given in (EMATeacher(student), WeightedTeachers([EMATeacher(student)])):
        with pytest.raises(RMTKDError, match=r"RMTKDConfig\(teacher='ema'"):
            make_trainer(student, teacher_model=given)


# -- online -----------------------------------------------------------------------------------------------------------


def test_online_teacher_moves_towards_the_student_and_its_backbone_stays(make_trainer):
    pytest.importorskip("peft")
    base = tiny_bert(seed=3)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    teacher = OnlineTeacher(base, rank=2, learning_rate=1e-2, pull=1.0)
    frozen = {n: p.detach().clone() for n, p in teacher.model.named_parameters() if "lora_" not in n}
    trainer = make_trainer(
        recipe=NONE, teacher_model=teacher, objectives=["task", "kl"], max_steps=40, learning_rate=1e-4
    )
    trainer.train()
    own = history(trainer, "loss/teacher")
    assert len(own) == 40 and sum(own[-8:]) < sum(own[:8])
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    assert all(torch.equal(p, frozen[n]) for n, p in teacher.model.named_parameters() if n in frozen)
    assert all(p.abs().sum() > 0 for n, p in teacher.model.named_parameters() if "lora_B" in n and "query" in n)
    total = [
        0.5 * a + 0.5 * b + c for a, b, c in zip(*(history(trainer, f"loss/{k}") for k in ("task", "kl", "teacher")))
    ]
    assert history(trainer) == pytest.approx(total, rel=1e-5)


def test_online_teacher_takes_the_linear_layers_of_gpt2_and_names_a_model_without():
    pytest.importorskip("peft")
    from .test_accumulation import tiny_gpt2

    names = {
        n.split(".lora_")[0] for n, _ in OnlineTeacher(tiny_gpt2(), rank=2).model.named_parameters() if "lora_" in n
    }
    assert {"transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"} <= names and "lm_head" not in names
    with pytest.raises(RMTKDError, match="no linear layer inside Sequential"):
        OnlineTeacher(torch.nn.Sequential(torch.nn.ReLU()))


def test_an_online_teacher_of_the_students_own_weights_keeps_the_known_projection(make_trainer):
    pytest.importorskip("peft")
    parts = ["kl", "hidden", "projected_feature"]
    trainer = make_trainer(teacher_model=OnlineTeacher(tiny_bert(), rank=2), objectives=parts, max_steps=2)
    trainer.train()
    assert trainer.stages and len(history(trainer, "loss/hidden")) == 2
    assert not list(trainer.objectives[2].parameters())  # no adapter
    other = make_trainer(teacher_model=OnlineTeacher(tiny_bert(seed=3), rank=2), objectives=parts)
    assert [o.name for o in other.objectives] == ["kl", "projected_feature"]


@pytest.mark.parametrize(("given", "schedule"), [(False, "linear"), (True, "linear"), (True, "reduce_lr_on_plateau")])
def test_the_rate_of_an_online_teacher_is_its_own_times_the_schedules_share(make_trainer, given, schedule):
    """Whatever the rate of an optimizer that was passed in."""
    pytest.importorskip("peft")
    student = tiny_bert()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.5) if given else None
    teacher = OnlineTeacher(tiny_bert(seed=3), rank=2, learning_rate=1e-4)
    trainer = make_trainer(
        student,
        recipe=NONE,
        teacher_model=teacher,
        objectives=["kl"],
        max_steps=2,
        lr_scheduler_type=schedule,
        eval_strategy="epoch",
        trainer_kwargs={"optimizers": (optimizer, None)},
    )
    rates, step = [], trainer.run.tutor.companions.step

    def watched(main):
        step(main)
        rates.extend(group["lr"] for group in trainer.run.tutor.companions.optimizer.param_groups)

    trainer.run.tutor.companions.step = watched
    trainer.train()
    assert rates == pytest.approx([1e-4, 0.5e-4 if schedule == "linear" else 1e-4])


def test_a_roll_back_keeps_the_projection_of_a_teacher_of_the_students_own_weights(make_trainer):
    pytest.importorskip("peft")
    recipe = {"target_reduction": 0.6, "rounds": 2, "stage_share": 0.5, "teacher": "previous"}
    trainer = make_trainer(teacher_model=OnlineTeacher(tiny_bert(), rank=2), recipe=recipe | {"max_metric_drop": 9.0})
    trainer.train()
    trainer.run._roll_back("for the test")
    assert trainer.run.tutor.projections and trainer.objectives[2]._projections


def test_teachers_of_a_users_own_are_asked(make_trainer):
    class Sharper(FrozenTeacher):
        def __call__(self, inputs, paths=(), drop=()):
            outputs, features = super().__call__(inputs, paths, drop)
            return {"logits": 2 * outputs["logits"]}, features

    student = tiny_bert()
    sharper = Sharper(SnapshotTeacher(student).model)
    assert make_trainer(student, teacher_model=sharper).run.tutor.given is sharper


def test_modules_of_an_online_teacher_are_fp32_and_in_the_backbone_alone():
    pytest.importorskip("peft")
    teacher = OnlineTeacher(tiny_bert(cls=BertForMaskedLM).bfloat16(), rank=2)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    places = {n.split(".lora_")[0] for n, _ in teacher.model.named_parameters() if "lora_" in n}
    assert "bert.encoder.layer.0.attention.self.query" in places and all(p.startswith("bert.") for p in places)
    answers, _ = teacher(batch_of([{k: v for k, v in row.items() if k != "labels"} for row in ragged(2)]))
    assert answers["logits"].dtype == torch.bfloat16


def test_the_student_is_not_trained_through_the_teacher():
    """Each side sees the other's answers without a gradient, so one backward pass serves both losses."""
    pytest.importorskip("peft")
    from optimum_rmtkd.distillation import DistillationStep, KLDivergence

    student, teacher, inputs = tiny_bert(), OnlineTeacher(tiny_bert(seed=3), rank=2), batch_of(ragged(4))
    outputs = student(**inputs)
    answers, _ = teacher(inputs)
    assert not answers["logits"].requires_grad
    step = DistillationStep(inputs, student_outputs=outputs, teacher_outputs=answers)
    teacher.loss(step).backward()
    assert all(p.grad is None for p in student.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in teacher.parameters())
    for parameter in teacher.parameters():
        parameter.grad = None
    kl = KLDivergence()
    kl.setup(student, teacher.model, {})
    kl(step).backward()
    assert all(p.grad is None for p in teacher.parameters()) and student.classifier.weight.grad.abs().sum() > 0


def test_online_teacher_resumes_to_the_same_bits(make_trainer, weights):
    pytest.importorskip("peft")

    def make(out):
        teacher = OnlineTeacher(tiny_bert(seed=3), rank=2, learning_rate=1e-3)
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        return make_trainer(recipe=NONE, out=out, teacher_model=teacher, objectives=["task", "kl"], **saving)

    whole, resumed = make("whole"), make("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    for side in (lambda t: weights(t.model), lambda t: weights(t.run.teacher.model)):
        ours, theirs = side(whole), side(resumed)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


# -- cached -----------------------------------------------------------------------------------------------------------


def collate(rows, length=None):
    """Pads to the longest row, on the right."""
    length = max(len(r["input_ids"]) for r in rows)
    pad = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    out = {}
    for key in rows[0]:
        values = [torch.as_tensor(r[key]) for r in rows]
        if values[0].dim():
            values = [torch.nn.functional.pad(v, (0, length - len(v)), value=pad[key]) for v in values]
        out[key] = torch.stack(values)
    return out


def unpadded(kind):
    rows = []
    for row in ragged(24, kind=kind):
        n = int(row["attention_mask"].sum())
        rows.append({k: v[:n].tolist() if torch.is_tensor(v) else v for k, v in row.items()})
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize(("kind", "k"), [("three", 64), ("token", 64), ("token", 2)])
def test_cached_answers_are_the_teachers(make_trainer, kind, k):
    cls = {"three": {}, "token": {"cls": BertForTokenClassification}}[kind]
    teacher, data = tiny_bert(seed=5, num_labels=3, **cls), unpadded(kind)
    cached = cache_answers(teacher, data, collate, k=k, batch_size=7, progress=False)
    assert set(cached.column_names) > set(data.column_names) and len(cached) == len(data)
    results = {}
    for name, given, train in (("live", teacher, data), ("cached", CachedTeacher(), cached)):
        trainer = make_trainer(
            tiny_bert(num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **cls),
            recipe=NONE,
            out=name,
            teacher_model=given,
            objectives=["task", "kl"],
            max_steps=3,
            trainer_kwargs={"train_dataset": train, "eval_dataset": data, "data_collator": collate},
        )
        trainer.train()
        results[name] = history(trainer, "loss/kl")
        assert trainer.evaluate()["eval_loss"] > 0
    if k == 64:
        assert results["cached"] == pytest.approx(results["live"], rel=1e-4)
    else:  # the third class gets what the two largest leave: exact too
        assert results["cached"] == pytest.approx(results["live"], rel=1e-3)


def test_cached_answers_of_large_vocabularies_keep_the_mass():
    torch.manual_seed(0)
    from optimum_rmtkd.distillation.cached import _columns, _largest

    logits = 3 * torch.randn(2, 40)
    columns = _columns(_largest(logits, 5), None)
    inputs = {name: torch.stack([torch.as_tensor(v) for v in values]) for name, values in columns.items()}
    found = CachedTeacher()(inputs)[0]["logits"]
    p, q = logits.softmax(-1), found.softmax(-1)
    top = logits.topk(5).indices
    assert torch.allclose(p.gather(1, top), q.gather(1, top), atol=1e-6)
    assert torch.allclose(q.sum(-1), torch.ones(2))


def test_what_cached_answers_cannot_do_is_said(make_trainer):
    data = unpadded("sequence")
    options = {"train_dataset": data, "eval_dataset": None, "data_collator": collate}
    with pytest.raises(RMTKDError, match="The batch has no teacher_values"):
        make_trainer(recipe=NONE, teacher_model=CachedTeacher(), objectives=["kl"], trainer_kwargs=options).train()
    for objective in ("projected_feature", "attention_relation"):
        with pytest.raises(RMTKDError, match="cached answers have none"):
            make_trainer(
                recipe=NONE, teacher_model=CachedTeacher(), objectives=[objective], trainer_kwargs=options
            ).train()
    cached = cache_answers(tiny_bert(num_labels=3), data, collate, progress=False)
    with pytest.raises(RMTKDError, match="over 3 classes, the student has {'num_labels': 2, 'vocab_size': 60}"):
        make_trainer(
            teacher_model=CachedTeacher(), objectives=["kl"], trainer_kwargs=options | {"train_dataset": cached}
        )
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    bart = BartForConditionalGeneration(
        BartConfig(vocab_size=60, encoder_attention_heads=2, decoder_attention_heads=2, **sizes)
    )
    padded = datasets.Dataset.from_list([r | {"labels": r["input_ids"]} for r in ragged(4)])  # all of one length
    with pytest.raises(RMTKDError, match="is an encoder-decoder"):
        cache_answers(bart, padded, collate, progress=False)
    assert bart.training  # as it was
    with pytest.raises(RMTKDError, match="an empty dataset"):
        cache_answers(tiny_bert(), datasets.Dataset.from_dict({"input_ids": []}), collate)
    with pytest.raises(RMTKDError, match="got a list; expected a datasets.Dataset"):
        cache_answers(tiny_bert(), [], collate)
