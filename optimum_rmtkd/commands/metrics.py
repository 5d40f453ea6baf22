"""The metrics by which the commands judge a model: names of scikit-learn and `evaluate`, larger is better."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import RMTKDError


if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np


__all__ = ["CLASSIFICATION", "METRICS", "REGRESSION", "choose_metric", "require_metric"]


def _accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    return float((predicted == labels).mean())


def _macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, average="macro"))


def _f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, average="binary"))


def _matthews_correlation(predicted: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predicted))


def _pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    import numpy as np

    return float(np.corrcoef(predicted, labels)[0, 1])


def _spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(predicted, labels).statistic)


CLASSIFICATION: dict[str, Callable] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews_correlation": _matthews_correlation,
}
REGRESSION: dict[str, Callable] = {"pearson": _pearson, "spearman": _spearman}
METRICS: dict[str, Callable] = CLASSIFICATION | REGRESSION
"""Functions of predictions and labels, both of shape (samples,): classes, or numbers for regression."""


def choose_metric(name: str | None, regression: bool, classes: int) -> str:
    """`name`, or the usual metric of the task: "accuracy" for classes, "pearson" for numbers.

    Raises:
        RMTKDError: `name` judges another kind of task, or the package that computes it is missing.
    """
    known = REGRESSION if regression else CLASSIFICATION
    name = name or next(iter(known))
    if name not in known:
        kind = "gives one number (regression)" if regression else f"has {classes} classes"
        raise RMTKDError(f"--metric {name}: the model {kind}; expected one of {', '.join(known)}.")
    if name == "f1" and classes != 2:
        raise RMTKDError(f"--metric f1 is for two classes, the model has {classes}; expected macro_f1.")
    require_metric(name)
    return name


def require_metric(name: str) -> None:
    """Try the metric on two samples, so that a missing package is told before any work.

    Raises:
        RMTKDError: scikit-learn (the extra `evaluate`) is not installed.
    """
    import numpy as np

    try:
        METRICS[name](np.array([0, 1]), np.array([0, 1]))
    except ImportError as error:
        raise RMTKDError(
            f"--metric {name} needs scikit-learn: pip install 'optimum-rmtkd[evaluate]' ({error})."
        ) from error
