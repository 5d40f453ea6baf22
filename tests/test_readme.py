"""The README is short, what it links to is there, and what it shows runs."""

from __future__ import annotations

import re

import pytest
from transformers import ViTConfig, ViTForImageClassification

from .conftest import ROOT


LONGEST = 150  # lines
TEXT = (ROOT / "README.md").read_text(encoding="utf8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_it_is_read_to_the_end():
    assert len(TEXT.splitlines()) <= LONGEST


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text(encoding="utf8")), target


def test_what_it_shows_of_python_runs(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    shape = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
    widths = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(**shape, **widths)).save_pretrained("rmtkd-demo")
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(block.replace("num_train_epochs=3", "max_steps=4"), names)  # noqa: S102
    assert len(blocks) == 3 and names["trainer"].state.global_step == 4
    assert type(names["model"]).__name__ == "RMTKDViTForImageClassification"
    assert names["model"].num_parameters() == names["small"].num_parameters()
