"""How far a cut model's answers lie from the uncut one's, against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.utils import ModelOutput

from optimum_rmtkd import RMTKDConfig
from optimum_rmtkd.surgery import reduce
from optimum_rmtkd.surgery.divergence import LOOKED_AT, Remembered, mean_divergence
from optimum_rmtkd.surgery.likelihood import answers

from . import zoo


class Says(torch.nn.Module):
    """A model that answers what it is given."""

    def __init__(self, config, **outputs):
        super().__init__()
        self.config, self.outputs, self.passes = config, outputs, 0

    def forward(self, input_ids, attention_mask=None):
        self.passes += 1
        return ModelOutput(**{k: v[: len(input_ids)] for k, v in self.outputs.items()})


class Config:
    def __init__(self, problem_type=None):
        self.problem_type = problem_type


def batch(size=2, length=3):
    return {"input_ids": torch.ones(size, length, dtype=torch.long)}


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


P, Q = [0.7, 0.2, 0.1], [0.1, 0.3, 0.6]


def says(rows, problem_type=None, name="logits"):
    return Says(Config(problem_type), **{name: torch.tensor(rows).log()})


def test_classes():
    found = mean_divergence(says([P, P]), says([Q, P]), [batch()])
    assert found == pytest.approx(kl(P, Q) / 2, rel=1e-6)
    assert mean_divergence(says([P, Q]), says([P, Q]), [batch()]) == pytest.approx(0, abs=1e-9)


def test_tokens_that_are_padding_do_not_count():
    padded = batch() | {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    true, found = says([[P, P, P], [P, P, P]]), says([[Q, P, Q], [P, Q, Q]])
    assert mean_divergence(true, found, [padded]) == pytest.approx(kl(P, Q) / 3, rel=1e-6)


def test_labelled_tokens_alone_count():
    labelled = batch() | {"labels": torch.tensor([[-100, 1, -100], [-100, -100, 2]])}
    true, found = says([[P, P, P], [P, P, P]]), says([[Q, Q, Q], [Q, Q, P]])
    assert mean_divergence(true, found, [labelled]) == pytest.approx(kl(P, Q) / 2, rel=1e-6)


def test_independent_labels_are_summed():
    p, q = torch.tensor([[0.7, 0.2]]), torch.tensor([[0.5, 0.6]])
    true = Says(Config("multi_label_classification"), logits=p.logit())
    found = Says(Config("multi_label_classification"), logits=q.logit())
    wanted = kl([0.7, 0.3], [0.5, 0.5]) + kl([0.2, 0.8], [0.6, 0.4])
    assert mean_divergence(true, found, [batch(1)]) == pytest.approx(wanted, rel=1e-5)


def test_numbers_count_in_units_of_their_own_variance():
    true = torch.tensor([[1.0], [3.0]])
    for scale in (1.0, 1e4):
        said = [
            Says(Config("regression"), logits=scale * values) for values in (true, true + torch.tensor([[1.0], [0.0]]))
        ]
        assert mean_divergence(*said, [batch()]) == pytest.approx(0.5 * 0.5 / 1.0, rel=1e-6)


def test_spans_are_two_answers():
    true = Says(Config(), start_logits=torch.tensor([P]).log(), end_logits=torch.tensor([P]).log())
    found = Says(Config(), start_logits=torch.tensor([Q]).log(), end_logits=torch.tensor([P]).log())
    assert mean_divergence(true, found, [batch(1)]) == pytest.approx(kl(P, Q) / 2, rel=1e-6)


def test_models_without_answers():
    bare = Says(Config(), last_hidden_state=torch.ones(2, 3, 4))
    assert mean_divergence(bare, bare, [batch()]) is None


def test_few_passes_over_batches_of_all_lengths():
    true = says([P, P])
    seen = []
    true.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    mean_divergence(true, says([Q, Q]), [batch(length=i + 1) for i in range(20)])
    assert len(seen) == LOOKED_AT and min(seen) <= 4 and max(seen) >= 17


def test_answers_that_are_remembered_are_not_computed_again():
    true, found, batches = says([P, P]), says([Q, P]), [batch(length=i + 1) for i in range(20)]
    expected = mean_divergence(true, found, batches)
    remembered, before = Remembered(len(batches), "cpu"), true.passes
    for index, given in enumerate(batches):
        remembered.keep(index, answers(true, true(**given), given))
    after = true.passes
    assert mean_divergence(true, found, batches, remembered) == expected and true.passes == after > before
    assert set(remembered.per_sample.values()) == {1.0}


def test_answers_too_large_to_be_kept_are_computed_again():
    true, found, batches = says([P, P]), says([Q, P]), [batch() for _ in range(4)]
    expected = mean_divergence(true, found, batches)
    remembered = Remembered(len(batches), "cpu", most=2 * 4 * 2 * 3)  # two batches of two samples of three words
    for index, given in enumerate(batches):
        remembered.keep(index, answers(true, true(**given), given))
    assert [remembered.of(index) is None for index in range(4)] == [False, False, True, True]
    assert len(remembered.per_sample) == 4
    assert mean_divergence(true, found, batches, remembered) == expected


RECIPE = RMTKDConfig(target_reduction=0.4, round_to=4, min_width=4, calibration_samples=48)


def test_a_classifier_knows_what_its_cut_was_predicted_to_cost_and_did():
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert")
    found = reduce(model, data, RECIPE, progress=False)
    assert found.loss_unit == "nats"
    assert found.predicted_loss == pytest.approx(found.report.budget[-1].predicted_loss, rel=1e-9)
    with torch.no_grad():
        logits = [torch.cat([m(**b).logits for b in data]).log_softmax(-1) for m in (model, found.model)]
    whole = float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())
    assert 0.3 * whole < found.divergence < 3 * whole
    again = reduce(model, data, RECIPE, progress=False)
    assert (again.divergence, again.predicted_loss) == (found.divergence, found.predicted_loss)


def test_a_language_model_counts_by_token():
    model, data = zoo.make("bert", "ForMaskedLM"), zoo.batches("bert")
    found = reduce(model, data, RECIPE, progress=False)
    tokens = sum(int(b["attention_mask"].sum()) for b in data) / sum(len(b["input_ids"]) for b in data)
    assert found.predicted_loss == pytest.approx(found.report.budget[-1].predicted_loss / tokens, rel=0.25)


def test_a_bare_encoder_counts_energy_and_has_no_divergence():
    found = reduce(zoo.make("bert", "Model"), zoo.batches("bert"), RECIPE, progress=False)
    assert found.loss_unit == "energy" and found.predicted_loss > 0 and found.divergence is None


def test_factors_have_no_prediction_but_a_divergence():
    model = zoo.make("bert", "ForSequenceClassification")
    found = reduce(model, zoo.batches("bert"), RECIPE.replace(form="factored", target_reduction=0.2), progress=False)
    assert (found.predicted_loss, found.loss_unit) == (None, None)
    assert found.divergence > 0
