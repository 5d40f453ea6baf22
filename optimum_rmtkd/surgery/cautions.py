"""What is said of a cut that cost much: one sentence of what was lost, and the three things to try."""

from __future__ import annotations

import math


__all__ = ["FEW_POINTS", "MUCH", "divergence_warning", "loss_warning", "scale_of"]

FEW_POINTS = 0.03  # of a metric between 0 and 1 (or -1 and 1); 3 of one in percent
MUCH = math.log(1.1)  # nats an answer: what multiplies a perplexity by 1.1

TO_TRY = (
    "Three things to try: a smaller reduction (target_reduction); more steps of distillation, from a model that is "
    "fine-tuned first (num_train_epochs, fit_share); another cut (form='absorbed' where the family is known, fewer "
    "`sites`, more calibration_samples)."
)


def loss_warning(name: str, before: float | None, after: float | None, greater_is_better: bool) -> str | None:
    """The warning for a metric that a run lost more of than a few points; None where it did not, or is not known.

    Much is: of a metric where more is better, 3 points (0.03 of one that lies in [-1, 1], 3 of one in percent, 3 % of
    a larger one); of a loss (its name ends in "loss") log(1.1) nats, which is 10 % of the perplexity; of all others
    where less is better (a perplexity, an error) 10 % of the value before. What is not finite afterwards is lost.

    Args:
        name: of the metric, as the user knows it.
        before, after: of the uncut model, and now.
    """
    if before is None or after is None or not math.isfinite(before):
        return None
    if greater_is_better:
        lost, allowed = before - after, FEW_POINTS * scale_of(max(abs(before), abs(after)))
    else:
        lost, allowed = after - before, MUCH if name.endswith("loss") else 0.1 * abs(before)
    if lost <= allowed:
        return None
    verb = "fell" if greater_is_better else "rose"
    return f"{name} {verb} from {before:.4g} to {after:.4g}. {TO_TRY}"


def divergence_warning(nats: float | None) -> str | None:
    """The warning for a narrow model whose answers lie more than log(1.1) nats an answer from those of the uncut one
    (a language model's perplexity is then about 10 % higher); None where they do not, or it is not known."""
    if nats is None or nats <= MUCH:
        return None
    times = f", about {math.exp(nats):.2g} times the perplexity of a language model" if nats < 20 else ""
    return (
        f"The narrow model's answers are {nats:.2g} nats each from the uncut model's on calibration data (more than "
        f"{MUCH:.2g}{times}). {TO_TRY}"
    )


def scale_of(size: float) -> float:
    """What 100 points are of a metric that takes values of this size."""
    if not math.isfinite(size) or size <= 1:
        return 1.0
    return max(100.0, size)
