"""A recipe without a target: the edge decides where a bulk of noise stands apart, else a size is asked for."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as tf

from optimum_rmtkd import BudgetError, NoTargetError, RMTKDConfig, analyze, count_parameters, narrow
from optimum_rmtkd.surgery import check_edges, reduce
from optimum_rmtkd.surgery.budget import BudgetPoint
from optimum_rmtkd.surgery.untargeted import SHARES, curve_table

from . import zoo


DIM, RANK = 64, 6
DEFAULT = RMTKDConfig(round_to=1, min_width=1)
STREAM = DEFAULT.replace(sites=("hidden",))


IDS = torch.arange(8192).view(1024, 8)
DATA = [{"input_ids": part} for part in IDS.split(64)]  # every word once: independent samples


def echo(strengths: torch.Tensor, labels: int = 2) -> tf.BertForSequenceClassification:
    """A model whose stream is its table of words, normalised, and the blocks add nothing to it: 8192 vectors whose
    covariance has the eigenvalues `strengths` (DIM,), in a random basis."""
    torch.manual_seed(0)
    body = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = tf.BertConfig(vocab_size=IDS.numel(), max_position_embeddings=16, num_labels=labels, **body)
    model = tf.BertForSequenceClassification(config).eval()
    basis = torch.linalg.qr(torch.randn(DIM, DIM))[0]
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.copy_((torch.randn(8192, DIM) * strengths.sqrt()) @ basis.T)
        model.bert.embeddings.position_embeddings.weight.zero_()
        model.bert.embeddings.token_type_embeddings.weight.zero_()
        for layer in model.bert.encoder.layer:
            layer.attention.output.dense.weight.zero_()
            layer.output.dense.weight.zero_()
    return model


def planted(**options) -> tf.BertForSequenceClassification:
    """RANK directions of signal, and white noise."""
    return echo(torch.cat([torch.linspace(30.0, 10.0, RANK), torch.ones(DIM - RANK)]), **options)


def falling() -> tf.BertForSequenceClassification:
    """A spectrum without a gap, as trained networks have it."""
    return echo(100.0 * torch.arange(1, DIM + 1.0) ** -1.5)


def test_a_separated_bulk_is_cut_at_its_edge():
    small = narrow(planted(), DATA, STREAM, progress=False)
    assert abs(small.config.hidden_size - RANK) <= 1
    assert count_parameters(small) < count_parameters(planted())


def test_a_spectrum_without_a_gap_asks_for_a_size():
    with pytest.raises(NoTargetError) as raised:
        narrow(falling(), DATA, STREAM, progress=False)
    assert isinstance(raised.value, BudgetError)
    text = str(raised.value)
    assert "target_reduction=0.5" in raised.value.message and "hidden: the rank is" in raised.value.message
    shares = [float(line.split()[0]) for line in raised.value.curve.splitlines()[1:]]
    assert shares == list(SHARES)
    assert text.startswith("No target was given") and text.endswith(raised.value.curve)


def test_a_bulk_that_carries_the_task_is_not_cut_away():
    """To the spectrum it is noise; to the head, which is large, it is what the answer hangs on."""
    model = planted(labels=40)
    with torch.no_grad():
        model.classifier.weight.mul_(300)
    with pytest.raises(NoTargetError, match="1 of 1 sites stand apart, but what lies below them carries"):
        narrow(model, DATA, STREAM, progress=False)


def test_the_error_shows_what_sizes_are_predicted_to_cost():
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert", count=16)
    recipe = RMTKDConfig(round_to=4, min_width=2, speed_weight=4.0)
    with pytest.raises(NoTargetError) as raised:
        narrow(model, data, recipe, progress=False)
    rows = [line.split() for line in raised.value.curve.splitlines()[1:]]
    sizes, losses = ([float(row[i].replace(",", "")) for row in rows[:3]] for i in (1, 2))
    assert sizes == sorted(sizes, reverse=True) and losses == sorted(losses) and losses[0] > 0
    half = reduce(model, data, recipe.replace(target_reduction=0.5), progress=False)
    assert losses[1] == pytest.approx(half.predicted_loss, rel=0.3)
    assert sizes[1] == pytest.approx(half.parameters_after, rel=0.05)


def test_sites_without_a_bulk_keep_their_width(caplog):
    with caplog.at_level(logging.WARNING, logger="optimum_rmtkd"):
        small = narrow(planted(), DATA, DEFAULT.replace(sites=("hidden", "attention_vo")), progress=False)
    assert abs(small.config.hidden_size - RANK) <= 1
    assert small.bert.encoder.layer[0].attention.self.value.out_features == DIM
    said = [r.getMessage() for r in caplog.records if "keep their width" in r.getMessage()]
    assert len(said) == 1 and "1 of 5 sites" in said[0]


@pytest.mark.parametrize(
    "choice",
    [{"edge_estimator": "mp_median"}, {"edge_estimator": "fixed", "fixed_rank": 10}, {"edge_estimator": "energy"}],
)
def test_an_estimator_that_is_named_is_taken_at_its_word(choice):
    small = narrow(falling(), DATA, STREAM.replace(**choice), progress=False)
    assert small.config.hidden_size < DIM


def test_a_named_edge_that_costs_much_draws_one_warning(caplog):
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert")
    recipe = RMTKDConfig(edge_estimator="fixed", fixed_rank=2, round_to=1, min_width=1)
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    with caplog.at_level(logging.WARNING, logger="optimum_rmtkd"):
        narrow(model, data, recipe, progress=False)
    assert len([r for r in caplog.records if "Three things to try" in r.getMessage()]) == 1


def test_a_target_that_costs_much_draws_one_warning(caplog):
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert")
    with torch.no_grad():
        model.classifier.weight.mul_(1000)
    recipe = RMTKDConfig(target_reduction=0.8, round_to=4, min_width=4, refit=False)
    with caplog.at_level(logging.WARNING, logger="optimum_rmtkd"):
        narrow(model, data, recipe, progress=False)
    assert len([r for r in caplog.records if "Three things to try" in r.getMessage()]) == 1


def test_the_papers_schedule_with_the_default_estimator_is_no_licence():
    with pytest.raises(NoTargetError):
        narrow(falling(), DATA, STREAM.replace(schedule="layerwise"), progress=False)
    with pytest.raises(NoTargetError):
        check_edges(falling(), DATA, STREAM.replace(schedule="layerwise"), progress=False)


def test_a_layer_of_that_schedule_is_cut_at_its_edge_by_the_trainer():
    """There a target may stop the cuts, which a single one does not know of."""
    found = reduce(falling(), DATA, STREAM.replace(schedule="layerwise"), sites=["hidden"], progress=False)
    assert found.parameters_after < found.parameters_before


def test_edges_are_checked_before_training():
    names = check_edges(planted(), DATA, DEFAULT.replace(sites=("hidden", "attention_vo")), progress=False)
    assert names == ("hidden",)
    with pytest.raises(NoTargetError):
        check_edges(falling(), DATA, STREAM, progress=False)


@pytest.mark.parametrize(
    "choice",
    [{"target_reduction": 0.5}, {"target_flops": 0.5}, {"edge_estimator": "mp_quantile"}, {"schedule": "none"}],
)
def test_nothing_is_computed_where_there_is_no_question(choice):
    def unread():
        raise AssertionError("data was read")
        yield

    assert check_edges(planted(), unread(), DEFAULT.replace(**choice)) is None


def test_analyze_always_works():
    report = analyze(falling(), DATA, STREAM, progress=False)
    assert report.planned_parameters == report.parameters
    assert [s.planned for s in report.sites] == [DIM]
    assert "No target was given" in report.table() and report.to_dict()["note"] == report.note
    report = analyze(planted(), DATA, STREAM, progress=False)
    assert abs(report.sites[0].planned - RANK) <= 1 and report.note == ""
    report = analyze(falling(), DATA, STREAM.replace(target_reduction=0.3), progress=False)
    assert report.planned_parameters < report.parameters and report.note == ""


def test_the_table_says_what_is_met_and_what_is_out_of_reach():
    curve = [BudgetPoint(100.0 * (1 - 0.05 * i), 0.02 * i, "a", 10 - i) for i in range(1, 12)]
    rows = curve_table(curve, 100.0, 100.0, "nats an answer", 2.0).splitlines()
    assert "nats an answer" in rows[0]
    assert [row.split()[0] for row in rows[1:]] == ["0.3", "0.5", "0.63", "0.8"]
    assert rows[1].split()[1:] == ["70", "0.06"] and rows[2].split()[1:] == ["50", "0.1"]
    assert "out of reach" in rows[3] and "at most 0.55" in rows[3]
    assert "met already" in curve_table(curve, 60.0, 100.0, "nats an answer", 1.0).splitlines()[1]


@pytest.fixture(scope="module")
def stories(shared):
    from datasets import load_dataset

    folder = str(shared / "models/stories260k_llama")
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    rows = load_dataset("parquet", data_files=str(shared / "data/tinystories_sub_train.parquet"), split="train")
    texts = [text for text in rows["text"] if len(text) > 200][:128]
    batches = []
    for i in range(0, len(texts), 16):
        ids = [tokenizer(text, truncation=True, max_length=64)["input_ids"] for text in texts[i : i + 16]]
        length = min(map(len, ids))
        batches.append({"input_ids": torch.tensor([row[:length] for row in ids])})
    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), batches


def test_a_ruined_language_model_is_warned_of(stories, caplog):
    model, data = stories
    with caplog.at_level(logging.WARNING, logger="optimum_rmtkd"):
        narrow(model, data, RMTKDConfig(form="factored", target_reduction=0.3), progress=False)
    assert [r for r in caplog.records if "times the perplexity" in r.getMessage()]
