"""What an install brings: the package, and the door through which optimum-cli finds it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from optimum.commands import optimum_cli

from .conftest import ROOT


DOOR = "optimum/commands/register/register_rmtkd.py"

pytest.importorskip("hatchling")


def build(folder, kind: str):
    """Build a wheel ("standard" or "editable") into `folder`, without network and without build isolation."""
    code = (
        "import sys; from hatchling.builders.wheel import WheelBuilder;"
        f"print(next(WheelBuilder(sys.argv[1]).build(directory=sys.argv[2], versions=['{kind}'])))"
    )
    done = subprocess.run([sys.executable, "-c", code, ROOT, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(done.stdout.strip().splitlines()[-1])


def test_wheel_holds_the_package_and_the_door(tmp_path):
    names = build(tmp_path, "standard").namelist()
    assert DOOR in names
    assert {"optimum_rmtkd/__init__.py", "optimum_rmtkd/modeling_rmtkd.py"} <= set(names)
    templates = ("hub/templates/card.md", "pages/templates/report.html")
    assert {f"optimum_rmtkd/{name}.jinja" for name in templates} <= set(names)
    # An __init__.py in optimum's folders would break the namespace for every other optimum package.
    assert not [name for name in names if name.startswith("optimum/") and name != DOOR]
    assert not [name for name in names if name.startswith(("tests/", "examples/"))]


def test_editable_wheel_holds_the_door_and_a_path_to_the_checkout(tmp_path):
    wheel = build(tmp_path, "editable")
    assert DOOR in wheel.namelist()
    paths = [wheel.read(name).decode().split("\n") for name in wheel.namelist() if name.endswith(".pth")]
    assert paths == [[str(ROOT)]]


def test_optimum_cli_finds_the_commands_of_an_unpacked_wheel(tmp_path):
    """In a site of its own: everything installed here but this package, which comes from the wheel."""
    here, site = Path(optimum_cli.__file__).parents[2], tmp_path / "site"
    shutil.copytree(here / "optimum", site / "optimum", ignore=shutil.ignore_patterns("register", "__pycache__"))
    for entry in here.iterdir():
        if entry.name != "optimum" and "rmtkd" not in entry.name:
            (site / entry.name).symlink_to(entry)
    build(tmp_path / "dist", "standard").extractall(site)

    code = "import optimum_rmtkd; print(optimum_rmtkd.__file__); from optimum.commands.optimum_cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, "rmtkd", "--help"],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(site)),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    for command in ("analyze", "bench", "compress", "demo", "export", "report"):
        assert command in done.stdout
