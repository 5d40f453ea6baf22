"""What calibration sees: the right activations, no padding, the same on every run, and no trace left behind."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from optimum_rmtkd import CalibrationError, RMTKDConfig
from optimum_rmtkd.surgery.calibration import Calibration, calibrate, observed
from optimum_rmtkd.surgery.likelihood import content_uniforms, gives_likelihood, log_likelihood
from optimum_rmtkd.surgery.reduction import anatomy_of
from optimum_rmtkd.surgery.sites import Point

from . import zoo


RECIPE = RMTKDConfig(sample_unit="token", calibration_samples=48)
NORM = "@.encoder.layer.{}.output.LayerNorm"


def points_of(model):
    return sorted({p for site in anatomy_of(model, RECIPE).sites.values() for p in site.points}, key=str)


def moments_of(model, batches, gradients=True, config=RECIPE):
    """All moments of a model over some batches."""
    hidden = anatomy_of(model, config).sites["hidden"].points if gradients else ()
    return calibrate(model, batches, Calibration(points_of(model), hidden, config), progress=False)


def assert_same_moments(first: Calibration, second: Calibration, tolerance: float = 0.0) -> None:
    assert first.moments.keys() == second.moments.keys()
    assert first.samples_seen == second.samples_seen
    for point, mine in first.moments.items():
        theirs = second.moments[point]
        assert mine.count == theirs.count
        assert (mine.gradient_moment is None) == (theirs.gradient_moment is None)
        pairs = [(mine.second_moment, theirs.second_moment)]
        if mine.gradient_moment is not None:
            pairs.append((mine.gradient_moment, theirs.gradient_moment))
        for a, b in pairs:
            assert (a - b).abs().max() <= tolerance * b.abs().max(), point


def hooks_of(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.fixture
def bert():
    return zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert")


# Nothing stays behind


def test_calibration_leaves_no_trace(bert):
    model, data = bert
    model.train()
    model.bert.pooler.dense.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = hooks_of(model)
    found = moments_of(model, data)
    assert found.moments
    assert model.training
    assert hooks_of(model) == hooks
    assert [k for k, p in model.named_parameters() if not p.requires_grad] == ["bert.pooler.dense.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_hooks_go_even_when_the_model_fails(bert):
    model, data = bert
    hooks = hooks_of(model)
    data[1]["input_ids"][0, 0] = 10_000  # outside the vocabulary
    with pytest.raises(CalibrationError, match="cannot run on calibration batch 1, which holds input_ids int64"):
        moments_of(model.train(), data)
    assert hooks_of(model) == hooks
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_observed_calls_and_cleans(bert):
    model, data = bert
    seen = []
    with pytest.raises(RuntimeError, match="enough"), torch.no_grad():
        with observed(
            model, [Point("@.embeddings", "output"), Point(NORM.format(0), "input")], lambda p, x: seen.append(p)
        ):
            assert hooks_of(model) == 2
            model(**data[0])
            raise RuntimeError("enough")
    assert [p.side for p in seen] == ["output", "input"]
    assert hooks_of(model) == 0


# The right numbers


def test_moments_are_those_of_the_hidden_states(bert):
    model, data = bert
    found = moments_of(model, data, gradients=False)
    rows = {0: [], 1: []}
    for batch in data:
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states
        for layer in rows:
            rows[layer].append(states[layer + 1][batch["attention_mask"].bool()].double())
    for layer, chunks in rows.items():
        x, moments = torch.cat(chunks), found.moments[Point(NORM.format(layer))]
        assert moments.count == len(x) == 6 * (4 * 12 + 4 * 9)
        assert torch.allclose(moments.mean, x.mean(0), atol=1e-6)
        assert torch.allclose(moments.covariance, torch.cov(x.T, correction=0), atol=1e-5)
    assert (found.batches_seen, found.samples_seen) == (6, 48)


def test_gradient_moments_are_those_of_autograd(bert):
    """One layer, one batch: E[g g^T] over real tokens of the gradient that autograd gives for the same drawn
    labels."""
    model, data = bert
    point = Point(NORM.format(0))
    found = calibrate(model, data[:1], Calibration([point], [point], RECIPE), progress=False)
    outputs = model(**data[0], output_hidden_states=True)
    (g,) = torch.autograd.grad(log_likelihood(model, outputs, data[0], RECIPE.seed), outputs.hidden_states[1])
    rows = g[data[0]["attention_mask"].bool()].double()
    assert rows.abs().max() > 0
    assert torch.allclose(found.moments[point].gradient_moment, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("unit", ["token", "spaced", "sequence_mean"])
def test_padding_never_counts(bert, unit):
    model, data = bert
    config = RECIPE.replace(sample_unit=unit)
    scrambled = []
    for batch in data:
        noise = torch.randint(5, 61, batch["input_ids"].shape)
        scrambled.append(batch | {"input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], noise)})
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(data, scrambled, strict=True))
    assert_same_moments(moments_of(model, data, config=config), moments_of(model, scrambled, config=config), 1e-6)


def test_same_seed_same_moments_other_seed_other_draws(bert):
    model, data = bert
    first = moments_of(model, data)
    assert_same_moments(first, moments_of(model, data))
    other = moments_of(model, data, config=RECIPE.replace(seed=1))
    point = Point(NORM.format(0))
    assert torch.equal(first.moments[point].second_moment, other.moments[point].second_moment)
    assert not torch.equal(first.moments[point].gradient_moment, other.moments[point].gradient_moment)


@pytest.mark.parametrize("estimator", ["screenot", "signflip"])
def test_resume_equals_one_pass(bert, estimator, tmp_path):
    model, data = bert
    config = RECIPE.replace(edge_estimator=estimator)
    whole = moments_of(model, data, config=config)
    torch.save(moments_of(model, data[:2], config=config).state_dict(), tmp_path / "state.pt")
    hidden = anatomy_of(model, config).sites["hidden"].points
    resumed = Calibration(points_of(model), hidden, config)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.batches_seen == 2
    calibrate(model, data, resumed, progress=False)  # goes on with the third batch
    assert resumed.batches_seen == 6
    assert_same_moments(resumed, whole)
    for point, moments in whole.moments.items():
        null = moments.null_covariance
        assert (null is None) == (estimator != "signflip")
        assert null is None or torch.equal(null, resumed.moments[point].null_covariance)


# The likelihood


def regression(config):
    config.num_labels = 1


def multi_label(config):
    config.problem_type = "multi_label_classification"


LIKELIHOODS = {
    "classification": ("bert", "ForSequenceClassification", None),
    "regression": ("bert", "ForSequenceClassification", regression),
    "multi-label": ("bert", "ForSequenceClassification", multi_label),
    "token": ("bert", "ForTokenClassification", None),
    "question answering": ("bert", "ForQuestionAnswering", None),
    "masked LM": ("bert", "ForMaskedLM", None),
    "image": ("vit", "ForImageClassification", None),
}


@pytest.mark.parametrize("case", LIKELIHOODS)
def test_every_task_gives_finite_gradients(case, monkeypatch):
    name, task, change = LIKELIHOODS[case]
    config = zoo.CONFIGS[name].__class__(**zoo.CONFIGS[name].to_dict())
    if change:
        change(config)
    monkeypatch.setitem(zoo.CONFIGS, name, config)
    model, data = zoo.make(name, task), zoo.batches(name, count=2)
    assert gives_likelihood(model, data[0])
    found = moments_of(model, data)
    for point in anatomy_of(model, RECIPE).sites["hidden"].points:
        gradient = found.moments[point].gradient_moment
        assert gradient is not None and gradient.isfinite().all()
        assert gradient.trace() > 0, point


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_bare_models_give_no_likelihood(name):
    assert not gives_likelihood(zoo.make(name, "Model"), zoo.batches(name)[0])


def test_labels_are_drawn_from_the_model_and_masked_where_unlabelled():
    model, batch = zoo.make("bert", "ForTokenClassification"), zoo.batches("bert")[0]
    outputs = model(**batch)
    draw = lambda labels: log_likelihood(model, outputs, batch | labels, seed=0)  # noqa: E731
    everywhere = draw({})
    labels = torch.full_like(batch["input_ids"], -100)
    assert draw({"labels": labels}) == 0
    labels[:, 0] = 1
    assert everywhere < draw({"labels": labels}) < 0
    (gradient,) = torch.autograd.grad(everywhere, outputs.logits)
    assert gradient[batch["attention_mask"] == 0].abs().max() == 0


def test_scores_of_the_likelihood_have_mean_zero():
    """The true Fisher information: labels follow the model, so the gradient of the logits is 0 on average."""
    config = BertConfig(**zoo.TEXT, **zoo.BODY)
    model = BertForSequenceClassification(config)
    logits = torch.tensor([[1.0, 0.0, -1.0]]).repeat(20_000, 1).requires_grad_()
    batch = {"input_ids": torch.arange(20_000)[:, None]}
    log_likelihood(model, {"logits": logits}, batch, seed=0).backward()
    assert logits.grad.abs().max() > 0.2
    assert logits.grad.mean(0).abs().max() < 4 * 0.5 / 20_000**0.5


@pytest.mark.parametrize("name, task", [("bert", "ForSequenceClassification"), ("bert", "ForTokenClassification")])
def test_draws_follow_the_sample_wherever_it_stands(name, task):
    model, batch = zoo.make(name, task), zoo.batches(name)[0]
    whole = [content_uniforms(batch, torch.Size(shape), 3) for shape in ((), (12,))]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    for uniforms in (content_uniforms({k: v[order] for k, v in batch.items()}, torch.Size(), 3),):
        assert torch.equal(uniforms, whole[0][order])
    padded = {k: torch.nn.functional.pad(v, (0, 5)) for k, v in batch.items()}
    assert torch.equal(content_uniforms(padded, torch.Size((17,)), 3)[:, :12], whole[1])
    assert len(whole[1].unique()) == 96 and not torch.equal(whole[0], content_uniforms(batch, torch.Size(), 4))
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (order[:3], order[3:])]
    with torch.no_grad():
        together = log_likelihood(model, model(**batch), batch, 0)
        apart = sum(log_likelihood(model, model(**part), part, 0) for part in parts)
    assert together == pytest.approx(apart.item(), rel=1e-5)
