from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from optimum_rmtkd.distillation import (
    EMATeacher,
    FrozenTeacher,
    SnapshotTeacher,
    capture,
    check_compatible,
    compose,
    fingerprint,
)
from optimum_rmtkd.distillation.teachers import in_precision_of
from optimum_rmtkd.errors import RMTKDError


def bert(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    return BertForSequenceClassification(BertConfig(**(sizes | changes)))


@pytest.fixture
def batch():
    torch.manual_seed(3)
    ids = torch.randint(0, 40, (2, 5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1])}


def test_capture_takes_first_of_a_tuple_and_removes_its_hooks(batch):
    class Pair(nn.Module):
        def forward(self, x):
            return x + 1, x + 2

    model = nn.Sequential(nn.Identity(), Pair())
    with capture(model, ["0", "1"]) as features:
        model(torch.zeros(3))
    assert torch.equal(features["1"], torch.ones(3)) and torch.equal(features["0"], torch.zeros(3))
    features.clear()
    model(torch.zeros(3))
    assert not features and not model[1]._forward_hooks


def test_capture_keeps_the_gradient(batch):
    model = bert()
    with capture(model, ["bert.encoder.layer.0"]) as features:
        model(**batch)
    features["bert.encoder.layer.0"].sum().backward()
    assert model.bert.embeddings.word_embeddings.weight.grad is not None


def test_capture_names_an_unknown_path_and_leaves_no_hook():
    model = bert()
    with pytest.raises(RMTKDError, match="'bert.nowhere'"), capture(model, ["classifier", "bert.nowhere"]):
        pass
    assert not model.classifier._forward_hooks


def test_teacher_answers_in_evaluation_mode_without_gradient_and_labels(batch):
    model = bert().train()
    outputs, features = FrozenTeacher(model)(batch, ["bert.encoder.layer.1"], drop=["labels"])
    assert "loss" not in outputs and not outputs["logits"].requires_grad and not model.training
    assert not features["bert.encoder.layer.1"].requires_grad
    assert "loss" in FrozenTeacher(model)(batch)[0]


def test_teacher_drops_inputs_it_does_not_take(batch):
    class Narrow(nn.Module):
        def forward(self, input_ids):
            return {"logits": input_ids.float()}

    assert torch.equal(FrozenTeacher(Narrow())(batch)[0]["logits"], batch["input_ids"].float())


def test_snapshot_does_not_follow_the_student(batch):
    student = bert()
    teacher = SnapshotTeacher(student)
    before = teacher(batch)[0]["logits"].clone()
    with torch.no_grad():
        student.classifier.weight.add_(1.0)
    teacher.update(student)
    assert torch.equal(teacher(batch)[0]["logits"], before)


def test_ema_follows_the_closed_form():
    student, start = bert(0), bert(0)
    teacher, decay = EMATeacher(student, decay=0.9), 0.9
    with torch.no_grad():
        student.classifier.weight.add_(1.0)
    for _ in range(3):
        teacher.update(student)
    expected = start.classifier.weight + (1 - decay**3)
    assert torch.allclose(teacher.model.classifier.weight, expected, atol=1e-6)
    assert torch.equal(student.classifier.weight, start.classifier.weight + 1.0)


def test_fingerprint_sees_weights_and_dtype():
    assert fingerprint(bert(0)) == fingerprint(bert(0))
    assert len({fingerprint(bert(0)), fingerprint(bert(1)), fingerprint(bert(0).bfloat16())}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 41}, "vocab_size=41.*vocab_size=40"),
        ({"num_labels": 3}, "num_labels=3.*num_labels=2"),
        ({"id2label": {0: "bad", 1: "good"}}, "bad.*good"),
    ],
)
def test_mismatched_teachers_are_refused(changes, message):
    student = bert(id2label={0: "good", 1: "bad"})
    with pytest.raises(RMTKDError, match=message):
        check_compatible(student, bert(**changes))


def test_placeholder_label_names_say_nothing():
    check_compatible(bert(id2label={0: "good", 1: "bad"}), bert())


def test_composed_projection_is_one_after_the_other():
    torch.manual_seed(0)
    stream, first, second = torch.randn(7, 6), {"hidden": torch.randn(6, 4)}, {"hidden": torch.randn(4, 3)}
    joined = compose(first, second)["hidden"]
    assert torch.allclose(stream @ joined, stream @ first["hidden"] @ second["hidden"], atol=1e-5)
    assert torch.equal(compose(first, {})["hidden"], first["hidden"])
    assert torch.equal(compose({}, second)["hidden"], second["hidden"])
    assert compose({}, {}) == {}


def test_pixels_come_in_the_precision_of_the_model_and_labels_as_they_are():
    model, batch = nn.Linear(2, 2).bfloat16(), {"pixel_values": torch.rand(2), "labels": torch.rand(2)}
    read = in_precision_of(model, batch)
    assert read["pixel_values"].dtype == torch.bfloat16 and read["labels"] is batch["labels"]
    assert batch["pixel_values"].dtype == torch.float32
    ids = {"input_ids": torch.arange(3)}
    assert in_precision_of(model, ids)["input_ids"] is ids["input_ids"]
