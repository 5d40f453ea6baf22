from __future__ import annotations

import random

import numpy as np
import torch

from optimum_rmtkd.trainer.data import CalibrationBatches, calibration_indices, isolated_rng


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
