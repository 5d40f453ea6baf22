from __future__ import annotations

import numpy as np
import pytest

from optimum_rmtkd.commands.metrics import METRICS, choose_metric
from optimum_rmtkd.errors import RMTKDError


LABELS = np.array([0, 0, 0, 1, 1, 1, 1, 1])
PREDICTED = np.array(
    [0, 0, 1, 1, 1, 1, 0, 0]
)  # 2 true negatives, 1 false positive, 3 true positives, 2 false negatives


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("accuracy", 5 / 8),
        ("f1", 6 / 9),
        ("macro_f1", (6 / 9 + 4 / 7) / 2),
        ("matthews_correlation", (3 * 2 - 1 * 2) / (4 * 5 * 3 * 4) ** 0.5),
    ],
)
def test_classes(name, expected):
    pytest.importorskip("sklearn")
    assert METRICS[name](PREDICTED, LABELS) == pytest.approx(expected, abs=1e-12)


def test_numbers():
    pytest.importorskip("scipy")
    x, y = np.array([1.0, 2.0, 3.0, 10.0]), np.array([1.0, 2.0, 4.0, 3.0])
    assert METRICS["spearman"](x, y) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert METRICS["pearson"](2 * y + 1, y) == pytest.approx(1.0)


def test_default_and_refusals():
    assert choose_metric(None, regression=False, classes=3) == "accuracy"
    assert choose_metric(None, regression=True, classes=1) == "pearson"
    with pytest.raises(RMTKDError, match="has 3 classes; expected one of accuracy"):
        choose_metric("spearman", regression=False, classes=3)
    with pytest.raises(RMTKDError, match="one number .regression.; expected one of pearson"):
        choose_metric("f1", regression=True, classes=1)
    with pytest.raises(RMTKDError, match="expected macro_f1"):
        choose_metric("f1", regression=False, classes=3)


def test_missing_package_is_told(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(RMTKDError, match=r"pip install 'optimum-rmtkd\[evaluate\]'"):
        choose_metric("f1", regression=False, classes=2)
