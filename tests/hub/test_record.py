"""The record of a run may be anybody's: card and report are made from it, or the entry that is wrong is named."""

from __future__ import annotations

import copy
import json

import pytest

from optimum_rmtkd import RMTKDError
from optimum_rmtkd.hub.card import model_card
from optimum_rmtkd.hub.run import Run


SITE = {"name": "a", "kind": "hidden", "width": 4, "planned": 2, "spectral_rank": 1, "eigenvalues": [1.0, 0.5]}
REPORT = {"parameters": 100, "planned_parameters": 50, "recipe": {"edge_estimator": "mp"}, "budget": []}
GOOD = {
    "config.json": {
        "rmtkd": {"version": 1, "spec": {}, "recipe": {"seed": 0}, "provenance": {"base_model": "a/b"}},
        "architectures": ["RMTKDBertForSequenceClassification"],
        "auto_map": {"AutoModel": "modeling_rmtkd.RMTKDBertModel"},
    },
    "rmtkd_stages.json": {"stages": [], "recipe": {"seed": 0}},
    "rmtkd_spectra.json": {"stages": {"0": REPORT | {"sites": [SITE | {"ranks": {"mp": 1}, "warnings": []}]}}},
    "rmtkd_bench.json": {"setting": "s", "rows": [["latency", "1 ms", "2 ms", "+100 %"]]},
}
PLACES = [
    ("config.json", "rmtkd"),
    ("config.json", "rmtkd", "recipe"),
    ("config.json", "rmtkd", "provenance"),
    ("config.json", "rmtkd", "provenance", "base_model"),
    ("config.json", "architectures"),
    ("config.json", "architectures", 0),
    ("config.json", "auto_map"),
    ("rmtkd_stages.json", "recipe"),
    ("rmtkd_spectra.json", "stages", "0", "recipe"),
    ("rmtkd_spectra.json", "stages", "0", "recipe", "edge_estimator"),
    ("rmtkd_bench.json", "rows"),
    ("rmtkd_bench.json", "rows", 0),
    ("rmtkd_bench.json", "rows", 0, 0),
]
VALUES = [None, "x", 5, [], [[]], [["a"], 1, 2, 3], {}, {"a": {}}, True, float("nan")]


def card_of(folder, record) -> str:
    for name, values in record.items():
        (folder / name).write_text(json.dumps(values))
    return str(model_card(Run.read(folder)))


def test_the_record_is_good_before_it_is_changed(tmp_path):
    assert "2 ms" in card_of(tmp_path, GOOD)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_whatever_stands_in_a_record_ends_in_a_card_or_names_the_entry(tmp_path, place):
    file, *above, last = place
    for value in VALUES:
        record = copy.deepcopy(GOOD)
        inner = record[file]
        for name in above:
            inner = inner[name]
        inner[last] = value
        try:
            card_of(tmp_path, record)
        except RMTKDError as error:
            assert file in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("config.json", "rmtkd"), "x", "config.json(rmtkd='x')"),
        (("config.json", "rmtkd", "provenance", "base_model"), ["x"], "rmtkd.provenance(base_model=['x'])"),
        (("config.json", "architectures"), "x", "expected a list"),
        (("rmtkd_spectra.json", "stages", "0", "recipe"), {}, "stages['0'].recipe lacks edge_estimator"),
        (("rmtkd_bench.json", "rows", 0), [], "rows[0] is []; expected 4 strings"),
    ],
)
def test_the_entry_is_named(tmp_path, place, value, told):
    record = copy.deepcopy(GOOD)
    inner = record[place[0]]
    for name in place[1:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    with pytest.raises(RMTKDError) as caught:
        card_of(tmp_path, record)
    assert told in str(caught.value)
