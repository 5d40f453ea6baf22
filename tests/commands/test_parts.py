"""Objectives, reparameterization and transforms from the command line and from JSON: one registry, clear refusals."""

from __future__ import annotations

import argparse
import json

import pytest

from optimum_rmtkd.commands.options import add_recipe_options, recipe_from_options
from optimum_rmtkd.config import RMTKDConfig
from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.trainer.parts import parts_of


def parse(*args):
    parser = argparse.ArgumentParser()
    add_recipe_options(parser)
    return recipe_from_options(parser.parse_args(args))


def test_from_the_command_line_and_back_through_json(tmp_path):
    terms = {"task": {"weight": 0.5}, "skew_kl": {"alpha": 0.1}, "back": {"name": "kl", "reverse": True}}
    recipe = parse(
        "--objectives", json.dumps(terms), "--reparameterization", "mpo", "--transforms", '{"name": "embedding_mixup"}'
    )
    recipe.to_json_file(tmp_path / "recipe.json")
    again = RMTKDConfig.from_json_file(tmp_path / "recipe.json")
    assert again == recipe and again.objectives == terms
    parts = parts_of(again)
    assert [o.label for o in parts.objectives] == ["task", "skew_kl", "back"] and parts.objectives[0].weight == 0.5
    assert parts.reparameterization.num_tensors == 3 and parts.transforms[0].name == "embedding_mixup"
    several = parse("--objectives", '["task", {"name": "kl", "reverse": true}]', "--transforms", '["embedding_mixup"]')
    assert [o.label for o in parts_of(several).objectives] == ["task", "kl"] and len(parts_of(several).transforms) == 1
    assert type(several).from_dict(several.to_dict()) == several
    with pytest.raises(RMTKDError, match="objectives, reparameterization: given in rmtkd_config and as an argument"):
        parts_of(again, objectives=["kl"], reparameterization="mpo")
    with pytest.raises(RMTKDError, match="kl_weight and objectives: the former belong to"):
        parts_of(RMTKDConfig(kl_weight=0.2), objectives=["kl"])


def test_nothing_given_is_the_three_terms_of_the_recipe():
    parts = parts_of(RMTKDConfig(hidden_weight=0.0))
    assert [o.label for o in parts.objectives] == ["task", "kl"]
    assert parts.reparameterization is None and parts.transforms == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("objectives", '{"klx": {}}', "No objective 'klx'; expected one of attention_relation, correlation, hidden"),
        (
            "objectives",
            '{"kl": {"temperature": "2"}}',
            "KLDivergence\\(temperature='2'\\): expected a number above 0; got a str. Write 2,",
        ),
        ("reparameterization", '["mpo"]', "expected a mapping, a string or None; got a list"),
        ("objectives", '{"kl": {"temp": 2}}', "kl takes no temp; expected among weight, temperature, reverse"),
        ("reparameterization", "mpoo", "No reparameterization 'mpoo'; expected one of mpo, powerpropagation"),
        ("reparameterization", '{"name": "mpo", "n": 3}', "mpo takes no n; expected among num_tensors"),
        ("transforms", "mixup", "No batch transform 'mixup'; expected one of adaptive_off_policy"),
        ("objectives", "tensor_alignment", "pass reparameterization='mpo' as well"),
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(field, value, message):
    with pytest.raises(RMTKDError, match=message):
        parts_of(parse(f"--{field}", value))


@pytest.mark.parametrize(
    ("value", "message"), [('{"task": ', "is not JSON"), ("[1, 2]", "expected a name, or a mapping")]
)
def test_text_that_is_no_recipe(value, message):
    with pytest.raises(RMTKDError, match=message):
        parse("--objectives", value)


def test_the_three_terms_and_objectives_contradict_each_other():
    with pytest.raises(RMTKDError, match="kl_weight, temperature and objectives: the former belong to"):
        parse("--objectives", "kl", "--temperature", "4", "--kl-weight", "0.2")


def test_no_cut_takes_no_target():
    assert parse("--schedule", "none").schedule == "none"
    with pytest.raises(RMTKDError, match="schedule='none' cuts nothing"):
        parse("--schedule", "none", "--target-reduction", "0.5")
