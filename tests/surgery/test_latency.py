"""A target of time, on a machine whose speed is known: met, verified, corrected once, refused where it cannot be."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from optimum_rmtkd import LatencyError, RMTKDConfig, RMTKDError, analyze, narrow
from optimum_rmtkd.batches.examples import unpadded_inputs
from optimum_rmtkd.surgery import check_latency, reduce
from optimum_rmtkd.surgery.checks import anatomy_of
from optimum_rmtkd.surgery.latency import Measurement, Stopwatch, _input_shapes, setting_of
from optimum_rmtkd.surgery.timeparts import parts_of

from . import zoo
from .timing import machine, model_seconds  # noqa: F401


RECIPE = RMTKDConfig(
    target_latency=0.5, calibration_samples=32, refit=False, importance="variance", round_to=4, latency_length=16
)


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    model = BertForSequenceClassification(BertConfig(vocab_size=200, max_position_embeddings=64, **sizes)).eval()
    ids = torch.randint(5, 200, (32, 12))
    return model, [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids.split(16)]


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_a_share_of_the_time_is_met(wide, machine, share):  # noqa: F811
    machine()
    model, data = wide
    found = reduce(model, data, RECIPE.replace(target_latency=share), progress=False)
    reached = model_seconds(found.model) / model_seconds(model)
    assert abs(reached / share - 1) <= 0.1 and found.latency.met
    assert found.latency.after / found.latency.before == pytest.approx(reached)
    assert found.report.budget[-1].cost == pytest.approx(1e3 * model_seconds(found.model), rel=0.1)


def test_milliseconds_are_met(wide, machine):  # noqa: F811
    machine()
    model, data = wide
    goal = 0.7e3 * model_seconds(model)
    small = narrow(model, data, RECIPE.replace(target_latency=f"{goal:.6f}ms"), progress=False)
    assert 1e3 * model_seconds(small) == pytest.approx(goal, rel=0.1)


def test_a_law_that_the_ends_do_not_tell_is_corrected_once(wide, machine):  # noqa: F811
    law = {"power": 1.6, "factor": 5e-4}
    machine(**law)
    model, data = wide
    found = reduce(model, data, RECIPE.replace(target_latency=0.6), progress=False)
    assert found.latency.again and found.latency.met
    assert model_seconds(found.model, **law) / model_seconds(model, **law) == pytest.approx(0.6, rel=0.1)


def test_layers_are_timed_once_and_then_known(wide, machine):  # noqa: F811
    asked = machine()
    model, data = wide
    check_latency(model, RECIPE)
    assert len(asked) == 1 and asked[0] > 50
    narrow(model, data, RECIPE, progress=False)
    assert len(asked) == 1


@pytest.mark.parametrize("target", [0.2, "0.1ms"])
def test_a_time_out_of_reach_is_refused_with_the_shortest_one(wide, machine, target, monkeypatch):  # noqa: F811
    """By measuring the narrowest model, before anything is calibrated."""
    machine(overhead=4e-4)
    monkeypatch.setattr("optimum_rmtkd.surgery.surgeon.calibrate", lambda *a, **k: pytest.fail("it was calibrated"))
    model, data = wide
    recipe = RECIPE.replace(target_latency=target)
    with pytest.raises(LatencyError) as error:
        narrow(model, data, recipe, progress=False)
    with pytest.raises(LatencyError, match=r"at least 0\.4\d* ms \(measured"):
        check_latency(model, recipe)
    assert repr(target) in str(error.value) and "batch 1, length 16, cpu, " in str(error.value)


def test_where_narrower_layers_save_no_time_no_time_is_named(wide, machine, monkeypatch):  # noqa: F811
    machine()
    slower = Measurement(5.0, 10.0, 11.0, 0.9, 0.8, 1.0, 5.0, True, "here")
    monkeypatch.setattr(Stopwatch, "_measured", lambda *a: slower)
    with pytest.raises(LatencyError, match="save no time in this setting") as error:
        check_latency(wide[0], RECIPE.replace(target_latency=0.9))
    assert "at least" not in str(error.value)


def test_a_time_that_is_met_already_is_refused(wide, machine):  # noqa: F811
    machine()
    with pytest.raises(LatencyError, match="nothing is left to narrow"):
        check_latency(wide[0], RECIPE.replace(target_latency="900ms"))


def test_what_is_more_than_a_tenth_off_is_said_with_the_reason(wide, machine, caplog, monkeypatch):  # noqa: F811
    machine(noise=0.2)
    monkeypatch.setattr(Stopwatch, "plan", lambda watch, couples, worth: watch._allocate(couples, worth))
    model, data = wide
    with caplog.at_level(logging.WARNING, logger="optimum_rmtkd"):
        narrow(model, data, RECIPE, progress=False)
    assert "More than" not in caplog.text
    machine(noise=0.2)
    monkeypatch.setattr(Stopwatch, "verify", lambda *a: Measurement(5.0, 10.0, 6.0, 1.67, 1.3, 2.0, 5.0, True, "here"))
    with caplog.at_level(logging.WARNING, logger="optimum_rmtkd"):
        narrow(model, data, RECIPE, progress=False)
    assert "latency 6 ms, asked for 5 ms (+20.0%)" in caplog.text and "quiet machine" in caplog.text


@pytest.mark.parametrize(
    ("low", "high", "predicted", "reason"),
    [(1.0, 1.5, 5.0, "quiet machine"), (1.66, 1.68, 6.0, "round_to"), (1.66, 1.68, 5.0, "other work disturbed")],
)
def test_each_reason_has_its_words(low, high, predicted, reason):
    found = Measurement(5.0, 10.0, 6.0, 1.67, low, high, predicted, True, "here")
    assert not found.met and reason in found.words() and found.off == pytest.approx(0.2)


def test_within_a_tenth_nothing_is_said():
    found = Measurement(5.0, 10.0, 5.4, 1.85, 1.8, 1.9, 5.0, False, "batch 1")
    assert found.met and found.words().endswith("1.85x (1.80 to 1.90); batch 1")


@pytest.mark.parametrize(
    ("name", "recipe", "message"),
    [
        ("bert", {"latency_length": 41}, "the model takes at most 40 tokens"),
        ("vit", {"latency_length": 8}, "reads images, which have one size"),
        ("bert", {"latency_device": "cuda"}, "torch sees no GPU"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(name, recipe, message):
    if torch.cuda.is_available() and "latency_device" in recipe:
        pytest.skip("there is a GPU")
    model = zoo.make(name, "ForImageClassification" if zoo.is_image(name) else "ForSequenceClassification")
    with pytest.raises(RMTKDError, match=message):
        setting_of(model, RMTKDConfig(target_latency=0.5, **recipe))


def test_the_setting_is_filled_up_from_the_model():
    recipe = RMTKDConfig(target_latency=0.5, latency_threads=3)
    found = setting_of(zoo.make("bert", "ForSequenceClassification"), recipe)
    assert (found.batch, found.length, found.threads) == (1, 40, 3)
    assert str(found).startswith("batch 1, length 40, ")
    assert setting_of(zoo.make("vit", "ForImageClassification"), RMTKDConfig()).length is None


@pytest.mark.parametrize("recipe", [{"shape": "native"}, {"allocation": "edge"}, {"sites": ("intermediate",)}])
def test_other_choices_of_the_recipe_keep_their_meaning(wide, machine, recipe):  # noqa: F811
    machine()
    model, data = wide
    found = reduce(model, data, RECIPE.replace(target_latency=0.8, round_to=8, **recipe), progress=False)
    assert found.latency.met
    if "sites" in recipe:
        assert {site.kind for site in found.sites} == {"intermediate"}
    if "shape" in recipe:
        assert type(found.model) is BertForSequenceClassification


def test_speed_weight_is_what_a_share_of_the_time_is_worth(wide, machine, monkeypatch):  # noqa: F811
    machine()
    model, data = wide
    seen = {}

    def plan(watch, couples, worth):
        couple = next(c for c in couples if c.sites[0].kind == "intermediate")
        share = watch.within({site.name for site in couple.sites})({}) / watch.before
        seen[watch.config.speed_weight] = worth(couple)({}), share
        return watch._allocate(couples, worth)

    monkeypatch.setattr(Stopwatch, "plan", plan)
    for weight in (0.0, 1.0, 3.0):
        narrow(model, data, RECIPE.replace(speed_weight=weight), progress=False)
    size, share = seen[0.0]
    parameters = 2 * 64 * 256 + 256 + 64  # of the two layers that touch the site
    assert size == pytest.approx(parameters / sum(p.numel() for p in model.parameters()))
    assert 0.1 < share < 0.5
    assert [seen[weight][0] for weight in (1.0, 3.0)] == pytest.approx([size + share, size + 3 * share])


def test_the_dense_model_and_the_threads_stay_as_they_were(wide, machine):  # noqa: F811
    machine()
    model, data = wide
    before, threads = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_num_threads()
    model.train()
    analyze(model, data, RECIPE.replace(latency_threads=1, latency_dtype="bfloat16"), progress=False)
    assert model.training and torch.get_num_threads() == threads and model.dtype == torch.float32
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_that_positions_share_are_timed_for_each_of_their_calls():
    model = zoo.make("deberta-v3", "ForSequenceClassification")
    anatomy = anatomy_of(model, RMTKDConfig())
    shapes = _input_shapes(model, anatomy, unpadded_inputs(model, 8, 32))
    assert shapes["@.encoder.layer.0.attention.self.query_proj"] == [(8, 32, 32), (1, 8, 32)]
    kinds = [kind for unit, value in parts_of(model, anatomy, shapes) for kind, _ in value({})]
    assert [kind.fixed for kind in kinds if "attention" in kind.name] == [(8, 4, 32)] * 2
    assert sum(kind.name == "linear" and kind.fixed[0] == 8 for kind in kinds) >= 4  # queries and keys of both layers
