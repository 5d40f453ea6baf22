"""How many threads a command uses, and what it says of a busy machine."""

from __future__ import annotations

import os

import pytest
import torch

from optimum_rmtkd.commands import threads
from optimum_rmtkd.commands.threads import cores, use_threads


@pytest.fixture(autouse=True)
def restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("quota", "share"), [("max 100000", 64), ("150000 100000", 2), ("20000 100000", 1), ("9900000 100000", 64)]
)
def test_a_container_has_its_share_of_the_cores(tmp_path, monkeypatch, quota, share):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert cores(tmp_path / "cpu.max") == share
    assert cores(tmp_path / "absent") == 64


def test_a_number_is_taken_and_a_busy_machine_named(monkeypatch, caplog):
    monkeypatch.setattr(threads, "cores", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(3)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.8, 0.0, 0.0), raising=False)
    use_threads(None)
    assert torch.get_num_threads() == 2  # whatever the load: a run that goes on must go on as it began
    assert "busy (load 1.8, 2 cores)" in caplog.text and "--threads 1" in caplog.text
    caplog.clear()
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.0, 0.0), raising=False)
    use_threads(None)
    use_threads(1)
    assert torch.get_num_threads() == 1 and not caplog.text


def test_the_environment_is_respected(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(threads, "cores", lambda: 2)
    torch.set_num_threads(3)
    use_threads(None)
    assert torch.get_num_threads() == 3
