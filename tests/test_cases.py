"""Small programs from public bug reports, beside data and checkpoints of `RMTKD_SHARED`: each says in its first line
what it is about, and ends with PASS and status 0 where that is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT


CASES = sorted((Path(os.environ.get("RMTKD_SHARED", ROOT.parent / "shared")) / "cases").glob("*.py"))


@pytest.mark.slow
@pytest.mark.skipif(not CASES, reason="no folder `cases` in RMTKD_SHARED")
@pytest.mark.parametrize("case", CASES or [None], ids=lambda case: case.stem if case else "none")
def test_the_case_passes(case):
    run = subprocess.run([sys.executable, case], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert run.stdout.rstrip().endswith("PASS")
