"""Importing the package is cheap and makes the reduced architectures known."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT
from .tables import SLOW


HEAVY = ("torch", "transformers", "datasets", "numpy", "scipy", "sklearn", "matplotlib", "accelerate", "peft")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "module",
    [
        "optimum_rmtkd",
        "optimum_rmtkd.config",
        "optimum_rmtkd.errors",
        "optimum_rmtkd.recipe",
        "optimum_rmtkd.validation",
        "optimum_rmtkd.commands.cli",
    ],
)
def test_import_takes_nothing_heavy(module):
    loaded = run_python(f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))")
    assert set(json.loads(loaded)) & set(HEAVY) == set()


@pytest.mark.parametrize(
    "lines",
    [
        ("from transformers import AutoConfig", "import optimum_rmtkd"),
        SLOW(("import optimum_rmtkd",)),
        SLOW(("import optimum_rmtkd", "from transformers import BertConfig")),
        # a model's own config is half-way when the Auto classes are first imported
        ("import optimum_rmtkd", "from transformers import ViTModel"),
    ],
    ids="; ".join,
)
def test_import_registers_reduced_models_whichever_comes_first(lines):
    ask = "from transformers import AutoConfig\nprint(type(AutoConfig.for_model('rmtkd_bert')).__name__)"
    assert run_python("\n".join((*lines, ask))) == "RMTKDBertConfig"


def test_every_public_name_resolves():
    names = json.loads(run_python("import json, optimum_rmtkd; print(json.dumps(list(optimum_rmtkd.__all__)))"))
    assert {"RMTKDConfig", "RMTKDTrainer", "RMTKDTrainingArguments", "analyze", "narrow"} <= set(names)
    missing = run_python(
        "import optimum_rmtkd; print([n for n in optimum_rmtkd.__all__ if getattr(optimum_rmtkd, n, None) is None])"
    )
    assert missing == "[]"


def test_unknown_name_is_an_attribute_error():
    assert run_python("import optimum_rmtkd; print(hasattr(optimum_rmtkd, 'no_such_name'))") == "False"


# From the top down; rooms of one line know nothing of each other.
ROOMS = """
    commands
    trainer
    hub
    registration
    distillation
    surgery ternary
    reparameterization vocabulary pages
    models
    modeling_rmtkd
    loading_rmtkd resizing_rmtkd
    layers_rmtkd
    spec_rmtkd batches spectra
    config
    recipe registry checkpoints
    wholeness
    folders
    files
    validation leftovers disks signals
    locks
    errors
"""
LEVELS = {room: level for level, line in enumerate(ROOMS.strip().splitlines()) for room in line.split()}
DOORS = {"objectives", "projections", ""}  # public names alone
# The door of `import optimum_rmtkd` hands the classes what saves and pushes them; what is saved without this package
# borrows its errors there.
UPWARDS = {("registration", "hub"), ("registration", "ternary"), ("ternary", "registration")}


def imported_rooms(path: Path) -> set[str]:
    """Rooms of this package that a file imports: also inside functions, and for annotations alone."""
    package, found = path.relative_to(ROOT / "optimum_rmtkd").parts[:-1], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            place = (*package[: len(package) - node.level + 1], *filter(None, (node.module or "").split(".")))
            found |= {place[0]} if place else {alias.name for alias in node.names}
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {(name.split(".") + [""])[1] for name in names if name.split(".")[0] == "optimum_rmtkd"}
    return found


def test_imports_run_downwards():
    wrong = []
    for path in (ROOT / "optimum_rmtkd").rglob("*.py"):
        room = path.relative_to(ROOT / "optimum_rmtkd").parts[0].removesuffix(".py")
        if room in DOORS or room == "__init__":
            continue
        for other in imported_rooms(path) - {room} - DOORS:
            if (room, other) not in UPWARDS and LEVELS[other] <= LEVELS[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not wrong


def test_an_import_upwards_is_found():
    assert LEVELS["surgery"] > LEVELS["hub"] and LEVELS["spectra"] > LEVELS["surgery"]
    path = ROOT / "optimum_rmtkd" / "surgery" / "report.py"
    assert {"errors", "files", "pages", "spectra"} == imported_rooms(path) - {"surgery"}
