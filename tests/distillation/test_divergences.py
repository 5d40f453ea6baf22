"""Bounds, limits and invariances of the terms on answers, and the schedules of their weights."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from scipy.stats import pearsonr, spearmanr
from torch import nn

from optimum_rmtkd.distillation import (
    CorrelationDistance,
    DistillationStep,
    JensenShannonDivergence,
    KLDivergence,
    SkewKLDivergence,
    TaskLoss,
    build_objectives,
)
from optimum_rmtkd.distillation.objectives.correlation import pearson, soft_ranks
from optimum_rmtkd.distillation.objectives.divergences import jensen_shannon, kl_divergence, log_mixture, skew_kl
from optimum_rmtkd.errors import RMTKDError


class Head(nn.Module):
    def __init__(self, loss_type="ForSequenceClassification", **config):
        super().__init__()
        self.config, self.loss_type = SimpleNamespace(**config), loss_type


def value(objective, ours, theirs, inputs=None, **config):
    objective.setup(Head(**config), None, {})
    return objective(DistillationStep(inputs or {}, {"logits": ours}, {"logits": theirs}))


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [F.log_softmax(4 * torch.randn(50, 7, generator=generator), -1) for _ in range(2)]


# -- divergences ------------------------------------------------------------------------------------------------------


def test_skew_kl_is_bounded_and_tends_to_kl(pair):
    p, q = pair
    for alpha in (0.05, 0.1, 0.5):
        found = skew_kl(p, q, alpha)
        assert (found >= 0).all() and found.max() <= -math.log(alpha)
    assert kl_divergence(p, q).max() > -math.log(0.1)
    mild_p, mild_q = F.log_softmax(p / 4, -1), F.log_softmax(q / 4, -1)
    assert torch.allclose(skew_kl(mild_p, mild_q, 1e-5), kl_divergence(mild_p, mild_q), rtol=1e-2)
    assert torch.equal(skew_kl(p, p, 0.1).abs() < 1e-6, torch.ones(50, dtype=torch.bool))


def test_skew_kl_against_the_slow_formula(pair):
    p, q = (x.double().exp() for x in pair)
    m = 0.1 * p + 0.9 * q
    assert torch.allclose(skew_kl(p.log(), q.log(), 0.1), (p * (p / m).log()).sum(-1))
    ours, theirs = pair[1], pair[0]
    forward, back = (
        value(SkewKLDivergence(1.0), ours, theirs),
        value(SkewKLDivergence(1.0, reverse=True), theirs, ours),
    )
    assert torch.allclose(forward, back)  # reverse is the same with both sides exchanged


def test_jensen_shannon_bounds_symmetry_and_ends(pair):
    p, q = pair
    half = jensen_shannon(p, q, 0.5)
    assert (
        (half >= 0).all() and half.max() <= math.log(2) and torch.allclose(half, jensen_shannon(q, p, 0.5), atol=1e-6)
    )
    assert torch.equal(jensen_shannon(p, q, 0.0), kl_divergence(p, q))
    assert torch.equal(jensen_shannon(p, q, 1.0), kl_divergence(q, p))
    # The ends are not the limit of the middle, which fades like beta; rescaled it is.
    p, q = p / 4, q / 4
    near = value(JensenShannonDivergence(1.0, beta=1e-4), q, p)
    joined = value(JensenShannonDivergence(1.0, beta=1e-4, rescale=True), q, p)
    end = value(JensenShannonDivergence(1.0, beta=0.0), q, p)
    assert near < 1e-3 * end and torch.allclose(joined, end, rtol=0.02)


def test_log_mixture_at_extreme_logits():
    p, q = torch.tensor([0.0, -1e4]), torch.tensor([-1e4, 0.0])
    assert torch.allclose(log_mixture(p, q, 0.1), torch.tensor([math.log(0.1), math.log(0.9)]))
    assert torch.equal(log_mixture(p, q, 0.0), q) and torch.equal(log_mixture(p, q, 1.0), p)


def test_reverse_kl_and_its_temperature(pair):
    theirs, ours = pair
    p, q = F.log_softmax(theirs / 2, -1), F.log_softmax(ours / 2, -1)
    assert torch.allclose(
        value(KLDivergence(1.0, temperature=2.0, reverse=True), ours, theirs), 4 * kl_divergence(q, p).mean()
    )


@pytest.mark.parametrize(
    "objective", [KLDivergence(1.0, reverse=True), SkewKLDivergence(1.0), JensenShannonDivergence(1.0)]
)
def test_masked_tokens_contribute_nothing_not_even_nan(objective):
    ours, theirs = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    labels = torch.tensor([[1, -100, 2], [-100, -100, 3]])
    clean = value(objective, ours, theirs, {"labels": labels})
    ours[labels == -100], theirs[labels == -100] = float("nan"), float("-inf")
    ours.requires_grad_()
    spoilt = value(objective, ours, theirs, {"labels": labels})
    spoilt.backward()
    assert torch.equal(clean, spoilt) and torch.isfinite(ours.grad).all()


@pytest.mark.parametrize(
    "objective",
    [KLDivergence(1.0), KLDivergence(1.0, reverse=True), SkewKLDivergence(1.0), JensenShannonDivergence(1.0)],
)
def test_a_class_ruled_out_by_both_contributes_nothing(objective):
    ours, theirs = torch.randn(4, 5), torch.randn(4, 5)
    expected = value(objective, ours, theirs)
    lost = torch.full((4, 1), -math.inf)
    ours, theirs = torch.cat((ours, lost), 1).requires_grad_(), torch.cat((theirs, lost), 1)
    found = value(objective, ours, theirs)
    found.backward()
    assert torch.allclose(found, expected) and torch.isfinite(ours.grad).all()


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_padding_of_spans_at_low_temperature(temperature):
    mask = torch.tensor([[True, True, True, False]])
    sides = [{n: torch.randn(1, 4) for n in ("start_logits", "end_logits")} for _ in range(2)]
    objective = KLDivergence(1.0, temperature=temperature)
    objective.setup(Head(), None, {})
    found = objective(DistillationStep({}, *sides, mask=mask))
    short = [{n: x[:, :3] for n, x in side.items()} for side in sides]
    assert torch.allclose(found, objective(DistillationStep({}, *short)), rtol=1e-4)


def test_fractional_labels_mean_several_labels_where_the_config_says_nothing():
    """transformers sets `problem_type` at the first forward pass with labels: too late for `setup`."""
    ours, theirs, inputs = torch.randn(6, 4), torch.randn(6, 4), {"labels": torch.rand(6, 4).round()}
    named = {"problem_type": "multi_label_classification"}
    for objective in (KLDivergence(1.0), CorrelationDistance(dim="batch")):
        assert torch.equal(value(objective, ours, theirs, inputs), value(objective, ours, theirs, **named))
        assert not torch.allclose(value(objective, ours, theirs), value(objective, ours, theirs, **named))


def test_one_output_a_token_is_regression():
    ours, theirs = torch.randn(2, 3, 1), torch.randn(2, 3, 1)
    found = value(KLDivergence(1.0), ours, theirs, {"labels": torch.tensor([[1, 1, -100], [1, -100, -100]])})
    gaps = (ours - theirs)[[0, 0, 1], [0, 1, 0]]
    assert torch.allclose(found, gaps.square().mean())


@pytest.mark.parametrize("padding", ["left", "right"])
def test_unlabelled_causal_answers_never_come_from_padding(padding):
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    mask = mask.flip(1) if padding == "left" else mask
    ours, theirs = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    clean = [torch.nan_to_num(x.masked_fill(~mask[..., None], 0)) for x in (ours, theirs)]
    spoilt = [x.masked_fill(~mask[..., None], math.nan) for x in (ours, theirs)]
    objective, found = KLDivergence(1.0), []
    objective.setup(Head("ForCausalLM"), None, {})
    for a, b in (clean, spoilt):
        found.append(objective(DistillationStep({}, {"logits": a}, {"logits": b}, mask=mask)))
    assert torch.equal(*found)


@pytest.mark.parametrize("objective", [SkewKLDivergence(1.0), JensenShannonDivergence(1.0, beta=0.3)])
def test_regression_and_several_labels(objective):
    ours, theirs = torch.randn(6, 1), torch.randn(6, 1)
    assert torch.allclose(value(objective, ours, theirs, num_labels=1), F.mse_loss(ours, theirs))
    both = torch.randn(6, 4)
    assert value(objective, both, both, problem_type="multi_label_classification").abs() < 1e-6


def test_ranges():
    for bad in (
        lambda: SkewKLDivergence(alpha=0.0),
        lambda: SkewKLDivergence(alpha=1.0),
        lambda: JensenShannonDivergence(beta=1.5),
        lambda: KLDivergence(temperature=0),
        lambda: KLDivergence(reverse="false"),
        lambda: JensenShannonDivergence(rescale=1),
        lambda: CorrelationDistance(kind="kendall"),
        lambda: CorrelationDistance(dim="token"),
        lambda: CorrelationDistance(top_k=2),
    ):
        with pytest.raises(RMTKDError):
            bad()


# -- correlation ------------------------------------------------------------------------------------------------------


def test_pearson_and_ranks_against_scipy():
    x, y = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    assert pearson(x, y).tolist() == pytest.approx([pearsonr(a, b)[0] for a, b in zip(x, y, strict=True)])
    hard = pearson(soft_ranks(x, 1e-4), soft_ranks(y, 1e-4))
    assert hard.tolist() == pytest.approx([spearmanr(a, b)[0] for a, b in zip(x, y, strict=True)], abs=1e-6)


def test_correlation_ignores_affine_changes_of_the_predictions():
    x, y = torch.rand(5, 6), torch.rand(5, 6)
    assert torch.allclose(pearson(x, y), pearson(3 * x + 1, 0.2 * y - 4), atol=1e-5)
    assert torch.allclose(pearson(x, -x), torch.full((5,), -1.0))


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
@pytest.mark.parametrize("dim", ["class", "batch"])
def test_correlation_distance_is_zero_for_equal_answers_and_has_a_gradient(kind, dim):
    ours, theirs = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5)
    assert value(CorrelationDistance(kind, dim), theirs, theirs).abs() < 1e-5
    found = value(CorrelationDistance(kind, dim), ours, theirs)
    found.backward()
    assert 0 < found < 2 and ours.grad.abs().sum() > 1e-3


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
@pytest.mark.parametrize("dim", ["class", "batch"])
def test_constant_predictions_have_no_direction_and_no_gradient(kind, dim):
    ours = torch.zeros(8, 5, requires_grad=True)
    found = value(CorrelationDistance(kind, dim), ours, torch.randn(8, 5))
    found.backward()
    assert found.item() == pytest.approx(1.0) and (ours.grad == 0).all()
    # Small is not constant: rare classes count, and nothing underflows.
    x, y = torch.rand(5, 6), torch.rand(5, 6)
    assert torch.allclose(pearson(x, y), pearson(1e-25 * x, 1e-25 * y), atol=1e-5)


def test_two_classes_are_vacuous_over_classes_and_refused():
    x = torch.randn(6, 2, requires_grad=True)
    pearson(x.softmax(-1), torch.rand(6, 2)).sum().backward()
    assert x.grad.abs().max() < 1e-5  # why
    with pytest.raises(RMTKDError, match="over 2 class.*dim='batch'"):
        value(CorrelationDistance(), torch.randn(6, 2), torch.randn(6, 2))
    assert value(CorrelationDistance(dim="batch"), torch.randn(6, 2), torch.randn(6, 2)) > 0


def test_choices_are_counted_where_they_are_seen():
    """A model for multiple choice has num_labels=2 whatever the number of choices."""
    config = transformers.DebertaV2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    model = transformers.DebertaV2ForMultipleChoice(config)
    assert model.num_labels == 2
    CorrelationDistance().check(model, model)
    with pytest.raises(RMTKDError, match="does not know spans"):
        CorrelationDistance().check(transformers.DebertaV2ForQuestionAnswering(config), None)


def test_vocabularies_are_cut_to_the_teachers_largest_and_tiny_batches_left_out(caplog):
    ours, theirs = torch.randn(3, 50), torch.randn(3, 50)
    places = theirs.topk(4).indices
    expected = value(CorrelationDistance(top_k=4), ours.gather(1, places), theirs.gather(1, places))
    assert torch.allclose(value(CorrelationDistance(top_k=4), ours, theirs), expected)
    # Over the batch a column is one class, not whatever is k-th in each row.
    theirs[:, [7, 9, 30]] += 9
    expected = value(CorrelationDistance(dim="batch"), ours[:, [7, 9, 30]], theirs[:, [7, 9, 30]])
    assert torch.allclose(value(CorrelationDistance(dim="batch", top_k=3), ours, theirs), expected, atol=1e-6)
    few = CorrelationDistance(dim="batch")
    assert value(few, ours[:2], theirs[:2]) == 0 and "at least 3 are needed" in caplog.text


# -- weights and labels -----------------------------------------------------------------------------------------------


def test_schedules_of_weights():
    linear = TaskLoss({"start": 1, "end": 0, "over": [0.25, 0.75]})
    assert [linear.weight_at(x) for x in (0, 0.25, 0.5, 0.75, 1)] == [1, 1, 0.5, 0, 0]
    cosine = TaskLoss({"schedule": "cosine", "start": 0, "end": 2})
    assert [round(cosine.weight_at(x), 6) for x in (0, 0.5, 1)] == [0, 1, 2]
    step = TaskLoss({"schedule": "step", "start": 0, "end": 1, "over": [0, 0.5]})
    assert [step.weight_at(x) for x in (0, 0.49, 0.5)] == [0, 0, 1]
    assert TaskLoss(0.3).weight_at(0.7) == 0.3
    again = type(linear).from_dict(linear.to_dict())
    assert again.weight == linear.weight
    for bad in (
        -1,
        "high",
        True,
        float("nan"),
        {"start": 1},
        {"start": 1, "end": -1},
        {"start": 1, "end": 0, "over": [1, 0]},
        {"start": 1, "end": 0, "over": 0.5},
        {"start": 1, "end": 0, "schedule": ["linear"]},
    ):
        with pytest.raises(RMTKDError, match="weight"):
            TaskLoss(bad)


def test_labels_let_one_class_appear_twice():
    built = build_objectives({"kl": {}, "back": {"name": "kl", "reverse": True}, "task": None})
    assert [(o.label, o.name) for o in built] == [("kl", "kl"), ("back", "kl"), ("task", "task")]
    again = build_objectives([o.to_dict() for o in built])
    assert [o.label for o in again] == ["kl", "back", "task"] and again[1].reverse
    assert build_objectives("kl")[0].name == "kl" and build_objectives(["kl", "task"])[1].name == "task"
    with pytest.raises(RMTKDError, match="'kl' has 3; expected a mapping"):
        build_objectives({"kl": 3})
    with pytest.raises(RMTKDError, match="No objective 'klx'; expected one of attention_relation, correlation"):
        build_objectives({"klx": {}})
