"""What can be narrowed, as the registry has it: the page, the command, and that both are derived."""

from __future__ import annotations

import dataclasses
import re

import pytest

from optimum_rmtkd import UnsupportedArchitectureError, narrow
from optimum_rmtkd.surgery import families
from optimum_rmtkd.surgery.layouts import factored_anatomy
from optimum_rmtkd.surgery.native import native_anatomy
from optimum_rmtkd.surgery.overview import families_markdown, families_table, family_rows, registered_families

from . import zoo
from .families_page import BEGIN, END, PAGE, lives_by_type, page_with


def test_the_page_names_the_families_that_are_registered():
    """The quick half: a family that is declared and not on the page, or the other way round. `make families`."""
    table = PAGE.read_text(encoding="utf8").partition(BEGIN)[2].partition(END)[0]
    named = {word for line in table.splitlines() if line.startswith("|") for word in re.findall(r"`([\w-]+)`", line)}
    assert set(registered_families()) - named == set()
    rows = [line.split(" | ")[1] for line in table.splitlines()[2:] if line.startswith("|")]
    assert {name for row in rows for name in re.findall(r"`([\w-]+)`", row)} == set(registered_families())


@pytest.mark.slow
def test_the_page_is_what_the_registry_answers():
    table = families_markdown(family_rows(), lives_by_type())
    assert page_with(table) == PAGE.read_text(encoding="utf8"), "out of date: make families"


def test_a_family_is_asked_by_a_model_of_its_own():
    rows = family_rows(("bert", "mobilenet_v2", "mamba", "mpt"))
    found = {name: row for row in rows for name in row.model_types}
    model = zoo.make("bert", "ForSequenceClassification")
    kinds = {site.kind for site in families.family_of(model).layout.anatomy(model).sites.values() if site.chosen}
    assert set(found["bert"].sites) == kinds and found["bert"].factored and factored_anatomy(model).sites
    assert found["bert"].native == "" and native_anatomy(model)
    assert found["mobilenet_v2"].native == "the config of its class has no field for the widths inside a block"
    assert found["mpt"].sites == () and found["mpt"].native == "no family is declared"
    with pytest.raises(UnsupportedArchitectureError, match="No family is registered.*form='factored'.*Registered are"):
        narrow(_unknown(), zoo.batches("bert"))
    table = families_table(rows)
    assert "BERT" in table and re.search(r"only form=\"factored\":\n +no family +mamba, mpt", table)


def _unknown():
    model = zoo.make("bert", "ForSequenceClassification")
    model.config.model_type = "mpt"
    return model


def test_each_life_is_found_where_it_is_lived():
    found = lives_by_type()
    assert found["bert"] == "test_families.py::test_life_cycle" and found["llama"] == "test_causal.py::test_life_cycle"


def test_a_family_that_is_registered_appears_without_further_ado(monkeypatch):
    bert = registered_families()["bert"]
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    families.register_family(dataclasses.replace(bert, name="My own", model_types=("ernie",)))
    (row,) = family_rows(("ernie",))
    assert row.family == "My own" and "hidden" in row.sites
    assert "| My own | `ernie` | cut |" in families_markdown([row], {"ernie": "test_mine"})
