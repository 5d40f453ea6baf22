"""A teacher gets what its forward takes, the student what its own takes, in training, calibration and evaluation."""

from __future__ import annotations

import logging

import datasets
import pytest
import torch
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    default_data_collator,
)

from optimum_rmtkd.distillation import CachedTeacher, FrozenTeacher, OnlineTeacher, WeightedTeachers, cache_answers
from optimum_rmtkd.distillation.signatures import named_inputs, taken
from optimum_rmtkd.errors import RMTKDError

from ..tables import covering
from .conftest import tiny_bert, toy_data


NONE = {"schedule": "none", "target_reduction": None}


def tiny_distilbert(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 32}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes))


def pairs(samples=64, seed=1):
    """Rows of two texts, the second of which begins at the sixth token."""
    kinds = torch.tensor([0] * 5 + [1] * 5)
    return [row | {"token_type_ids": kinds} for row in toy_data(samples, seed=seed)]


def as_dataset(rows):
    plain = [{k: v.tolist() if torch.is_tensor(v) else v for k, v in row.items()} for row in rows]
    return datasets.Dataset.from_list(plain)


def as_stream(rows):
    return as_dataset(rows).to_iterable_dataset()


def watched(model, seen):
    """Notes the names of all inputs that reach a model."""

    def look(module, args, kwargs):
        seen.update(name for name, value in kwargs.items() if value is not None)

    model.register_forward_pre_hook(look, with_kwargs=True)
    return model


@pytest.mark.parametrize(("recipe", "make"), covering([{}, NONE], [list, as_dataset, as_stream]))
def test_token_types_reach_the_teacher_alone(make_trainer, make, recipe):
    to_teacher, to_student = set(), set()
    student, teacher = watched(tiny_distilbert(), to_student), watched(tiny_bert(3), to_teacher)
    data = {"train_dataset": make(pairs()), "eval_dataset": make(pairs(16, seed=2))}
    trainer = make_trainer(
        student,
        recipe=recipe,
        teacher_model=teacher,
        objectives=["task", "kl", "projected_feature"],
        trainer_kwargs=data,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    trainer.evaluate()
    trainer.predict(make(pairs(16, seed=2)))
    assert to_teacher == {"input_ids", "attention_mask", "token_type_ids"}
    assert to_student == {"input_ids", "attention_mask", "labels"}


def test_the_loss_is_that_of_the_teachers_real_answers(make_trainer):
    """By hand: KL between the student and a teacher that knows which text is which."""
    student, teacher = tiny_distilbert(), tiny_bert(3)
    with torch.no_grad():
        for model in (student, teacher):  # so that their answers differ by more than rounding
            for parameter in model.parameters():
                parameter.mul_(6 if parameter.dim() > 1 else 1)
        teacher.bert.embeddings.token_type_embeddings.weight.normal_(std=2.0)
    rows = pairs(8)
    batch = {k: torch.stack([torch.as_tensor(row[k]) for row in rows]) for k in rows[0]}
    with torch.no_grad():
        theirs = teacher.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits
        blind = teacher(batch["input_ids"], batch["attention_mask"]).logits
        ours = student.eval()(batch["input_ids"], batch["attention_mask"]).logits

    def kl(logits):
        return (logits.softmax(-1) * (logits.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).mean().item()

    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer = make_trainer(
        student,
        recipe=NONE,
        teacher_model=teacher,
        objectives=["kl"],
        max_steps=1,
        trainer_kwargs={"train_dataset": rows, "eval_dataset": None},
    )
    trainer.train()
    found = next(entry["loss/kl"] for entry in trainer.state.log_history if "loss/kl" in entry)
    assert found == pytest.approx(kl(theirs), rel=1e-4) and abs(kl(blind) - kl(theirs)) > 0.05 * kl(theirs)


def test_several_teachers_get_each_its_own(make_trainer):
    one, two, three = set(), set(), set()
    teachers = [watched(tiny_bert(3), one), watched(tiny_distilbert(4), two), watched(tiny_bert(5), three)]
    trainer = make_trainer(
        tiny_distilbert(),
        recipe=NONE,
        teacher_model=teachers,
        objectives=["kl"],
        max_steps=1,
        trainer_kwargs={"train_dataset": pairs(), "eval_dataset": None},
    )
    trainer.train()
    assert one == three == {"input_ids", "attention_mask", "token_type_ids"}
    assert two == {"input_ids", "attention_mask"}


def test_what_the_teacher_does_not_take_does_not_reach_it(make_trainer):
    to_teacher, to_student = set(), set()
    trainer = make_trainer(
        watched(tiny_bert(), to_student),
        teacher_model=watched(tiny_distilbert(4), to_teacher),
        recipe=NONE,
        objectives=["task", "kl"],
        max_steps=1,
        trainer_kwargs={"train_dataset": pairs(), "eval_dataset": None},
    )
    trainer.train()
    assert to_teacher == {"input_ids", "attention_mask"}
    assert to_student == {"input_ids", "attention_mask", "token_type_ids", "labels"}


def tiny_roberta(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = RobertaConfig(**sizes, intermediate_size=64, max_position_embeddings=40, type_vocab_size=1)
    return RobertaForSequenceClassification(config)


@pytest.mark.parametrize(("recipe", "kind"), covering([{}, NONE], ["plain", "cached", "several"]))
def test_a_model_of_one_token_type_gets_none(make_trainer, recipe, kind):
    """RoBERTa names token_type_ids and has one type: the second text of a pair lies outside its table."""
    to_teacher, to_student = set(), set()
    teacher, rows = watched(tiny_bert(3), to_teacher), as_dataset(pairs())
    given = {"plain": teacher, "several": [teacher, tiny_roberta(5)], "cached": CachedTeacher()}[kind]
    if kind == "cached":
        rows = cache_answers(teacher, rows, default_data_collator)
    trainer = make_trainer(
        watched(tiny_roberta(), to_student), recipe=recipe, teacher_model=given, objectives=["task", "kl"],
        max_steps=2, trainer_kwargs={"train_dataset": rows, "eval_dataset": as_dataset(pairs(16, seed=2))},
    )  # fmt: skip
    trainer.train()
    trainer.predict(as_dataset(pairs(16, seed=2)))
    assert to_student == {"input_ids", "attention_mask", "labels"}
    assert to_teacher >= {"input_ids", "attention_mask", "token_type_ids"}


def test_pixels_reach_a_teacher_in_its_precision(make_trainer):
    def resnet(seed):
        torch.manual_seed(seed)
        sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
        return ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=3, **sizes))

    rows = [{"pixel_values": torch.rand(1, 16, 16), "labels": i % 3} for i in range(16)]
    found = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        trainer = make_trainer(
            resnet(0), recipe=NONE, out=str(dtype), teacher_model=resnet(1).to(dtype), objectives=["kl"], max_steps=1,
            trainer_kwargs={"train_dataset": rows, "eval_dataset": None},
        )  # fmt: skip
        trainer.train()
        found.append(next(e["loss/kl"] for e in trainer.state.log_history if "loss/kl" in e))
    assert found[1] == pytest.approx(found[0], rel=1e-3) and found[2] == pytest.approx(found[0], rel=0.2)


def test_answers_are_read_by_name(make_trainer):
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_bert(3)

        def forward(self, input_ids, attention_mask=None):
            return self.inner(input_ids, attention_mask).to_tuple()

    def make(teacher):
        return make_trainer(recipe=NONE, teacher_model=teacher, objectives=["kl"], max_steps=1)

    with pytest.raises(RMTKDError, match="The teacher returned a tuple; KLDivergence reads its answers by name"):
        make(Bare()).train()
    found = []
    for changes in ({}, {"return_dict": False}):
        trainer = make(tiny_bert(3, **changes))
        trainer.train()
        found.append(next(e["loss/kl"] for e in trainer.state.log_history if "loss/kl" in e))
    assert found[0] == found[1] > 0


def test_an_online_teacher_gets_them_too(make_trainer):
    pytest.importorskip("peft")
    seen = set()
    teacher = OnlineTeacher(tiny_bert(3), rank=2)
    watched(teacher.model, seen)
    data = {"train_dataset": pairs(), "eval_dataset": None}
    make_trainer(
        tiny_distilbert(), recipe=NONE, teacher_model=teacher, objectives=["kl"], max_steps=1, trainer_kwargs=data
    ).train()
    assert seen == {"input_ids", "attention_mask", "token_type_ids", "labels"}


def test_a_teacher_inside_peft_is_known_by_the_model_inside(make_trainer):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_bert(3), peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    seen = set()
    watched(wrapped.get_base_model(), seen)
    assert "token_type_ids" in named_inputs(wrapped) and "token_type_ids" in FrozenTeacher(wrapped).columns
    data = {"train_dataset": as_dataset(pairs()), "eval_dataset": None}
    make_trainer(
        tiny_distilbert(), recipe=NONE, teacher_model=wrapped, objectives=["kl"], max_steps=1, trainer_kwargs=data
    ).train()
    assert "token_type_ids" in seen
    light = peft.get_peft_model(tiny_distilbert(), peft.LoraConfig(target_modules=["q_lin"], task_type="SEQ_CLS"))
    assert "token_type_ids" not in FrozenTeacher(light).accepted(dict.fromkeys(["input_ids", "token_type_ids"]))


def test_a_teacher_of_the_users_own_names_its_columns(make_trainer):
    class Noted(FrozenTeacher):
        columns = ("input_ids", "attention_mask", "hint")

        def __call__(self, inputs, paths=(), drop=()):
            hints.append(inputs["hint"])
            return super().__call__({k: v for k, v in inputs.items() if k != "hint"}, paths, drop)

    hints, to_student = [], set()
    rows = [row | {"hint": 7} for row in toy_data()]
    trainer = make_trainer(
        watched(tiny_distilbert(), to_student),
        recipe=NONE,
        teacher_model=Noted(tiny_distilbert(4)),
        objectives=["task", "kl"],
        max_steps=1,
        trainer_kwargs={"train_dataset": rows, "eval_dataset": None},
    )
    trainer.train()
    assert hints[-1].tolist() == [7] * 8 and "hint" not in to_student
    both = WeightedTeachers([Noted(tiny_distilbert(4)), tiny_bert(3)])
    assert {"hint", "token_type_ids"} <= set(both.columns)


def test_cached_answers_of_pairs(make_trainer):
    """They are computed with the teacher's inputs; the student trains on its own."""

    def collate(rows):
        return {k: torch.stack([torch.as_tensor(r[k]) for r in rows]) for k in rows[0]}

    to_teacher, to_student = set(), set()
    data = cache_answers(watched(tiny_bert(3), to_teacher), as_dataset(pairs(16)), collate, progress=False)
    make_trainer(
        watched(tiny_distilbert(), to_student),
        recipe=NONE,
        teacher_model=CachedTeacher(),
        objectives=["task", "kl"],
        max_steps=1,
        trainer_kwargs={"train_dataset": data, "eval_dataset": None},
    ).train()
    assert "token_type_ids" in to_teacher and to_student == {"input_ids", "attention_mask", "labels"}


def test_unused_columns_that_the_user_keeps(make_trainer):
    """With remove_unused_columns=False all goes to the student that its forward can take."""
    to_teacher, to_student = set(), set()
    trainer = make_trainer(
        watched(tiny_distilbert(), to_student),
        teacher_model=watched(tiny_bert(3), to_teacher),
        recipe=NONE,
        objectives=["task", "kl"],
        max_steps=1,
        remove_unused_columns=False,
        trainer_kwargs={"train_dataset": pairs(), "eval_dataset": pairs(16)},
    )
    trainer.train()
    trainer.evaluate()
    assert "token_type_ids" in to_teacher and "token_type_ids" not in to_student


def test_pairs_without_token_types_draw_a_warning(make_trainer, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer(
            tiny_distilbert(), recipe=NONE, teacher_model=tiny_bert(3), objectives=["kl"], max_steps=1
        ).train()
    assert "return_token_type_ids=True" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        single = tiny_bert(3, type_vocab_size=1)
        make_trainer(tiny_distilbert(), recipe=NONE, teacher_model=single, objectives=["kl"], max_steps=1).train()
    assert "token_type_ids" not in caplog.text


def test_names_that_a_forward_takes():
    class Plain(torch.nn.Module):
        def forward(self, pixel_values, scale=1.0):
            return pixel_values

    class Any(torch.nn.Module):
        def forward(self, input_ids, **kwargs):
            return input_ids

    assert named_inputs(Plain()) == ["pixel_values", "scale"] and taken(Plain()) == {"pixel_values", "scale"}
    assert named_inputs(Any()) == ["input_ids"] and taken(Any()) is None
    assert "token_type_ids" not in taken(tiny_distilbert()) and "output_attentions" in taken(tiny_distilbert())
