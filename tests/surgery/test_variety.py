"""Data in which nothing varies cannot calibrate a cut; data in which little does are warned of."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from optimum_rmtkd import CalibrationError, RMTKDConfig, analyze, narrow
from optimum_rmtkd.surgery import check_variety
from optimum_rmtkd.surgery.variety import ROWS, different_samples, enough_rows, extent_of, warn_of_few

from . import decoder_zoo, zoo


RECIPE = RMTKDConfig(target_reduction=0.3, round_to=4, min_width=4, calibration_samples=48, refit=False)
BLANK = {"input_ids": torch.tensor([[2, 3]] * 8), "attention_mask": torch.ones(8, 2, dtype=torch.long)}


def texts(*rows: list[int], length: int = 6) -> dict:
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(rows))}


def repeated(batch: dict, rows: int, times: int) -> list[dict]:
    return [{name: value[:rows].repeat(8, *[1] * (value.dim() - 1)) for name, value in batch.items()}] * times


@pytest.mark.parametrize("function", [narrow, analyze])
@pytest.mark.parametrize("kind", ["one", "same", "blank"])
def test_one_text_is_refused_before_the_calibration(function, kind, monkeypatch):
    monkeypatch.setattr("optimum_rmtkd.surgery.surgeon.calibrate", lambda *_, **__: pytest.fail("calibrated"))
    first = zoo.batches("bert")[0]
    data = {"one": [{k: v[:1] for k, v in first.items()}], "same": repeated(first, 1, 6), "blank": [BLANK] * 5}[kind]
    with pytest.raises(CalibrationError, match="are one sample, alone or again and again: expected samples that diff"):
        function(zoo.make("bert", "ForSequenceClassification"), data, RECIPE, progress=False)


def test_images_of_one_colour_are_refused():
    model, data = zoo.make("vit", "ForImageClassification"), zoo.batches("vit")
    flat = [batch | {"pixel_values": torch.randn(8, 1, 1, 1).expand(8, 1, 8, 8)} for batch in data]
    with pytest.raises(CalibrationError, match="are images of one colour each"):
        narrow(model, flat, RECIPE, progress=False)
    check_variety([*flat, *data])


def test_what_counts_as_different():
    assert len(different_samples([texts([5, 6], [5, 6], [5, 7])], 9)) == 2
    assert len(different_samples([texts([5, 6]), texts([5, 6], length=9)], 9)) == 1  # padding
    assert len(different_samples([texts([5, 6], [5, 6, 6])], 9)) == 2
    assert len(different_samples([texts([5], [6], [7], [8])], 3)) == 3
    half = {"inputs_embeds": torch.tensor([[[1.0]], [[1.0]], [[2.0]]], dtype=torch.bfloat16)}
    assert len(different_samples([half], 9)) == 2


def test_arrays_count_and_what_is_unknown_is_not_judged():
    arrays = {name: value.numpy() for name, value in texts([5, 6], [5, 6]).items()}
    assert len(different_samples([arrays], 9)) == 1
    check_variety([{"input_ids": [[1, 2], [1, 2]]}])
    with pytest.raises(CalibrationError, match="calibration batch is a list; expected a mapping"):
        check_variety([[1, 2]])


def test_reading_stops_at_two():
    def endless():
        yield texts([5, 6], [7])
        pytest.fail("read on")

    check_variety(endless())


def test_few_samples_are_said_once(caplog):
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert")
    with caplog.at_level(logging.WARNING, "optimum_rmtkd.surgery.variety"):
        narrow(model, repeated(data[0], 2, 5), RECIPE, progress=False)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "optimum_rmtkd.surgery.variety"]
    assert "2 different samples (48 in all), which give at most 8 of the 32 directions" in line
    caplog.clear()
    narrow(model, data, RECIPE, progress=False)
    assert not [r for r in caplog.records if r.name == "optimum_rmtkd.surgery.variety"]


@pytest.mark.parametrize(
    ("unit", "enough"), [("spaced", 2), ("sequence_mean", 8), ("token", 2)]
)  # of texts with six positions, for eight directions
def test_how_many_samples_are_enough(unit, enough, caplog):
    config = RECIPE.replace(sample_unit=unit)
    for count in (enough - 1, enough):
        caplog.clear()
        warn_of_few([texts(*([5, i] for i in range(count)))], config, 8)
        assert bool(caplog.records) == (count < enough)


def test_a_few_long_texts_of_a_language_model_are_not_called_few(caplog):
    """Half as many texts as would do at the recipe's tokens a sequence, each long enough."""
    model, data = decoder_zoo.make("llama"), decoder_zoo.batches(count=2, size=2, length=60)
    narrow(model, data, RECIPE.replace(tokens_per_sequence=4), progress=False)
    assert not [r.getMessage() for r in caplog.records if "different samples" in r.getMessage()]


def test_rows_are_counted_over_all_processes(monkeypatch):
    """The share of one process need not be as many tokens as the widest site has features: moments are summed."""
    two = SimpleNamespace(num_processes=2)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, (30, 3)])
    data = [texts([5, 6, 7], [5, 6]), texts([5])]
    assert extent_of(data) == (6, 3)
    assert extent_of(data, two) == (36, 6)
    config = enough_rows(RECIPE, 32, *extent_of(data, two))
    assert config.tokens_per_sequence == -(-ROWS * 32 // 6)
    with pytest.raises(CalibrationError, match="has 6 tokens"):
        enough_rows(RECIPE, 32, *extent_of(data))
