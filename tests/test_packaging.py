"""What an install brings: the package, and the door through which optimum-cli finds it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from optimum.commands import optimum_cli

import optimum_rmtkd

from .conftest import ROOT


DOOR = "optimum/commands/register/register_rmtkd.py"

pytest.importorskip("hatchling")


def build_file(folder, kind: str, source=ROOT) -> Path:
    """Build a wheel ("standard" or "editable") or an sdist of `source` into `folder`, without network and without
    build isolation."""
    builder = ("sdist", "SdistBuilder", "") if kind == "sdist" else ("wheel", "WheelBuilder", f", versions=['{kind}']")
    code = (
        f"import sys; from hatchling.builders.{builder[0]} import {builder[1]};"
        f"print(next({builder[1]}(sys.argv[1]).build(directory=sys.argv[2]{builder[2]})))"
    )
    done = subprocess.run([sys.executable, "-c", code, source, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[-1])


def build(folder, kind: str):
    """The wheel, opened."""
    return zipfile.ZipFile(build_file(folder, kind))


def everything_but_this(site: Path) -> None:
    """Fill a folder with links to all that is installed here, but this package and its door."""
    here = Path(optimum_cli.__file__).parents[2]
    shutil.copytree(here / "optimum", site / "optimum", ignore=shutil.ignore_patterns("register", "__pycache__"))
    for entry in here.iterdir():
        if entry.name != "optimum" and "rmtkd" not in entry.name:
            (site / entry.name).symlink_to(entry)


def test_the_version_stands_in_one_place():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf8")
    assert not re.search(r"^version\s*=", text, re.MULTILINE) and 'dynamic = ["version"]' in text
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf8")
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] == optimum_rmtkd.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf8")
    assert re.search(r"^version: (\S+)$", citation, re.MULTILINE)[1] == optimum_rmtkd.__version__


def test_the_source_distribution_holds_all_that_the_wheel_is_made_of(tmp_path):
    with tarfile.open(build_file(tmp_path / "dist", "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = (path for path in tmp_path.iterdir() if path.name.startswith("optimum_rmtkd-"))
    assert folder.name == f"optimum_rmtkd-{optimum_rmtkd.__version__}"
    wanted = ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "Makefile", "docs/index.md", "tests/conftest.py")
    assert [name for name in wanted if not (folder / name).is_file()] == []
    again = zipfile.ZipFile(build_file(tmp_path / "again", "standard", folder)).namelist()
    assert sorted(again) == sorted(build(tmp_path / "checkout", "standard").namelist())


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_virtual_environment(tmp_path):
    """Installed by pip, without network; what it depends on is that of this environment."""
    wheel, place = build_file(tmp_path / "dist", "standard"), tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    python = place / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (tmp_path / "site").mkdir()
    everything_but_this(tmp_path / "site")
    (site,) = place.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(f"{tmp_path / 'site'}\n")
    code = "import optimum_rmtkd; print(optimum_rmtkd.__file__); from optimum.commands.optimum_cli import main; main()"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def call(*words) -> list[str]:
        done = subprocess.run([python, *words], capture_output=True, text=True, env=clean, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().splitlines()

    lines = call("-c", code, "rmtkd", "families", "bert")
    assert lines[0].startswith(str(site)) and any("BERT" in line for line in lines)
    shown = call("-c", "from importlib.metadata import version; print(version('optimum-rmtkd'))")
    assert shown == [optimum_rmtkd.__version__]
    tiny = "hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50"
    lines = call(
        "-c",
        "import torch, optimum_rmtkd as o; from transformers import BertConfig, BertForSequenceClassification as B;"
        f"b = [dict(input_ids=torch.randint(50, (16, 8)), labels=torch.randint(2, (16,)))];m = B(BertConfig({tiny}));"
        "s = o.narrow(m, b, o.RMTKDConfig(target_reduction=0.3, round_to=4, min_width=4)); s.save_pretrained('small');"
        "from transformers import AutoModelForSequenceClassification as A;"
        "print(type(A.from_pretrained('small')).__name__)",
    )
    assert lines[-1] == "RMTKDBertForSequenceClassification"


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
    site = tmp_path / "site"
    everything_but_this(site)
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
    for command in ("analyze", "bench", "compress", "demo", "export", "families", "report"):
        assert command in done.stdout
