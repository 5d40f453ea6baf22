"""A vocabulary of the size of XLM-R's is trimmed in under a minute and 4 GB."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from ..conftest import ROOT


@pytest.mark.slow
def test_a_unigram_table_of_250002_rows_takes_less_than_a_minute_and_4_gb():
    script = ROOT / "examples" / "benchmarks" / "vocabulary.py"
    done = subprocess.run([sys.executable, script, "xlmr"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    seconds, peak = re.search(r"(\d+) s, ([\d,]+) MiB", done.stdout).groups()
    assert "250,002" in done.stdout
    assert int(seconds) < 60 and int(peak.replace(",", "")) < 4096
