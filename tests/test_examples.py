"""What a user copies holds on public names alone."""

from __future__ import annotations

import ast
import re

import pytest

import optimum_rmtkd

from .conftest import ROOT


PUBLIC_MODULES = ("optimum_rmtkd", "optimum_rmtkd.objectives", "optimum_rmtkd.projections", "optimum_rmtkd.errors")
EXAMPLES = sorted((ROOT / "examples").glob("*.py")) + sorted((ROOT / "tests" / "scripts").glob("run_*.py"))
ADDED = re.compile(r"^\+(from optimum_rmtkd\S* import .*|import optimum_rmtkd.*)$", flags=re.MULTILINE)
PAGES = tuple(ROOT / "docs" / "guides" / name for name in ("your-script.md", "loop.md"))  # with diffs


def private_imports(source: str) -> list[str]:
    """What a script imports of this package beyond its public names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            if node.module == "optimum_rmtkd":
                found += [alias.name for alias in node.names if alias.name not in optimum_rmtkd.__all__]
        ours = [module for module in modules if module.split(".")[0] == "optimum_rmtkd"]
        found += [module for module in ours if module not in PUBLIC_MODULES]
    return found


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_imports_public_names_alone(path):
    assert private_imports(path.read_text()) == []


def test_a_private_import_is_found():
    for line in ("import optimum_rmtkd.commands.data", "from optimum_rmtkd.surgery import narrow"):
        assert private_imports(line)
    assert private_imports("def f():\n    from optimum_rmtkd import Surgeon") == ["Surgeon"]
    assert not private_imports("from optimum_rmtkd import narrow\nfrom optimum_rmtkd.objectives import TaskLoss")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_lines_that_a_page_adds_to_a_script_import_public_names_alone(page):
    blocks = re.findall(r"```diff\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        for line in ADDED.findall(block):
            assert private_imports(line) == [], line
