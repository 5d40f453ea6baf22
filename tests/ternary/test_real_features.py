"""Ternary weights of sparsity 0.9 against Gaussian ones of the same width, on features of trained networks."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from optimum_rmtkd import TernaryConfig, compress_features

from ..conftest import ROOT
from .networks import SEEDS


ROWS = 1000  # of training, and of test


@pytest.fixture
def benchmark(shared, monkeypatch):
    """The benchmark as a module; its `read` gives few rows."""
    spec = importlib.util.spec_from_file_location("ternary_benchmark", ROOT / "examples" / "benchmarks" / "ternary.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where its dataclass looks its types up
    spec.loader.exec_module(module)
    module.SHARED, read = shared, module.read
    module.read = lambda name, rows: read(name, ROWS)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("task", ["cifar10", "ag_news"])
def test_within_one_point_of_the_dense_twin(benchmark, task):
    """Means over 5 seeds, three layers of 1000."""
    found = benchmark.EXTRACTORS[task]()
    x, y, test_x, test_y = (found[name] for name in ("x", "y", "test_x", "test_y"))
    scores: dict[str, list[float]] = {"weights_only": [], "dense": []}
    for seed in SEEDS:
        for name, options in (("weights_only", {"sparsity": 0.9}), ("dense", {"storage": "dense"})):
            model = compress_features(x, y, TernaryConfig(seed=seed, **options))[0]
            scores[name].append(benchmark.accuracy(model, test_x, test_y))
    mean = {name: float(torch.tensor(values).mean()) for name, values in scores.items()}
    print(task, scores, mean)
    assert mean["weights_only"] > mean["dense"] - 0.01
    assert mean["dense"] > 0.75  # features of trained networks
