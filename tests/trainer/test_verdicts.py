"""How stages are judged, and the learning rate over the phases of a run: numbers in, numbers out."""

from __future__ import annotations

import json
import math

import pytest

from optimum_rmtkd.trainer.schedule import Phase, factor_at
from optimum_rmtkd.trainer.verdicts import (
    come_back,
    farther,
    fell,
    greater_is_better,
    known,
    noise,
    spoiled,
    telling,
    worse,
)


@pytest.mark.parametrize(
    ("after", "cut", "greater", "rows", "expected"),
    [
        (0.79, 0.80, True, 100, False),  # a standard error is 0.04
        (0.75, 0.80, True, 100, True),
        (0.79, 0.80, True, 100_000, True),  # 0.001, and half a point at least
        (0.797, 0.80, True, 100_000, False),
        (0.90, 0.80, True, None, False),
        (1.05, 1.0, False, None, False),  # a tenth of a loss
        (1.2, 1.0, False, None, True),
        (0.2, 1.0, False, None, False),
        (math.nan, 1.0, False, None, True),
        (math.nan, 0.8, True, None, True),
        (79.5, 80.0, True, 100, False),  # in percent
        (75.0, 80.0, True, 100, True),
        (0.85, math.nan, True, 100, False),  # a correlation of equal answers is none
    ],
)
def test_worse_than_just_after_the_cut(after, cut, greater, rows, expected):
    assert worse(after, cut, greater, rows) is expected


def test_the_noise_of_a_share_is_its_standard_error():
    assert noise(0.8, True, 872) == pytest.approx(math.sqrt(0.8 * 0.2 / 872))
    assert noise(1.0, True, 10) == 0.005 and noise(-0.1, True, 100) == noise(0.5, True, 100) == 0.05
    assert noise(80.0, True, 872) == pytest.approx(100 * noise(0.8, True, 872))


@pytest.mark.parametrize(
    ("after", "cut", "greater", "expected"),
    [
        (0.5312, 0.4519, False, False),  # at a good rate
        (0.62, 0.45, False, True),
        (0.851, 0.870, True, False),
        (0.817, 0.870, True, True),
        (81.7, 87.0, True, True),
        (math.nan, 0.9, True, True),
        (0.5, math.nan, True, False),
    ],
)
def test_spoiled_in_the_midst(after, cut, greater, expected):
    assert spoiled(after, cut, greater, 872) is expected


@pytest.mark.parametrize(("after", "expected"), [(0.5, False), (0.54, False), (0.56, True), (math.nan, True)])
def test_farther_from_the_uncut_model(after, expected):
    assert farther(after, 0.5) is expected
    assert not farther(0.04, 1e-8)  # hundredths of a nat are nothing


@pytest.mark.parametrize(("after", "cut", "expected"), [(0.6, 0.5, False), (0.65, 0.5, True), (0.09, 0.01, False)])
def test_farther_from_the_uncut_model_in_the_midst(after, cut, expected):
    assert farther(after, cut, midst=True) is expected and farther(after, cut)


@pytest.mark.parametrize(
    ("after", "cut", "rows", "expected"),
    [
        (0.80, 0.86, 1000, True),
        (0.84, 0.86, 1000, False),  # 2 points
        (0.80, 0.86, 100, False),  # twice a standard error is 0.069
        (0.80, 0.86, None, False),  # as of a hundred rows
        (0.75, 0.86, None, True),
        (75.0, 86.0, None, True),
    ],
)
def test_a_metric_that_nobody_asked_for_has_fallen_by_what_is_no_noise(after, cut, rows, expected):
    assert fell(after, cut, rows) is expected


SMALL = (
    "loss a_loss nll negative_log_likelihood cross_entropy bpc bits_per_byte false_positives false_negative_rate wer"
)
LARGE = "accuracy neg_mean_squared_error negative_loss f1_false exact_match mrr entropy"


@pytest.mark.parametrize("name", [*SMALL.split(), *LARGE.split()])
def test_the_direction_of_a_metric_is_told_by_its_name(name):
    assert greater_is_better(name) is greater_is_better(f"eval_{name}") is (name in LARGE.split())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["eval_gen_len", "eval_rouge1"], "eval_rouge1"),
        (["eval_a_accuracy", "eval_a_loss", "eval_b_loss"], "eval_a_loss"),  # the first of several sets
        (["valid_loss", "valid_accuracy"], "valid_loss"),
        (["eval_aux_loss", "eval_loss"], "eval_loss"),  # the name alone comes first
        (["eval_gen_len", "eval_mystery"], None),
    ],
)
def test_the_metric_that_says_most_is_found_by_the_last_words_of_its_name(names, expected):
    assert telling(names) == expected
    assert "eval_gen_len" not in known(names)


@pytest.mark.parametrize(
    ("value", "baseline", "greater", "chance", "expected"),
    [
        (0.82, 0.90, True, None, True),
        (0.80, 0.90, True, None, False),
        (2.14, 0.17, False, 1.79, False),  # worse than chance
        (0.9, 0.17, False, 1.79, True),
        (1.1, 0.17, False, 1.79, False),
        (0.35, 0.17, False, None, False),
        (0.33, 0.17, False, None, True),
        (0.05, 0.0, False, None, True),
        (math.nan, 0.9, True, None, False),
        (math.inf, 0.2, False, 0.7, False),
        (-17.0, -12.0, True, None, True),  # a loss with the other sign
        (-25.0, -12.0, True, None, False),
        (-0.5, -0.4, True, None, False),  # a correlation
    ],
)
def test_close_enough_to_be_cut_again(value, baseline, greater, chance, expected):
    assert come_back(value, baseline, greater, chance) is expected


def linear(steps):
    return lambda step: max(0.0, 1 - step / steps)


def test_the_schedule_runs_once_a_phase_and_warms_up_after_a_cut():
    phases = (Phase("fit", 0, 4), Phase("distil", 4, 10, 0.5, ((4, 1), (8, 3))))
    factors = [factor_at(step, phases, linear) for step in range(14)]
    warm = [0.5, 1, 1, 1, 0.25, 0.5, 0.75, 1, 1, 1]
    assert factors == pytest.approx(
        [1, 0.75, 0.5, 0.25, *(0.5 * (1 - step / 10) * w for step, w in zip(range(10), warm, strict=True))]
    )
    assert Phase.from_dict(json.loads(json.dumps(phases[1].to_dict()))) == phases[1]


@pytest.mark.parametrize("kind", [linear, lambda steps: lambda step: 1.0])
@pytest.mark.parametrize("since", [4, 9, 13])
def test_a_stage_begins_with_its_own_rate_wherever_the_schedule_stands(kind, since):
    phases = (Phase("fit", 0, 4), Phase("distil", 4, 10, 0.5, (), since))
    run = kind(10)
    assert factor_at(since, phases, kind) == pytest.approx(0.5)
    for step in range(since, 14):
        assert factor_at(step, phases, kind) == pytest.approx(0.5 * run(step - 4) / run(since - 4))


def test_a_warm_up_of_the_users_own_at_the_start_of_a_phase_reaches_the_stages_rate():
    def warming(steps):
        return lambda step: step / 2 if step < 2 else (steps - step) / (steps - 2)

    phases = (Phase("distil", 0, 10, 0.5, (), 0),)
    assert [factor_at(step, phases, warming) for step in (0, 1, 2)] == pytest.approx([0, 0.25, 0.5])
