"""What every test may use: the shared data, fixed seeds, a fixed number of threads."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent

# No test needs a server; without this a missing file is looked up on the Hub, slowly.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data and small checkpoints: $RMTKD_SHARED, or ../shared beside the checkout."""
    folder = Path(os.environ.get("RMTKD_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no data in {folder}: set RMTKD_SHARED to the folder that holds data/ and models/")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _threads():
    """One thread unless RMTKD_TEST_THREADS says otherwise: quicker for tiny models, and the same sums everywhere."""
    import torch

    torch.set_num_threads(int(os.environ.get("RMTKD_TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def _seeds():
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
