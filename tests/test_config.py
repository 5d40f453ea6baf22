"""The recipe: every field is checked by its declared type, and survives JSON."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given

from optimum_rmtkd.config import RMTKDConfig, milliseconds
from optimum_rmtkd.errors import RMTKDError

from .fuzz import accepted, arguments, many, raw, recipe_or_refusal, texts, through_json


def valid_or_refused(values: dict) -> None:
    recipe = accepted(RMTKDConfig, values)
    if recipe is None:
        return
    assert RMTKDConfig.from_dict(recipe.to_dict()) == recipe
    assert RMTKDConfig.from_dict(through_json(recipe.to_dict())) == recipe
    assert recipe.replace() == recipe
    for item in dataclasses.fields(recipe):
        value = getattr(recipe, item.name)
        assert type(value) in (type(None), bool, int, float, str, tuple, list, dict), item.name


@many(1000)
@given(arguments(RMTKDConfig))
def test_any_values_give_a_recipe_or_a_named_error(values):
    valid_or_refused(values)


@pytest.mark.slow
@many(10_000)
@given(arguments(RMTKDConfig))
def test_ten_thousand_times_any_values(values):
    valid_or_refused(values)


@many(500)
@given(raw(RMTKDConfig))
def test_anything_given_to_from_dict(values):
    recipe_or_refusal(RMTKDConfig.from_dict, values)


@many(500)
@given(texts(RMTKDConfig))
def test_anything_in_a_file(tmp_path_factory, content):
    file_of_a_recipe(tmp_path_factory, content)


@pytest.mark.slow
@many(10_000)
@given(raw(RMTKDConfig))
def test_anything_given_to_from_dict_ten_thousand_times(values):
    recipe_or_refusal(RMTKDConfig.from_dict, values)


@pytest.mark.slow
@many(10_000)
@given(texts(RMTKDConfig))
def test_anything_in_a_file_ten_thousand_times(tmp_path_factory, content):
    file_of_a_recipe(tmp_path_factory, content)


def file_of_a_recipe(tmp_path_factory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "RMTKDConfig.json"
    path.write_bytes(content)
    recipe_or_refusal(RMTKDConfig.from_json_file, path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("refit", "no", "refit='no': expected True or False; got a str. Write False, without quotes."),
        ("refit", 1, "refit=1: expected True or False; got an int."),
        ("disable_dropout", None, "disable_dropout=None: expected True or False; got None."),
        ("seed", -1, "seed=-1: expected a whole number in [0, 4294967295]."),
        ("seed", 2**32, "seed=4294967296: expected a whole number in [0, 4294967295]."),
        ("sites", [1], "sites[0]=1: expected a string; got an int."),
        ("sites", ["hidden", b"embedding"], "sites[1]=b'embedding': expected a string; got a bytes. Decode it."),
        ("temperature", math.inf, "temperature=inf: expected a number above 0. It has to be finite."),
        ("temperature", None, "temperature=None: expected a number above 0; got None."),
        ("max_metric_drop", math.nan, "max_metric_drop=nan: expected a number."),
        ("stage_threshold", -0.1, "stage_threshold=-0.1: expected a number of at least 0."),
        ("stage_threshold", "0.9", "Write 0.9, without quotes."),
        (
            "target_reduction",
            "0.8",
            "target_reduction='0.8': expected a share of the parameters to remove, for example 0.8, in (0, 1), or "
            "None; got a str. Write 0.8, without quotes.",
        ),
        (
            "target_reduction",
            80,
            "target_reduction=80: expected a share of the parameters to remove, for example 0.8, in (0, 1). Did you "
            "mean 0.8?",
        ),
        ("target_flops", 50.0, "in (0, 1). Did you mean 0.5?"),
        ("round_to", 16.0, "round_to=16.0: expected a whole number of at least 1; got a float. Write 16."),
        ("rounds", True, "rounds=True: expected a whole number of at least 1 or None; got a bool."),
        ("rounds", 10**30, "It has to fit into 64 bits."),
        pytest.param("calibration_samples", 10**5000, "calibration_samples=<int>: expected a whole number", id="huge"),
        ("form", "absorbd", "form='absorbd': expected one of absorbed, factored. Did you mean absorbed?"),
        ("form", ["absorbed"], "form=['absorbed']: expected one of absorbed, factored; got a list."),
        ("n_effective", 1, "n_effective=1: expected 'none', 'auto' or a whole number above 1."),
        ("tau", np.array([0.5]), "Take its .item()."),
        ("objectives", {"kl": {"weight": math.nan}}, "objectives['kl']['weight']=nan: expected a number."),
        ("objectives", {"kl": object}, "objectives['kl']=<class 'object'>: expected what JSON can hold"),
        ("objectives", ["kl", 3], "objectives[1]=3: expected a name, or a mapping of names to arguments; got an int."),
        ("objectives", '{"kl": {}, "kl": {}}', "the key 'kl' stands there twice"),
        ("objectives", '{"kl": {"weight": Infinity}}', "Infinity is no number of JSON"),
        ("objectives", {"kl": {0: 1, "0": 2}}, "expected each key once"),
        ("target_latency", 5, "target_latency=5: a plain number is a share of the dense model's time, in (0, 1), and"),
        ("target_latency", np.float64(2.5), "Did you mean '2.5ms'?"),
        ("target_latency", 0, "expected a share of the dense model's time, in (0, 1)"),
        ("target_latency", "5", "with their unit, for example '5ms'. Did you mean '5ms'?"),
        ("target_latency", "fast", "target_latency='fast': expected a share of the dense model's time"),
        ("target_latency", "0ms", "milliseconds above 0"),
        ("target_latency", "1" * 400 + "ms", "expected a share"),
        ("target_latency", True, "target_latency=True: expected"),
        ("tolerance", 0, "tolerance=0: expected points of the validation metric, in (0, 100)"),
        ("latency_dtype", "int8", "expected one of float32, bfloat16, float16"),
        ("round_share", 0.2, "round_share=0.2 without tolerance"),
        ("reparameterization", ["mpo"], "expected a mapping, a string or None; got a list."),
    ],
)
def test_what_is_refused_says_what_was_expected(field, value, message):
    with pytest.raises(RMTKDError) as error:
        RMTKDConfig(**{field: value})
    assert message in str(error.value) and str(error.value).startswith(field)


@pytest.mark.parametrize(
    ("field", "given_as", "kept"),
    [
        ("target_reduction", np.float64(0.8), 0.8),
        ("temperature", 2, 2.0),
        ("temperature", np.int64(2), 2.0),
        ("round_to", np.int64(4), 4),
        ("refit", np.bool_(False), False),
        ("sites", ["hidden"], ("hidden",)),
        ("sites", np.str_("hidden"), ("hidden",)),
        ("n_effective", np.uint8(200), 200),
        ("objectives", {"kl": {"weight": np.float32(0.5)}}, {"kl": {"weight": 0.5}}),
        ("objectives", ({"kl": {"over": (0, 1)}},), [{"kl": {"over": [0, 1]}}]),
        ("reparameterization", {"name": "mpo", "modes": {768: (32, 24)}}, {"name": "mpo", "modes": {"768": [32, 24]}}),
    ],
)
def test_what_is_accepted_is_kept_as_plain_values(field, given_as, kept):
    recipe = RMTKDConfig(**{field: given_as})
    value = getattr(recipe, field)
    assert value == kept and type(value) is type(kept)
    assert RMTKDConfig.from_dict(through_json(recipe.to_dict())) == recipe


TARGETS = {"target_reduction": 0.5, "target_flops": 0.5, "target_latency": 0.5, "tolerance": 0.5}


@pytest.mark.parametrize("first", TARGETS)
@pytest.mark.parametrize("second", TARGETS)
def test_there_is_one_target(first, second):
    if first == second:
        assert RMTKDConfig(**{first: 0.5}).targets == {first: 0.5}
        return
    with pytest.raises(RMTKDError, match=r"^Both .* were given: a budget has one target, drop one of them\.$"):
        RMTKDConfig(**{first: 0.5, second: 0.5})


def test_three_targets_are_all_named():
    with pytest.raises(RMTKDError, match=r"^target_reduction=0\.5 and target_flops.* all but one\.$"):
        RMTKDConfig(target_reduction=0.5, target_flops=0.5, tolerance=0.5)


def test_without_its_target_a_recipe_says_nothing_of_it():
    """As for a second training, whose cuts are made."""
    for values in ({"target_latency": 0.5, "latency_length": 8}, {"tolerance": 1.0, "round_share": 0.2}):
        assert RMTKDConfig(seed=3, **values).without_targets() == RMTKDConfig(seed=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_latency": 0.5, "schedule": "layerwise"}, "the edges decide there"),
        ({"tolerance": 0.5, "schedule": "layerwise"}, "the edges decide there"),
        ({"target_latency": "5ms", "schedule": "none"}, "schedule='none' cuts nothing"),
        ({"tolerance": 0.5, "schedule": "none"}, "schedule='none' cuts nothing"),
        ({"target_latency": 0.5, "rounds": 2}, "a time is met by one cut"),
        ({"tolerance": 0.5, "max_metric_drop": 0.1}, "both say which stage stands"),
        ({"tolerance": 0.5, "stage_threshold": 0.9}, "both say which stage stands"),
        ({"target_reduction": 0.5, "round_share": 0.2}, "round_share=0.2 without tolerance"),
        ({"target_reduction": 0.5, "latency_length": 64}, "latency_length=64 without target_latency"),
        ({"latency_dtype": "bfloat16"}, "latency_dtype='bfloat16' without target_latency"),
    ],
)
def test_what_contradicts_a_target_is_refused(values, message):
    with pytest.raises(RMTKDError) as error:
        RMTKDConfig(**values)
    assert message in str(error.value)


@pytest.mark.parametrize(("text", "number"), [("5ms", 5.0), (" 0.25 MS ", 0.25), ("12.5 ms", 12.5), (".5ms", 0.5)])
def test_milliseconds(text, number):
    assert milliseconds(text) == number
    recipe = RMTKDConfig(target_latency=text)
    assert RMTKDConfig.from_dict(through_json(recipe.to_dict())) == recipe


@pytest.mark.parametrize("text", ["ms", "", "-5ms", "5 s", "1e3ms", "5ms5ms", "٥ms", "nanms", "1.2.3ms", "5 m s"])
def test_no_milliseconds(text):
    with pytest.raises(RMTKDError, match="with their unit, for example '5ms'"):
        milliseconds(text)


def test_the_default_of_stage_share_follows_the_target():
    assert RMTKDConfig().span_of_cuts == 0.3
    assert RMTKDConfig(tolerance=1).span_of_cuts == 0.8
    assert RMTKDConfig(tolerance=1, stage_share=0.5).span_of_cuts == 0.5


def test_a_recipe_does_not_follow_the_dictionary_it_was_made_from():
    objectives = {"kl": {"weight": 0.5}}
    recipe = RMTKDConfig(objectives=objectives)
    objectives["kl"]["weight"] = -1
    assert recipe.objectives == {"kl": {"weight": 0.5}}


@pytest.mark.parametrize("values", [None, [], "target_reduction", [("seed", 1)], 3])
def test_from_dict_of_no_mapping(values):
    with pytest.raises(RMTKDError, match="from_dict got .*; expected a mapping of its fields"):
        RMTKDConfig.from_dict(values)


def test_unknown_keys_are_answered_with_the_nearest():
    for make in (lambda values: RMTKDConfig.from_dict(values), lambda values: RMTKDConfig().replace(**values)):
        with pytest.raises(RMTKDError, match=r"key\(s\) target_reductoin\. Known .* Did you mean target_reduction\?$"):
            make({"target_reductoin": 0.5})
    with pytest.raises(RMTKDError, match=r"key\(s\) 3, None, x"):
        RMTKDConfig.from_dict({3: 1, None: 2, "x": 3})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{\x00}\x00", "is not UTF-8 text"),
        ('{"edge_estimator": "é"}'.encode("latin1"), "is not UTF-8 text"),
        (b"[1]", "holds a JSON list"),
        (b"null", "holds a JSON NoneType"),
        (b'{"tau": NaN}', "NaN is no number of JSON"),
        (b'{"temperature": 1e999}', "temperature=inf"),
        (b'{"seed": 1, "seed": 2}', "the key 'seed' stands there twice"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"seeed": 1}', "Did you mean seed?"),
    ],
)
def test_files_that_hold_no_recipe(content, message, tmp_path):
    path = tmp_path / "recipe.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RMTKDError) as error:
        RMTKDConfig.from_json_file(path)
    assert message in str(error.value)


def test_a_folder_and_an_unusable_path_are_no_recipe(tmp_path):
    for path in (tmp_path, "\0", 3.5):
        with pytest.raises(
            RMTKDError, match="cannot be read .* expected the file that RMTKDConfig.to_json_file writes"
        ):
            RMTKDConfig.from_json_file(path)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"seed": 3}), encoding="utf-8-sig")
    assert RMTKDConfig.from_json_file(path) == RMTKDConfig(seed=3)


@pytest.mark.parametrize("text", ["my thesis", "{}", '{"seed": 1, "mine": 2}', "[1]"])
def test_a_recipe_replaces_recipes_and_no_other_file(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    if text != "{}":
        with pytest.raises(RMTKDError, match="is no RMTKDConfig: it is not replaced"):
            RMTKDConfig().to_json_file(path)
        assert path.read_text() == text
        path.unlink()
    for seed in (1, 2):
        RMTKDConfig(seed=seed).to_json_file(path)
        assert RMTKDConfig.from_json_file(path).seed == seed
    assert [file.name for file in tmp_path.iterdir()] == ["file.json"]
