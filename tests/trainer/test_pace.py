"""Which rate a stage begins with, by what the model is."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from optimum_rmtkd.config import RMTKDConfig
from optimum_rmtkd.trainer.pace import Pace

from .conftest import tiny_bert
from .test_language_models import tiny_llama


def begun(model, rate=1e-3, **recipe):
    host = SimpleNamespace(model=model, rate=rate, follows_phases=True, max_steps=100, step=0, reschedule=lambda: None)
    pace = Pace(host, RMTKDConfig(target_reduction=0.8, **recipe))
    pace.begin(0)
    return pace


@pytest.fixture(autouse=True)
def told(caplog):
    caplog.set_level(logging.WARNING)
    return caplog


def test_a_classifier_is_held_to_the_rule(told):
    pace = begun(tiny_bert())
    pace.suit(0.8, 100)
    assert pace.rate < 1e-4 and "the highest that 80%" in told.text and "100 steps are few" in told.text


def test_a_language_model_keeps_the_rate_that_was_given(told):
    pace = begun(tiny_llama())
    pace.suit(0.8, 100)
    assert pace.rate == pytest.approx(1e-3) and "measured on encoders" in told.text and "are few" not in told.text


def test_a_rate_of_the_recipe_is_taken_by_both():
    for model in (tiny_bert(), tiny_llama()):
        pace = begun(model, distil_learning_rate=5e-4)
        pace.suit(0.8, 100)
        assert pace.rate == pytest.approx(5e-4)
