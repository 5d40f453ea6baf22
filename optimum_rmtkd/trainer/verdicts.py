"""How a stage is judged: plain functions over numbers.

Three questions, asked of the metric that judges the stages: is it worse than just after the cut, has it come back
close enough to the uncut model for another cut, and was it lost in a way that the user must hear of?
"""

from __future__ import annotations

import math
from collections.abc import Iterable


__all__ = ["come_back", "farther", "fell", "greater_is_better", "known", "noise", "spoiled", "telling", "worse"]

SMALLER_IS_BETTER = ("negative_log_likelihood", "cross_entropy", "brier_score", "false_positives", "false_negatives")
SMALLER_IS_BETTER += ("error_rate", "false_positive_rate", "false_negative_rate", "edit_distance", "bits_per_byte")
SMALLER_IS_BETTER += ("bits_per_char", "bits_per_character", "bits_per_word", "bits_per_token")  # longer ones first
SMALLER_IS_BETTER += ("loss", "losses", "perplexity", "ppl", "error", "errors", "mse", "rmse", "mae", "mape", "wer")
SMALLER_IS_BETTER += ("cer", "ter", "eer", "nll", "bpc", "bpb", "xent", "fid")
TELLING = ("loss", "f1", "exact_match", "exact", "accuracy", "matthews_correlation", "pearson", "spearmanr", "rougel")
TELLING += ("rouge1", "bleu", "sacrebleu", "score", "perplexity", "acc", "roc_auc", "auc", "average_precision", "map")
TELLING += ("ndcg", "mrr", "mean_iou", "iou", "dice", "mcc", "kappa", "r2", "meteor", "chrf")
LOSS_NOISE = 0.1  # of a loss: it moves that much between two equally good models, and grows with their confidence
LEAST_NOISE = 0.005  # of a metric
SPOILED, SPOILED_LOSS = 0.03, 0.25  # of a metric, of a loss
LEAST_NATS = 0.05  # of a divergence
FEW_ROWS = 100  # of a validation set of unknown size, where a metric that nobody asked for is looked at
NEAR = 0.9  # of a metric's way from nothing to the uncut model's value (the paper's threshold of a stage)
NEAR_LOSS = 0.5  # of a loss's way from the uncut model's value to that of knowing nothing


def greater_is_better(name: str) -> bool:
    """Direction of a metric by the words of its name: losses, errors and perplexities are to be small, their negatives
    (neg_mean_squared_error) are not."""
    ending = next((ending for ending in SMALLER_IS_BETTER if _ends_in(name, ending)), None)
    return ending is None or bool({"neg", "negative"}.intersection(name.lower()[: -len(ending)].split("_")))


def known(names: Iterable[str]) -> list[str]:
    """Those among the metrics of an evaluation that the field has a name for, the one that says most of a model first:
    by that name alone, else by its last words (eval_<set>_accuracy, valid_loss), in the order that they have."""
    names = list(names)
    whole = [name for word in TELLING for name in names if name.lower().removeprefix("eval_") == word]
    ends = [name for word in TELLING for name in names if _ends_in(name, word)]
    return list(dict.fromkeys([*whole, *ends]))


def telling(names: Iterable[str]) -> str | None:
    """The first of them; None where none is known."""
    return next(iter(known(names)), None)


def _ends_in(name: str, words: str) -> bool:
    return name.lower() == words or name.lower().endswith(f"_{words}")


def noise(value: float, greater_is_better: bool, rows: int | None = None) -> float:
    """How far two measurements of equally good models may lie apart.

    A tenth of a loss. One standard error of a share of `rows` samples, sqrt(p (1 - p) / n), at least half a point;
    below one half (a correlation, which may be negative) as at one half. The same of a share in percent. A hundredth
    of other metrics.
    """
    if not greater_is_better:
        return LOSS_NOISE * abs(value)
    unit = 1.0 if abs(value) <= 1.0 else 100.0
    if abs(value) > unit:
        return 0.01 * abs(value)
    share = max(0.5, value / unit)
    error = math.sqrt(share * (1.0 - share) / rows) if rows else 2 * LEAST_NOISE
    return unit * max(LEAST_NOISE, error)


def worse(after: float, cut: float, greater_is_better: bool, rows: int | None = None) -> bool:
    """Is the distilled model worse than it was just after its cut, by more than the noise? NaN counts as worse, but
    not than NaN: a correlation of answers that are all the same is none."""
    if not math.isfinite(cut):
        return False
    lost = cut - after if greater_is_better else after - cut
    return not lost <= noise(cut, greater_is_better, rows)


def spoiled(after: float, cut: float, greater_is_better: bool, rows: int | None = None) -> bool:
    """The same in the midst of a run, where a stage that will end well may pass through worse moments: more than a
    quarter of a loss, or 3 points of a metric and twice its noise (docs/guides/rates.md has what was seen)."""
    if not math.isfinite(cut):
        return False
    if not greater_is_better:
        return not after - cut <= SPOILED_LOSS * abs(cut)
    points = SPOILED * (1.0 if abs(cut) <= 1.0 else max(100.0, abs(cut)))
    return not cut - after <= max(points, 2 * noise(cut, greater_is_better, rows))


def fell(after: float, cut: float, rows: int | None = None) -> bool:
    """Has a metric that nobody asked for, the greater the better, fallen by what is no noise: 3 points, and twice the
    standard error of a set of `FEW_ROWS`, where its size is unknown?"""
    return spoiled(after, cut, True, rows or FEW_ROWS)


def farther(after: float, cut: float, midst: bool = False) -> bool:
    """Is the distilled model farther from the uncut one than just after its cut, by their divergence in nats an
    answer, of which a few hundredths are nothing? In the midst of a run a quarter, and a tenth of a nat, are allowed,
    as of a loss."""
    share, least = (SPOILED_LOSS, 2 * LEAST_NATS) if midst else (LOSS_NOISE, LEAST_NATS)
    return math.isfinite(cut) and not after - cut <= max(least, share * cut)


def come_back(value: float, baseline: float, greater_is_better: bool, chance: float | None = None) -> bool:
    """Is the model close enough to what it was before the first cut to be cut again? NaN is not.

    A metric to `NEAR` of the uncut model's; a loss at most half-way to that of knowing nothing (`chance`), or, where
    that is unknown, at most twice the uncut model's. A metric below -1 that is to be great is a loss with the other
    sign (a negative log likelihood negated): no share and no correlation lies there, and it has no zero that says
    what knowing nothing is.
    """
    if greater_is_better and baseline < -1.0:
        return value >= baseline - abs(baseline)
    if greater_is_better:
        return value >= baseline - (1.0 - NEAR) * abs(baseline)
    if chance is not None and chance > baseline:
        return value <= baseline + NEAR_LOSS * (chance - baseline)
    return value <= baseline + max(abs(baseline), LOSS_NOISE)
