"""The smallest model that keeps a tolerance: by bisection, against an oracle that tries every size."""

from __future__ import annotations

import math
import random

import pytest
import torch

from optimum_rmtkd import BudgetError, NoTargetError, RMTKDConfig, RMTKDError, analyze, count_parameters, narrow
from optimum_rmtkd.surgery import allowed_loss, keeps_tolerance, narrow_within, reduce
from optimum_rmtkd.surgery import surgeon as operating
from optimum_rmtkd.surgery.planning import moves_of
from optimum_rmtkd.surgery.tolerance import bisected

from . import zoo


RECIPE = RMTKDConfig(tolerance=40, calibration_samples=16, refit=False, importance="variance", round_to=1, min_width=1)


@pytest.mark.parametrize(
    ("tolerance", "baseline", "greater", "allowed"),
    [
        (0.5, 0.9, True, 0.005),  # a share: points of a hundred
        (0.5, -0.2, True, 0.005),  # a correlation
        (0.5, 90.0, True, 0.5),  # in percent
        (2.0, 400.0, True, 8.0),  # larger: percent of it
        (5.0, 0.4, False, 0.02),  # a loss: percent of it
        (5.0, 20.0, False, 1.0),  # a perplexity
    ],
)
def test_what_points_are(tolerance, baseline, greater, allowed):
    assert allowed_loss(tolerance, baseline, greater) == pytest.approx(allowed)
    worse = -1 if greater else 1
    assert keeps_tolerance(tolerance, baseline + worse * allowed, baseline, greater)  # rounding loses nothing
    assert not keeps_tolerance(tolerance, baseline + 1.01 * worse * allowed, baseline, greater)
    assert keeps_tolerance(tolerance, baseline - worse, baseline, greater)
    assert not keeps_tolerance(tolerance, math.nan, baseline, greater)


def test_bisection_finds_what_trying_every_size_finds():
    draw = random.Random(0)
    for _ in range(300):
        sizes = sorted((draw.random() for _ in range(draw.randint(1, 60))), reverse=True)
        last, resolution, asked = draw.randint(0, len(sizes) - 1), draw.choice([0.0, 0.01, 0.1]), []
        found = bisected(sizes, lambda i, last=last, asked=asked: asked.append(i) or i <= last, resolution)
        oracle = max((i for i in range(len(sizes)) if i <= last), default=0)
        assert len(asked) == len(set(asked)) and 0 not in asked
        if found is None:  # nothing is kept, or nothing that resolution tells from the uncut model
            assert oracle == 0 or last < 1 or sizes[0] - sizes[oracle] <= resolution or 1 not in asked
            assert not [i for i in asked if i <= last]
        else:
            assert found in asked and found <= last
            assert sizes[found] - sizes[oracle] <= resolution or found == oracle


def test_few_sizes_are_asked_about():
    asked = []
    found = bisected([float(n) for n in range(1000, 0, -1)], lambda i: asked.append(i) or i <= 617, 0.0)
    assert found == 617 and len(asked) <= 11
    asked.clear()
    bisected([float(n) for n in range(1000, 0, -1)], lambda i: asked.append(i) or i <= 617, 10.0)
    assert len(asked) <= 7


def share_of(model):
    """A metric that falls with the size and with nothing else."""
    return lambda small: count_parameters(small) / count_parameters(model)


@pytest.mark.parametrize(("tolerance", "greater"), [(30, True), (60, True), (50, False)])
def test_the_smallest_model_that_keeps_the_tolerance(tolerance, greater, capsys):
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert", count=2)
    share = share_of(model)
    metric = share if greater else lambda small: 2.0 - share(small)
    small = narrow(model, data, RECIPE.replace(tolerance=tolerance), evaluate=metric, greater_is_better=greater)
    wanted = 1 - tolerance / 100
    assert wanted - 1e-9 <= share(small) <= wanted + 0.04  # to one hundredth, or a move of the stream
    table = capsys.readouterr().out
    assert table.count("taken") == 1 and "lost too much" in table and f"{count_parameters(small):,}" in table
    assert zoo.outputs(small, data[0]).isfinite().all()


def test_every_size_of_the_curve_tried_gives_no_smaller_one():
    """The slow oracle, on the true moves and the true cuts."""
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert", count=2)
    recipe = RECIPE.replace(round_to=8, min_width=8, tolerance=35)
    found, search = narrow_within(model, data, recipe, share_of(model), progress=False)
    surgeon = search.surgeon
    couples = surgeon.couples()
    widths, kept = {c.name: c.width for c in couples}, []
    for move in moves_of(surgeon, couples):
        widths[move.couple] = move.width
        student, _ = surgeon.operate(dict(widths))
        if share_of(model)(student) >= 0.65:
            kept.append(count_parameters(student))
    assert min(kept) <= found.parameters_after <= min(kept) + 0.01 * count_parameters(model)


def test_the_calibration_is_done_once_and_the_cut_is_the_usual_one(monkeypatch):
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert", count=2)
    calls, calibrate = [], operating.calibrate
    monkeypatch.setattr(operating, "calibrate", lambda *a, **k: calls.append(1) or calibrate(*a, **k))
    found, search = narrow_within(model, data, RECIPE, share_of(model), progress=False)
    assert len(calls) == 1 and len(search.path) > 3
    assert [tried is search.found for tried in search.path].count(True) == 1
    assert all(tried.student is None for tried in search.path if tried is not search.found)
    assert search.found.parameters == min(tried.parameters for tried in search.path if tried.kept)
    again = reduce(
        model, data, RECIPE.replace(tolerance=None, target_reduction=0.3999999), progress=False,
    )  # fmt: skip
    assert again.parameters_after == pytest.approx(found.parameters_after, rel=0.06)
    assert found.report.planned_parameters == found.parameters_after
    monkeypatch.undo()
    same = operating.Surgeon(model, data, RECIPE, progress=False).operate(search.found.couples)[0]
    torch.testing.assert_close(zoo.outputs(same, data[0]), zoo.outputs(found.model, data[0]))  # no trial left a trace


def test_where_no_size_keeps_it_the_path_is_told():
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert", count=2)
    metric = lambda small: 0.9 if small is model else 0.1  # noqa: E731
    with pytest.raises(BudgetError, match=r"(?s)keeps tolerance=1\.0 .*lost too much"):
        narrow(model, data, RECIPE.replace(tolerance=1), evaluate=metric, progress=False)


def test_a_metric_that_is_not_finite_of_a_narrow_model_is_lost():
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert", count=2)
    share = share_of(model)
    metric = lambda small: share(small) if share(small) > 0.8 else math.nan  # noqa: E731
    assert share(narrow(model, data, RECIPE, evaluate=metric, progress=False)) > 0.8


@pytest.mark.parametrize(
    ("evaluate", "recipe", "message"),
    [
        (None, RECIPE, "tolerance=40.0 without evaluate"),
        (lambda m: 1.0, RECIPE.replace(tolerance=None), "evaluate was given, and the recipe has no target"),
        (
            lambda m: 1.0,
            RECIPE.replace(tolerance=None, target_reduction=0.5),
            "the recipe has target_reduction=0.5: it is asked only where tolerance",
        ),
        (0.9, RECIPE, "evaluate=0.9: expected a function of a model; got a float"),
        (lambda m: None, RECIPE, "evaluate returned None: expected one number"),
        (lambda m: {"accuracy": 0.9}, RECIPE, "got a dict"),
        (lambda m: True, RECIPE, "got a bool"),
        (lambda m: math.nan, RECIPE, "evaluate returned nan for the uncut model"),
    ],
)
def test_what_cannot_say_a_size_is_refused_before_the_calibration(evaluate, recipe, message, monkeypatch):
    monkeypatch.setattr(operating, "calibrate", lambda *a, **k: pytest.fail("it was calibrated"))
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert", count=1)
    with pytest.raises(RMTKDError) as error:
        narrow(model, data, recipe, evaluate=evaluate, progress=False)
    assert message in str(error.value)


def test_a_tensor_of_one_number_is_a_number_and_the_model_is_measured_in_eval_mode():
    model, data = zoo.make("bert", "ForSequenceClassification").train(), zoo.batches("bert", count=2)
    modes, share = [], share_of(model)
    narrow(model, data, RECIPE, evaluate=lambda m: modes.append(m.training) or torch.tensor(share(m)), progress=False)
    assert modes and not any(modes) and model.training


def test_analyze_shows_the_curve_and_reduce_asks_for_a_size():
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert", count=2)
    report = analyze(model, data, RECIPE, progress=False)
    assert "a size is found by measuring" in report.note and report.planned_parameters == count_parameters(model)
    with pytest.raises(NoTargetError, match="a size is found by measuring"):
        reduce(model, data, RECIPE, progress=False)
