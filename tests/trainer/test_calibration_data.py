from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from optimum_rmtkd import CalibrationError, RMTKDError, surgery
from optimum_rmtkd.trainer.data import CalibrationBatches, calibration_indices, isolated_rng

from .conftest import tiny_bert, toy_data


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def collate(items):
    return {"x": torch.tensor(items), "noise": torch.rand(len(items))}


def test_isolated_rng_neither_reads_nor_moves_the_states_outside():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [draw(), draw()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    got = [draw()]
    with isolated_rng(7):
        inside = draw()
    got.append(draw())
    with isolated_rng(7):
        assert draw() == inside
    assert got == expected


def test_shuffle_is_seeded_and_distinct():
    chosen = calibration_indices(100, 20, seed=3)
    assert chosen == calibration_indices(100, 20, seed=3) != calibration_indices(100, 20, seed=4)
    assert len(set(chosen)) == 20 and calibration_indices(5, 20, 0) != list(range(20))


def test_batches_are_the_same_in_every_pass_and_leave_the_generators_alone():
    batches = CalibrationBatches(list(range(10)), collate, 4, seed=5)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = list(batches), list(batches)
    assert torch.equal(before, torch.get_rng_state())
    assert len(batches) == len(first) == 3
    assert all(torch.equal(a["noise"], b["noise"]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0]["noise"], first[1]["noise"])


def test_processes_share_out_the_very_same_batches():
    alone = list(CalibrationBatches(list(range(22)), collate, 4))
    ranks = [list(CalibrationBatches(list(range(22)), collate, 4, process_index=r, num_processes=2)) for r in range(2)]
    assert all(torch.equal(a["noise"], b["noise"]) for a, b in zip(alone[0::2], ranks[0], strict=True))
    assert all(torch.equal(a["noise"], b["noise"]) for a, b in zip(alone[1::2], ranks[1], strict=True))


def test_no_process_is_left_without_data():
    parts = [list(CalibrationBatches(list(range(5)), collate, 8, process_index=r, num_processes=4)) for r in range(4)]
    assert all(parts) and sum(len(b["x"]) for part in parts for b in part) == 5


# Before a training begins


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row | {name: row[name].repeat(4) for name in ("input_ids", "attention_mask")},
         r"has 40 tokens, BertForSequenceClassification has positions for 32: .*max_length=32"),
        (lambda row: row | {"input_ids": row["input_ids"] + 60}, "token id .* has 60 rows"),
        (lambda row: row | {"input_ids": row["input_ids"].float()}, "input_ids .* float32 .*torch.long"),
        (lambda row: row | {"token_type_ids": row["input_ids"]}, "token_type_ids up to .* has 2 types"),
    ],
)  # fmt: skip
def test_data_that_cannot_calibrate_is_refused_before_the_first_step(make_trainer, change, said):
    model = tiny_bert()
    data = [change(row) for row in toy_data()]
    recipe = {"schedule": "rounds", "rounds": 2}
    trainer = make_trainer(model, recipe, trainer_kwargs={"train_dataset": data, "eval_dataset": None})
    with pytest.raises(CalibrationError, match=said):
        trainer.train()
    assert trainer.state.global_step == 0 and not trainer.stages and trainer.model is model


def test_data_is_not_tried_out_where_nothing_is_cut(make_trainer, monkeypatch):
    tried = []
    monkeypatch.setattr(surgery, "check_data", lambda *given: tried.append(given))
    recipe = {"schedule": "none", "target_reduction": None}
    make_trainer(recipe=recipe, teacher_model=tiny_bert(seed=3), max_steps=1).train()
    assert not tried


def test_a_process_without_a_sample_is_told_so(make_trainer, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(trainer.run.host, "calibration_batches", lambda *_, **__: [])
    with pytest.raises(RMTKDError, match="fewer rows than the 1 processes of this run; expected at least one"):
        trainer.train()


def test_trying_out_changes_neither_the_model_nor_the_random_numbers(make_trainer, weights):
    trainer = make_trainer()
    trainer.model.train()
    before, state = weights(trainer.model), torch.get_rng_state()
    trainer.check_first_batch()
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in trainer.model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer.model).items())


ROWS = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": 0}, {"input_ids": [5], "labels": 1}] * 8


@pytest.mark.parametrize(
    "given, words",
    [
        ({"train_dataset": {"train": ROWS}}, ["a dict with train", "one split"]),
        ({"train_dataset": ROWS[::2], "data_collator": list}, ["is a list", "a mapping of model inputs"]),
        ({"train_dataset": [("a text", 1)] * 8}, ["fails at batch 0", "collator"]),
        (
            {"train_dataset": [row | {"attention_mask": [1] * len(row["input_ids"])} for row in ROWS]},
            ["fails at batch 0", "DataCollatorWithPadding"],
        ),
    ],
    ids=["splits", "a collator of lists", "tuples", "different lengths"],
)
def test_rows_that_make_no_batches_are_named_before_the_training(make_trainer, given, words):
    trainer = make_trainer(trainer_kwargs=given)
    with pytest.raises(RMTKDError) as caught:
        trainer.train()
    assert all(word in str(caught.value) for word in words), caught.value
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("label", [2, 7, -1])
def test_classes_that_the_model_has_not_are_refused_before_the_first_step(make_trainer, label):
    data = [row | {"labels": label} for row in toy_data()]
    trainer = make_trainer(trainer_kwargs={"train_dataset": data, "eval_dataset": None})
    with pytest.raises(
        RMTKDError, match=f"labels of a batch go from {label} to {label}; expected classes from 0 to 1"
    ):
        trainer.train()
    assert trainer.state.global_step == 0 and not trainer.stages


def test_ignored_labels_are_no_classes(make_trainer):
    data = [row | {"labels": -100 if i % 2 else 1} for i, row in enumerate(toy_data())]
    trainer = make_trainer(max_steps=1, trainer_kwargs={"train_dataset": data, "eval_dataset": None})
    assert trainer.train().global_step == 1
