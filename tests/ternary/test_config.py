"""The ternary recipe: every field is checked by its declared type, and survives JSON."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given

from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.ternary.config import TernaryConfig

from ..fuzz import accepted, arguments, many, raw, recipe_or_refusal, texts, through_json


def valid_or_refused(values: dict) -> None:
    recipe = accepted(TernaryConfig, values)
    if recipe is None:
        return
    assert TernaryConfig.from_dict(recipe.to_dict()) == recipe
    assert TernaryConfig.from_dict(through_json(recipe.to_dict())) == recipe
    assert recipe.replace() == recipe


@many(1000)
@given(arguments(TernaryConfig))
def test_any_values_give_a_recipe_or_a_named_error(values):
    valid_or_refused(values)


@pytest.mark.slow
@many(10_000)
@given(arguments(TernaryConfig))
def test_ten_thousand_times_any_values(values):
    valid_or_refused(values)


@many(500)
@given(raw(TernaryConfig))
def test_anything_given_to_from_dict(values):
    recipe_or_refusal(TernaryConfig.from_dict, values)


@many(500)
@given(texts(TernaryConfig))
def test_anything_in_a_file(tmp_path_factory, content):
    file_of_a_recipe(tmp_path_factory, content)


@pytest.mark.slow
@many(10_000)
@given(raw(TernaryConfig))
def test_anything_given_to_from_dict_ten_thousand_times(values):
    recipe_or_refusal(TernaryConfig.from_dict, values)


@pytest.mark.slow
@many(10_000)
@given(texts(TernaryConfig))
def test_anything_in_a_file_ten_thousand_times(tmp_path_factory, content):
    file_of_a_recipe(tmp_path_factory, content)


def file_of_a_recipe(tmp_path_factory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "TernaryConfig.json"
    path.write_bytes(content)
    recipe_or_refusal(TernaryConfig.from_json_file, path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden", None, "hidden=None: expected a list (each a whole number of at least 1); got None."),
        ("hidden", "100", "got a str. Write 100, without quotes."),
        ("hidden", (10, 0), "hidden[1]=0: expected a whole number of at least 1."),
        ("hidden", (10, True), "hidden[1]=True: expected a whole number of at least 1; got a bool."),
        ("hidden", {10: 20}, "expected a list"),
        ("hidden", [[10]], "hidden[0]=[10]: expected a whole number of at least 1; got a list."),
        ("hidden", np.array([10, 10]), "Take its .tolist()."),
        ("hidden", (), "hidden=(): expected a list of 1 or more."),
        ("levels", None, "levels=None: expected a whole number of at least 2; got None."),
        ("levels", 1, "levels=1: expected a whole number of at least 2."),
        ("levels", "3", "levels='3': expected a whole number of at least 2; got a str. Write 3, without quotes."),
        ("sparsity", "half", "sparsity='half': expected a share of the weights, in [0, 1); got a str."),
        ("sparsity", 1.0, "sparsity=1.0: expected a share of the weights, in [0, 1)."),
        ("sparsity", 50, "Did you mean 0.5?"),
        ("ridge", math.nan, "ridge=nan: expected a number above 0."),
        ("ridge", True, "ridge=True: expected a number above 0 or None; got a bool."),
        ("mode", 3, "mode=3: expected one of weights_only, min_shift, two_level, paper; got an int."),
        ("storage", "base-3", "expected one of base3, 2bit, seed, dense. Did you mean base3?"),
        ("activation", b"relu", "activation=b'relu': expected a string; got a bytes. Decode it."),
        ("calibration_samples", 100.0, "Write 100."),
        ("seed", -1, "seed=-1: expected a whole number in [0, 4294967295]."),
    ],
)
def test_what_is_refused_says_what_was_expected(field, value, message):
    with pytest.raises(RMTKDError) as error:
        TernaryConfig(**{field: value})
    assert message in str(error.value) and str(error.value).startswith(field)


@pytest.mark.parametrize("hidden", [64, np.int64(64), [64], (np.int32(64),)])
def test_one_width_is_a_network_of_one_layer(hidden):
    widths = TernaryConfig(hidden=hidden).hidden
    assert widths == (64,) and type(widths[0]) is int


def test_json_both_ways(tmp_path):
    recipe = TernaryConfig(hidden=[32, 16], ridge=np.float32(0.5), mode="min_shift")
    recipe.to_json_file(tmp_path / "ternary.json")
    assert TernaryConfig.from_json_file(tmp_path / "ternary.json") == recipe
    with pytest.raises(RMTKDError, match=r"Unknown TernaryConfig key\(s\) sparcity.* Did you mean sparsity\?"):
        TernaryConfig.from_dict({"sparcity": 0.5})
    with pytest.raises(RMTKDError, match="from_dict got a list"):
        TernaryConfig.from_dict([])
