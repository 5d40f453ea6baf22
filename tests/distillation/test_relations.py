from __future__ import annotations

import pytest
import torch
import transformers

from optimum_rmtkd.distillation import AttentionRelationLoss, DistillationStep, capture
from optimum_rmtkd.errors import RMTKDError

from ..trainer.conftest import tiny_bert


def models(**changes):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}
    return tiny_bert(0, **(still | changes)).eval(), tiny_bert(1, **still).eval()


def ask(loss, student, teacher, ids, mask):
    request = loss.features()
    outputs = []
    with torch.no_grad():
        for model, paths in ((student, request.student), (teacher, request.teacher)):
            with capture(model, paths) as features:
                outputs.append((features, model(ids, attention_mask=mask, output_attentions=True).attentions))
    (ours, a), (theirs, b) = outputs
    return DistillationStep({}, student_features=ours, teacher_features=theirs, mask=mask.bool()), a, b


@pytest.fixture
def batch():
    ids = torch.randint(5, 60, (3, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])
    return ids, mask


def test_qk_is_the_attention_of_the_models(batch):
    """The slow oracle: KL between the attention probabilities that the models themselves return."""
    student, teacher = models()
    loss = AttentionRelationLoss("qk")
    loss.setup(student, teacher, {})
    step, ours, theirs = ask(loss, student, teacher, *batch)
    q, p, mask = ours[-1].double(), theirs[-1].double(), batch[1].bool()
    terms = torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1).mean(1)  # (batch, tokens), heads averaged
    assert loss(step).item() == pytest.approx(terms[mask].mean().item(), rel=1e-4)


def test_a_cut_head_keeps_the_scale_of_its_model(batch):
    student, teacher = models()
    for layer in student.bert.encoder.layer:
        layer.attention.self.scaling = 0.05
    loss = AttentionRelationLoss("qk")
    loss.setup(student, teacher, {})
    step, ours, theirs = ask(loss, student, teacher, *batch)
    q, p, mask = ours[-1].double(), theirs[-1].double(), batch[1].bool()
    terms = torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1).mean(1)
    assert loss(step).item() == pytest.approx(terms[mask].mean().item(), rel=1e-4)


def test_a_teacher_of_other_heads_is_cut_anew_and_scaled_by_the_new_width(batch):
    student, teacher = models()
    other = tiny_bert(1, num_attention_heads=2, attn_implementation="eager").eval()
    values = []
    for them in (teacher, other):  # the same weights: relation heads are the student's in both
        loss = AttentionRelationLoss("qk")
        loss.setup(student, them, {})
        values.append(loss(ask(loss, student, teacher, *batch)[0]))
    assert torch.equal(*values)


@pytest.mark.parametrize("relations", [("vv",), ("qq", "kk", "vv"), ("qk", "vv")])
def test_widths_may_differ_and_padding_does_not_matter(batch, relations):
    student, teacher = models(hidden_size=16)
    loss = AttentionRelationLoss(relations)
    loss.setup(student, teacher, {})
    step, _, _ = ask(loss, student, teacher, *batch)
    value = loss(step)
    assert value > 0
    for tensor in step.teacher_features.values():
        tensor[~step.mask] = float("inf")
    for name, tensor in step.student_features.items():
        spoilt = tensor.masked_fill(~step.mask[..., None], float("nan"))
        step.student_features[name] = spoilt.requires_grad_()
    found = loss(step)
    found.backward()
    assert torch.allclose(found, value, atol=1e-6)
    for tensor in step.student_features.values():
        assert torch.isfinite(tensor.grad).all() and (tensor.grad[~step.mask] == 0).all()
    same = AttentionRelationLoss(relations)
    same.setup(teacher, teacher, {})
    step, _, _ = ask(same, teacher, teacher, *batch)
    assert same(step).abs() < 1e-6


@pytest.mark.parametrize("head", ["ForCausalLM", "ForSequenceClassification"])
def test_causal_attention_looks_back_only_whatever_the_head(head):
    """The slow oracle: value relations of each token over itself and those before it."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 20, "pad_token_id": 0}
    config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes)
    student, teacher = (getattr(transformers, "Llama" + head)(config).eval() for _ in range(2))
    loss = AttentionRelationLoss("vv")
    loss.setup(student, teacher, {})
    ids = torch.randint(1, 20, (3, 5))
    features = []
    with torch.no_grad():
        for model, paths in ((student, loss.features().student), (teacher, loss.features().teacher)):
            with capture(model, paths) as found:
                model(ids)
            features.append(found)
    step = DistillationStep({"input_ids": ids}, student_features=features[0], teacher_features=features[1])
    terms = []
    for row in range(3):
        for first in (0, 8):  # columns of a head
            q, p = (next(iter(found.values()))[row, :, first : first + 8].double() for found in features)
            for token in range(5):
                log_q, log_p = ((x[token] @ x[: token + 1].T / 8**0.5).log_softmax(0) for x in (q, p))
                terms.append(float((log_p.exp() * (log_p - log_q)).sum()))
    assert loss(step).item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_refusals(batch):
    for bad in ({"relations": "qx"}, {"relations": []}, {"heads": 0}):
        with pytest.raises(RMTKDError):
            AttentionRelationLoss(**bad)
    student, teacher = models()
    with pytest.raises(RMTKDError, match=r"heads=5\): .*value' of Bert.* is 32 wide; expected a multiple"):
        AttentionRelationLoss("vv", heads=5).check(student, teacher)
