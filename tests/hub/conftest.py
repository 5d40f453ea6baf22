"""The local Hub, and a way to run Python beside it as a user would: in a process of its own, with `HF_ENDPOINT`
set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("yaml")

from .server import LocalHub  # noqa: E402


HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """Folder that the processes share: logits to compare with, and the cache of the Hub client."""
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="session")
def hub():
    """Shards are uploaded as large files, everything else in the commit: both ways are taken."""
    with LocalHub(lambda path, size: "lfs" if path.startswith("model-") else "regular") as server:
        yield server


@pytest.fixture(scope="session")
def as_user(workplace):
    """as_user(hub, "client.py", "push", ...): run a script of this folder, return its output.

    The environment is read by huggingface_hub when it is imported; hence the process of its own.
    """

    def run(hub: LocalHub, *command: str, cache: str = "home", check: bool = True) -> subprocess.CompletedProcess:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(workplace / cache),
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }
        script, *arguments = map(str, command)
        done = subprocess.run(
            [sys.executable, str(HERE / script), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd=workplace,
            timeout=600,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run
