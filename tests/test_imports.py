"""Importing the package is cheap and makes the reduced architectures known."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

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
