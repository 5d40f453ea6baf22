"""Which losses draw a warning, and that it says what to try."""

from __future__ import annotations

import math

import pytest

from optimum_rmtkd.surgery import divergence_warning, loss_warning


NAN = float("nan")


@pytest.mark.parametrize(
    "name, before, after, greater, warned",
    [
        ("eval_accuracy", 0.90, 0.88, True, False),
        ("eval_accuracy", 0.90, 0.86, True, True),
        ("eval_accuracy", 0.90, 0.95, True, False),
        ("eval_matthews_correlation", 0.5, -0.1, True, True),
        ("eval_f1", 88.0, 86.0, True, False),  # in percent, as for question answering
        ("eval_f1", 88.0, 84.0, True, True),
        ("eval_f1", 88.0, 0.5, True, True),
        ("eval_loss", 0.20, 0.25, False, False),
        ("eval_loss", 0.17, 2.14, False, True),
        ("eval_loss", 1.60, 4.25, False, True),  # a perplexity of 5 and 70
        ("eval_perplexity", 5.0, 5.4, False, False),
        ("eval_perplexity", 5.0, 70.0, False, True),
        ("eval_accuracy", 0.9, NAN, True, True),
        ("eval_loss", 0.2, NAN, False, True),
        ("eval_loss", 0.2, math.inf, False, True),
        ("eval_accuracy", None, 0.5, True, False),
        ("eval_accuracy", 0.9, None, True, False),
    ],
)
def test_what_counts_as_much(name, before, after, greater, warned):
    text = loss_warning(name, before, after, greater)
    assert (text is not None) == warned
    if warned:
        assert text.startswith(name) and "\n" not in text
        for thing in ("smaller reduction", "more steps", "another cut"):
            assert thing in text


@pytest.mark.parametrize(
    "nats, warned", [(None, False), (0.0, False), (0.09, False), (0.1, True), (2.6, True), (NAN, True)]
)
def test_divergences(nats, warned):
    text = divergence_warning(nats)
    assert (text is not None) == warned
    assert not warned or "smaller reduction" in text


def test_a_divergence_is_told_as_a_perplexity():
    assert "about 14 times the perplexity of a language model" in divergence_warning(math.log(14))
