from __future__ import annotations

import argparse
import dataclasses

import pytest

from optimum_rmtkd.commands.options import add_options, add_recipe_options, from_options, option, recipe_from_options
from optimum_rmtkd.config import RMTKDConfig
from optimum_rmtkd.errors import RMTKDError


def parse(*args: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_recipe_options(parser)
    return parser.parse_args(args)


def test_no_option_gives_the_default_recipe():
    assert recipe_from_options(parse()) == RMTKDConfig()


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (("--target-reduction", "0.8"), "target_reduction", 0.8),
        (("--sites", "hidden", "intermediate"), "sites", ("hidden", "intermediate")),
        (("--no-refit",), "refit", False),
        (("--rounds", "3"), "rounds", 3),
        (("--n-effective", "auto"), "n_effective", "auto"),
        (("--n-effective", "500"), "n_effective", 500),
        (("--schedule", "layerwise"), "schedule", "layerwise"),
        (("--edge-estimator", "gavish_donoho"), "edge_estimator", "gavish_donoho"),
    ],
)
def test_options_reach_the_recipe_with_the_type_of_the_field(args, name, value):
    got = getattr(recipe_from_options(parse(*args)), name)
    assert got == value and type(got) is type(value)


def test_every_field_is_an_option_and_its_help_is_the_fields():
    parser = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=10_000))
    add_recipe_options(parser)
    text = parser.format_help()
    for item in dataclasses.fields(RMTKDConfig):
        assert f"--{item.name.replace('_', '-')}" in text
        assert item.metadata["help"] in text


def test_recipe_file_with_single_options_on_top(tmp_path):
    file = tmp_path / "recipe.json"
    RMTKDConfig(target_reduction=0.5, round_to=4, sites=("hidden",)).to_json_file(file)
    recipe = recipe_from_options(parse("--recipe", str(file), "--target-reduction", "0.7"))
    assert recipe == RMTKDConfig(target_reduction=0.7, round_to=4, sites=("hidden",))


def test_an_option_given_with_its_default_value_overrides_the_file(tmp_path):
    file = tmp_path / "recipe.json"
    RMTKDConfig(round_to=4).to_json_file(file)
    assert (
        recipe_from_options(parse("--recipe", str(file), "--round-to", str(RMTKDConfig().round_to))) == RMTKDConfig()
    )


@pytest.mark.parametrize("content", [None, "{", "[]", '{"no_such_field": 1}'])
def test_missing_or_wrong_recipe_file(tmp_path, content):
    file = tmp_path / "recipe.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(RMTKDError, match="recipe.json|no_such_field"):
        recipe_from_options(parse("--recipe", str(file)))


@pytest.mark.parametrize("args", [("--schedule", "sideways"), ("--tau", "much"), ("--unknown", "1")])
def test_wrong_values_end_in_argparse_error(args):
    with pytest.raises(SystemExit) as stop:
        parse(*args)
    assert stop.value.code == 2


def test_value_out_of_range_is_our_error():
    with pytest.raises(RMTKDError, match="target_reduction=1.5"):
        recipe_from_options(parse("--target-reduction", "1.5"))


def test_skipped_fields_are_no_options():
    parser = argparse.ArgumentParser()
    add_recipe_options(parser, skip={"seed"})
    with pytest.raises(SystemExit):
        parser.parse_args(["--seed", "1"])


def test_percent_signs_and_lists_of_any_dataclass():
    @dataclasses.dataclass(frozen=True)
    class Two:
        names: list[str] | None = option(None, "Half, that is 50 %, of the names.")
        big: bool = option(False, "Big.")

    parser = argparse.ArgumentParser()
    # get_type_hints cannot see the names of this function, so the annotations are given as they would be resolved
    Two.__annotations__ = {"names": list[str] | None, "big": bool}
    add_options(parser, Two, "two")
    assert "50 %" in parser.format_help()
    assert from_options(Two, parser.parse_args(["--names", "a", "b", "--big"])) == Two(["a", "b"], True)
    assert from_options(Two, parser.parse_args([])) == Two()
