"""A machine whose speed is a law: what layers take, and what models take."""

from __future__ import annotations

import pytest
from torch import nn

from optimum_rmtkd.models.timing import Latency
from optimum_rmtkd.surgery import latency, timecache


def layer_seconds(kind, widths):
    """Microseconds by the products of a layer; the others are quick."""
    if kind.name == "linear":
        return 1e-6 + 1e-10 * kind.fixed[0] * widths[0] * widths[1]
    return 1e-6 + 1e-10 * widths[0]


def model_seconds(model, power=1.0, overhead=2e-5, factor=1.5):
    """A pass of it: a multiple of what the linear layers take, to a power, and an overhead. One of 1 is a law that the
    two ends tell."""
    work = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    return overhead + factor * 1e-9 * work**power


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(power=1.0, ...): from here on time follows the law."""
    monkeypatch.setattr(timecache, "cache_folder", lambda: tmp_path / "latency")
    asked = []

    def install(noise=0.0, **law):
        def timed(points, device, dtype):
            asked.append(len(points))
            return [layer_seconds(*point) for point in points], 0.01

        def compare(before, after, inputs, repeats=12):
            slow, quick = model_seconds(before, **law), model_seconds(after, **law)
            ratio = slow / quick
            return Latency(slow, quick, ratio, ratio * (1 - noise), ratio * (1 + noise))

        monkeypatch.setattr("optimum_rmtkd.surgery.layertimes.timed", timed)
        monkeypatch.setattr(latency, "compare_latency", compare)
        return asked

    return install
