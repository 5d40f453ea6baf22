"""Bad input is refused with a message that says what was got, what was expected and what to do."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from optimum_rmtkd import (
    BudgetError,
    CalibrationError,
    RMTKDConfig,
    RMTKDError,
    UnsupportedArchitectureError,
    analyze,
    count_parameters,
    narrow,
)
from optimum_rmtkd.spectra import EDGE_ESTIMATORS
from optimum_rmtkd.surgery import check_data, check_recipe, narrow_to, reduce

from . import zoo


RECIPE = RMTKDConfig(target_reduction=0.3, round_to=4, min_width=4, calibration_samples=48, refit=False)


@pytest.fixture
def bert():
    return zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert")


def refused(error, match, function, *arguments, **options):
    """The message of the error that `function` raises."""
    with pytest.raises(error, match=match) as caught:
        function(*arguments, progress=False, **options)
    assert isinstance(caught.value, RMTKDError) and isinstance(caught.value, ValueError)
    return str(caught.value)


# Calibration data


@pytest.mark.parametrize("function", [narrow, analyze])
def test_no_data(bert, function):
    refused(CalibrationError, "calibration data is empty: expected at least one batch", function, bert[0], [], RECIPE)


def test_batches_without_samples(bert):
    empty = [{"input_ids": torch.zeros(0, 12, dtype=torch.long)}]
    refused(CalibrationError, "calibration data is empty", narrow, bert[0], empty, RECIPE)


def test_only_padding(bert):
    model, data = bert
    blank = [batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])} for batch in data]
    refused(CalibrationError, "All tokens of the 6 calibration batches are padding", narrow, model, blank, RECIPE)


@pytest.mark.parametrize("batch, kind", [((torch.zeros(8, 12),), "tuple"), ([1, 2], "list"), ("text", "str")])
def test_batch_that_is_no_mapping(bert, batch, kind):
    refused(CalibrationError, f"calibration batch is a {kind}; expected a mapping", narrow, bert[0], [batch], RECIPE)


@pytest.mark.parametrize("importance", ["variance", "fisher"])
def test_non_finite_activations_are_located(bert, importance):
    model, data = bert
    with torch.no_grad():
        model.bert.encoder.layer[1].intermediate.dense.weight[3] = 3e38  # finite, but no sum of it is
    message = refused(
        CalibrationError,
        "is not finite in calibration batch 0",
        narrow,
        model,
        data,
        RECIPE.replace(importance=importance),
    )
    # the first place where activations are looked at behind that weight
    assert "The input of module 'bert.encoder.layer.1.output.dense'" in message
    assert "NaN or infinite, in 1 of 64 channels" in message
    assert "Expected finite values" in message


def test_the_batch_of_a_non_finite_activation_is_named():
    model, data = zoo.make("vit", "ForImageClassification"), zoo.batches("vit")
    data[4]["pixel_values"][2, 0, 0, 0] = 3e38  # finite, and too large for a sum
    refused(CalibrationError, r"module 'vit\.\S+' is not finite in calibration batch 4: ", narrow, model, data, RECIPE)


class Exploding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * float("inf")


def test_non_finite_gradients_are_located(bert):
    model, data = bert

    def explode(module, args):  # in every copy of the model, as a faulty kernel would
        return (Exploding.apply(args[0]),) if getattr(module, "out_features", None) == model.num_labels else None

    handle = torch.nn.modules.module.register_module_forward_pre_hook(explode)
    try:
        message = refused(CalibrationError, "calibration batch 0", narrow, model, data, RECIPE)
    finally:
        handle.remove()
    assert "bert.encoder.layer.1.output.LayerNorm" in message
    assert "gradients are NaN or infinite" in message


# Importance


def test_fisher_needs_logits():
    model, data = zoo.make("bert", "Model"), zoo.batches("bert")
    message = refused(
        CalibrationError, "BertModel returns none", narrow, model, data, RECIPE.replace(importance="fisher")
    )
    assert "importance='variance'" in message and "task head" in message
    assert count_parameters(narrow(model, data, RECIPE, progress=False)) < count_parameters(model)


def test_fisher_needs_a_stream():
    model, data = zoo.make("vit", "ForImageClassification"), zoo.batches("vit")
    recipe = RECIPE.replace(importance="fisher", form="factored", target_reduction=0.2)
    message = refused(RMTKDError, "no residual", narrow, model, data, recipe)
    assert "ViTForImageClassification" in message and "use 'auto' or 'variance'" in message


# Targets


@pytest.mark.parametrize("name", ["target_reduction", "target_flops"])
@pytest.mark.parametrize("value", [0, 0.0, 1, 1.0, -0.2, 1.5, float("nan")])
def test_targets_outside_their_range(name, value):
    with pytest.raises(RMTKDError, match=rf"^{name}={value}: expected a share .* in \(0, 1\)\.$"):
        RMTKDConfig(**{name: value})


def test_two_targets():
    with pytest.raises(RMTKDError, match="Both target_reduction=0.5 and target_flops=0.4 .* drop one"):
        RMTKDConfig(target_reduction=0.5, target_flops=0.4)


REACHES = {
    "bert": ("bert", "ForSequenceClassification", {"target_reduction": 0.999}, "parameters"),
    "bert flops": ("bert", "ForSequenceClassification", {"target_reduction": None, "target_flops": 0.999}, "FLOPs"),
    "vit factored": ("vit", "ForImageClassification", {"target_reduction": 0.99, "form": "factored"}, "parameters"),
    "resnet": ("resnet-basic", "ForImageClassification", {"target_reduction": 0.99}, "parameters"),
    "one site": (
        "bert",
        "ForSequenceClassification",
        {"target_reduction": 0.8, "sites": "intermediate"},
        "parameters",
    ),
}


@pytest.mark.parametrize("case", REACHES)
def test_target_beyond_reach_names_what_can_be_reached(case):
    name, task, changes, unit = REACHES[case]
    model, data = zoo.make(name, task), zoo.batches(name)
    recipe = RECIPE.replace(**changes)
    message = refused(BudgetError, f"{unit} was asked for; with min_width=4", narrow, model, data, recipe)
    assert "Ask for at most that" in message
    reachable = float(re.search(r"\(a reduction of ([0-9.]+)\)", message).group(1))
    target = "target_reduction" if unit == "parameters" else "target_flops"
    assert 0 < reachable < getattr(recipe, target)
    small = narrow(model, data, recipe.replace(**{target: reachable}), progress=False)  # as the message advises
    if unit == "parameters":
        assert 1 - count_parameters(small) / count_parameters(model) == pytest.approx(reachable, abs=1e-4)


@pytest.mark.parametrize("case", [case for case in REACHES if REACHES[case][3] == "parameters"])
def test_a_target_beyond_reach_is_refused_before_data_is_read(case):
    name, task, changes, _ = REACHES[case]
    model = zoo.make(name, task)

    def unread():
        raise AssertionError("data was read")
        yield

    for compute in (narrow, analyze, reduce):
        refused(BudgetError, "the model cannot get below", compute, model, unread(), RECIPE.replace(**changes))
    some, less = (RECIPE.replace(**changes | {"target_reduction": share}) for share in (0.05, 0.01))
    cut = narrow(model, zoo.batches(name), some, progress=False)
    refused(BudgetError, "already no more than", narrow, cut, unread(), less)


def test_flops_beyond_reach_are_refused_before_the_calibration(bert, monkeypatch):
    model, data = bert
    monkeypatch.setattr("optimum_rmtkd.surgery.surgeon.calibrate", lambda *_, **__: pytest.fail("calibrated"))
    recipe = RECIPE.replace(target_reduction=None, target_flops=0.999)
    for compute in (narrow, analyze, reduce):
        refused(BudgetError, "FLOPs was asked for.* the model cannot get below", compute, model, data, recipe)
    with pytest.raises(BudgetError, match="FLOPs was asked for"):
        check_data(model, data, recipe)
    check_data(model, data, recipe.replace(target_flops=0.5))


def test_estimators_nobody_registered_are_refused_before_data_is_read(bert):
    model, _ = bert

    def unread():
        raise AssertionError("data was read")
        yield

    for compute in (narrow, analyze, reduce):
        refused(
            RMTKDError, "Unknown edge estimator", compute, model, unread(), RECIPE.replace(edge_estimator="kaiser")
        )


def test_targets_count_from_the_uncut_model(bert):
    model, data = bert
    before = count_parameters(model)
    half = narrow(model, data, RECIPE.replace(target_reduction=0.5), progress=False)
    message = refused(BudgetError, "already no more than", narrow, half, data, RECIPE.replace(target_reduction=0.4))
    assert f"The model has {count_parameters(half):,}" in message and f"the {0.6 * before:,.0f}" in message
    assert f"counts from the uncut model, which had {before:,}" in message and "Ask for a larger reduction" in message
    assert f"{1 - count_parameters(half) / before:.1%} of them are gone already, and 40.0% are asked for" in message
    smaller = narrow(half, data, RECIPE.replace(target_reduction=0.6), progress=False)
    assert count_parameters(smaller) / before == pytest.approx(0.4, abs=0.03)
    provenance = smaller.config.rmtkd["provenance"]
    assert provenance["parameters_before"] == before and provenance["rounds"] == 2


# Names


def test_unknown_site(bert):
    model, data = bert
    message = refused(
        RMTKDError, "Unknown site.s. intermedate", narrow, model, data, RECIPE.replace(sites="intermedate")
    )
    for known in ("attention_qk", "embedding", "hidden", "layer.1.intermediate"):
        assert known in message
    refused(RMTKDError, "Unknown site.s. nowhere", reduce, model, data, RECIPE, sites=["hidden", "nowhere"])


def test_unknown_estimator(bert):
    model, data = bert
    message = refused(RMTKDError, "marcenko", narrow, model, data, RECIPE.replace(edge_estimator="marcenko"))
    assert all(name in message for name in EDGE_ESTIMATORS)


def test_unknown_config_key():
    with pytest.raises(
        RMTKDError, match=r"Unknown RMTKDConfig key\(s\) target_reductoin\. Known keys: .*target_reduction"
    ):
        RMTKDConfig.from_dict({"target_reductoin": 0.5})


@pytest.mark.parametrize("text, match", [("{", "is not JSON"), ("[1]", "holds a JSON list"), ('{"a": 1}', "Unknown")])
def test_unreadable_recipe_files(text, match, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(RMTKDError, match=match):
        RMTKDConfig.from_json_file(path)


def test_recipe_survives_json(tmp_path):
    recipe = RECIPE.replace(sites=("hidden", "layer.0.intermediate"), n_effective=100)
    recipe.to_json_file(tmp_path / "recipe.json")
    assert RMTKDConfig.from_json_file(tmp_path / "recipe.json") == recipe


@pytest.mark.parametrize(
    "field, value, match",
    [
        ("sample_unit", "word", "sample_unit='word': expected one of token, spaced, sequence_mean"),
        ("target_reduction", "half", "target_reduction='half': expected a share .* or None; got a str"),
        ("ridge", True, "ridge=True: expected a number above 0 or None; got a bool"),
        ("form", "dense", "form='dense': expected one of absorbed, factored"),
        ("allocation", "greedy", "allocation='greedy': expected one of loss, edge, uniform"),
        ("importance", "hessian", "importance='hessian': expected one of auto, fisher, variance"),
        ("calibration_samples", 0, "calibration_samples=0: expected a whole number of at least 1"),
        ("round_to", 1.5, "round_to=1.5: expected a whole number"),
        ("min_width", True, "min_width=True: expected a whole number"),
        ("n_effective", "many", "n_effective='many': expected 'none', 'auto' or a whole number above 1"),
        ("ridge", 0.0, "ridge=0.0: expected a number above 0"),
        ("tau", 1.0, r"tau=1.0: expected a quantile of the eigenvalues, in \(0, 1\)"),
        ("edge_estimator", "fixed", "edge_estimator='fixed' needs fixed_rank"),
    ],
)
def test_values_out_of_range(field, value, match):
    with pytest.raises(RMTKDError, match=match):
        RMTKDConfig(**{field: value})


def test_not_a_model(bert):
    refused(
        RMTKDError, "Expected a transformers PreTrainedModel, got Linear", narrow, nn.Linear(4, 4), bert[1], RECIPE
    )


@pytest.mark.parametrize(
    "name, task",
    [("bert", "ForNextSentencePrediction"), ("bert", "ForPreTraining"), ("vit", "ForMaskedImageModeling")],
)
def test_heads_that_no_layout_declares_are_served_or_refused(name, task):
    """Never a shape error from deep inside torch."""
    model, data = zoo.make(name, task), zoo.batches(name)
    try:
        small = narrow(model, data, RECIPE.replace(refit=True, sites="hidden"), progress=False)
    except UnsupportedArchitectureError as error:
        assert type(model).__name__ in str(error)
    else:
        assert small.config.hidden_size < 32
        assert zoo.outputs(small, data[0]).isfinite().all()


def test_steps_that_had_to_shrink_are_said(bert, caplog):
    model, batches = bert
    found = reduce(model, batches, RECIPE.replace(round_to=32), progress=False)
    assert "with round_to=32 the target would have been missed by more than 1 % of the parameters" in caplog.text
    assert 1 - found.parameters_after / found.parameters_before == pytest.approx(0.3, abs=0.01)
    step, widths = found.report.round_to, [s.width_after for s in found.sites if s.kind in ("hidden", "intermediate")]
    assert step < 32 and all(width % step == 0 for width in widths) and any(width % 32 for width in widths)
    assert f"multiples of {step}, because multiples of 32 would have missed" in found.report.table()
    values = json.loads(found.report.to_json())
    assert values["round_to"] == step and "multiples of 32" in values["steps"]
    caplog.clear()
    report = reduce(model, batches, RECIPE, progress=False).report
    assert not caplog.text and report.round_to == 4 and report.steps == "" and "multiples" not in report.table()


def test_a_target_finer_than_single_features_is_said(bert, caplog):
    model, batches = bert
    found = reduce(model, batches, RECIPE.replace(sites="hidden", target_reduction=0.3), progress=False)
    assert 0.31 < 1 - found.parameters_after / found.parameters_before < 0.34
    assert "single features of the chosen sites are too coarse" in caplog.text


def test_narrow_cuts_or_refuses(bert):
    refused(RMTKDError, "schedule='none' cuts nothing", narrow, *bert, RMTKDConfig(schedule="none"))


@pytest.mark.parametrize("widths", [{"hidden": 33}, {"layer.0.heads": 0}, {"layer.7.intermediate": 8}])
def test_impossible_widths(bert, widths):
    message = refused(RMTKDError, "expected a couple and at most its width", narrow_to, *bert, widths, RECIPE)
    assert str(widths) in message and "'layer.1.heads': 8" in message


# Estimators: none of them is an error


@pytest.mark.parametrize("estimator", sorted(EDGE_ESTIMATORS))
@pytest.mark.parametrize(
    "name, task", [("bert", "ForSequenceClassification"), ("resnet-basic", "ForImageClassification")]
)
def test_every_edge_decides_widths_without_a_target(estimator, name, task):
    model, data = zoo.make(name, task), zoo.batches(name)
    options = {"fixed_rank": 4} if estimator == "fixed" else {"energy": 0.5} if estimator == "energy" else {}
    recipe = RECIPE.replace(target_reduction=None, edge_estimator=estimator, **options)
    found = reduce(model, data, recipe, trust_edges=True, progress=False)
    assert found.sites and found.report.budget == ()
    for site in found.sites:
        assert 1 <= site.rank <= site.width_before
        assert site.width_after <= site.width_before
    assert count_parameters(found.model) == found.report.planned_parameters
    assert any(site.width_after < site.width_before for site in found.sites) or estimator not in ("fixed", "energy")
    assert zoo.outputs(found.model, data[0]).isfinite().all()


@pytest.mark.parametrize("estimator", sorted(EDGE_ESTIMATORS))
def test_every_edge_ranks_directions_for_a_budget(bert, estimator):
    """signflip among them: its null moments are taken in the same pass."""
    model, data = bert
    options = {"fixed_rank": 8} if estimator == "fixed" else {}
    recipe = RECIPE.replace(edge_estimator=estimator, allocation="edge", **options)
    found = reduce(model, data, recipe, progress=False)
    assert 1 - found.parameters_after / count_parameters(model) == pytest.approx(0.3, abs=0.05)
    assert all(site.edge > 0 for site in found.sites)


def test_directions_of_a_site_too_narrow_for_a_bulk_have_a_place_among_the_others():
    """Its edge is 0, as everything is taken for signal; a dead channel has no part in it."""
    from optimum_rmtkd.spectra import SecondMoments, signal_subspace

    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(8.0)
    moments = SecondMoments(8)
    moments.update(x)
    found = signal_subspace(moments, estimator="energy", share=1.0, compare=False)
    score = found.over_edge
    assert score.isfinite().all() and float(score.mean()) == pytest.approx(1) and float(score[-1]) < 1e-6
    wide = signal_subspace(moments, estimator="fixed", rank=3, compare=False)
    assert torch.equal(wide.over_edge, wide.eigenvalues / wide.edge)


def test_token_ids_of_another_tokenizer(bert):
    model, data = bert
    foreign = [{**batch, "input_ids": batch["input_ids"] + 1000} for batch in data]
    refused(CalibrationError, "has 61 rows", narrow, model, foreign, RECIPE)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"input_ids": lambda x: x - 100}, "holds -[0-9]+: expected ids of at least 0"),
        ({"input_ids": lambda x: x.float()}, "is float32 .*: expected whole numbers"),
        ({"input_ids": lambda x: x.to("meta")}, "input_ids of a calibration batch is on the meta device"),
        ({"input_ids": lambda x: x.to_sparse()}, "is sparse_coo: expected a dense tensor"),
        ({"input_ids": lambda x: x[:, :0], "attention_mask": lambda x: x[:, :0]}, "without a single token"),
        ({"input_ids": lambda x: x.repeat(1, 5), "attention_mask": lambda x: x.repeat(1, 5)}, "positions for 40"),
        ({"attention_mask": lambda x: x[:, :-1]}, "expected a mask for every token"),
        ({"attention_mask": lambda x: x[:3]}, "expected a mask for every token"),
        ({"attention_mask": lambda x: x * float("nan")}, "attention_mask .* holds NaN or infinite values"),
        (
            {"attention_mask": lambda x: (x - 1) * 10000.0},
            "attention_mask .* holds -10000.0: expected 1 for each real",
        ),
    ],
)
def test_tokens_that_no_model_takes(bert, changes, match):
    model, data = bert
    wrong = [{**batch, **{name: change(batch[name]) for name, change in changes.items()}} for batch in data]
    refused(CalibrationError, match, narrow, model, wrong, RECIPE)


def test_batches_of_numpy_are_those_of_torch(bert):
    model, data = bert
    arrays = [{name: value.numpy() for name, value in batch.items()} for batch in data]
    ours, theirs = (narrow(model, batches, RECIPE, progress=False).state_dict() for batches in (arrays, data))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ragged = [{"input_ids": np.array([[1], [2, 3]], dtype=object)}]
    refused(CalibrationError, "'input_ids' of a calibration batch is ndarray object", narrow, model, ragged, RECIPE)


# Before anything is computed


def test_check_recipe_refuses_what_cannot_work(bert):
    model, data = bert
    check_recipe(model, RECIPE)
    for error, match, changes in (
        (RMTKDError, "Unknown site", {"sites": "nowhere"}),
        (RMTKDError, "Unknown edge estimator 'kaiser'. Known: ", {"edge_estimator": "kaiser"}),
    ):
        with pytest.raises(error, match=match):
            check_recipe(model, RECIPE.replace(**changes))
    with pytest.raises(BudgetError, match="the model cannot get below"):
        check_recipe(model, RECIPE.replace(target_reduction=0.999))
    half = narrow(model, data, RECIPE.replace(target_reduction=0.5), progress=False)
    with pytest.raises(BudgetError, match="already no more than"):
        check_recipe(half, RECIPE.replace(target_reduction=0.4))
    with torch.no_grad():
        half.classifier.weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="1 tensor.s. of RMTKDBert.* the first is classifier.weight"):
        check_recipe(half, RECIPE.replace(target_reduction=0.6))


# Arguments of another type


@pytest.mark.parametrize(
    "function, given, told",
    [
        (narrow, 0.5, r"config is a float; expected RMTKDConfig: RMTKDConfig\(target_reduction=0.5\)"),
        (analyze, {"target_reduction": 0.5}, r"config is a dict; expected RMTKDConfig: RMTKDConfig\(\*\*values\)"),
        (reduce, "recipe.json", r"config is a str; .*from_json_file\('recipe.json'\)"),
        (
            lambda *given, **options: narrow_to(*given[:2], {}, given[2], **options),
            RMTKDConfig,
            "expected RMTKDConfig",
        ),
    ],
    ids=["a number", "a dictionary", "a path", "a class"],
)
def test_what_is_no_recipe(bert, function, given, told):
    refused(RMTKDError, told, function, *bert, given)


@pytest.mark.parametrize(
    "given, told",
    [
        ("./my-bert", r"got str \('./my-bert'\)\. Load it: .*from_pretrained"),
        (transformers.BertModel, "got the class BertModel. Make one"),
        (None, "got NoneType"),
    ],
    ids=["a path", "a class", "none"],
)
def test_what_is_no_model(bert, given, told):
    for function in (narrow, analyze, reduce):
        refused(RMTKDError, told, function, given, bert[1], RECIPE)
    refused(RMTKDError, told, narrow, given, bert[1], RMTKDConfig(tolerance=0.5), evaluate=lambda model: 0.5)


def test_a_target_far_below_what_single_features_remove_is_said(bert, caplog):
    narrow(*bert, RECIPE.replace(target_reduction=1e-9), progress=False)
    assert "are removed where 1e-07 % were asked for" in caplog.text
