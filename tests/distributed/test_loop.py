"""RMTKDLoop in real processes: the script's own DDP wrapper goes on after a cut."""

from __future__ import annotations

import pytest
import torch

from .test_two_processes import in_turn, launch, same, told, widths


SCRIPT = "tests.distributed.loop_script"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    options = ("--accumulation", "2", "--batch-size", "4", "--fit-share", "0.3", "--optimizer", "adamw")
    jobs = {"whole": ("loop", *options), "resumed": ("loop", *options, "--resume", str(folder / "whole" / "step_4"))}
    in_turn(folder, jobs)
    return (*told(folder / "whole", 2), folder, options)


def test_both_processes_cut_alike_and_the_wrapper_of_the_script_trains_on(two):
    results, weights, _, _ = two
    assert [r["processes"] for r in results] == [2, 2] and results[0]["steps"] == 6
    assert results[0]["wrapped"] == "DistributedDataParallel" and results[0]["known"] == [True]
    assert results[0]["stages"] == results[1]["stages"] and len(results[0]["stages"]) == 2
    assert results[0]["metrics"] == results[1]["metrics"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    rates = [results[0]["rates"][str(step)] for step in range(1, 7)]
    assert rates[0] < 1e-3 and rates[5] == 0.0 and rates[2] > 0  # by optimizer step, though two ticks make one


def check_resumed(again, two):
    (ours, tensors), (theirs, weights, *_) = again, two
    assert ours[0]["stages"] == theirs[0]["stages"]
    same(tensors, weights)


def test_two_processes_resume_to_the_same_bits(two):
    check_resumed(told(two[2] / "resumed", 2), two)


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 1])
def test_new_processes_resume_to_the_same_bits(two, tmp_path, step):
    options = (*two[3], "--resume", str(two[2] / "whole" / f"step_{step}"))
    check_resumed(launch(tmp_path / "out", 2, *options, module=SCRIPT), two)


@pytest.mark.slow
def test_training_is_that_of_one_process_under_accumulation_too(tmp_path):
    """Neurons only: the coordinates inside a narrowed stream or head are free, and rounding may choose other ones."""
    cut = ("--sites", "intermediate", "--target", "0.15")
    (theirs,), (weights,) = launch(tmp_path / "one", 1, "--batch-size", "8", *cut, module=SCRIPT)
    for batch, accumulation in ((4, 1), (2, 2)):
        options = ("--batch-size", str(batch), "--accumulation", str(accumulation), *cut)
        results, ranks = launch(tmp_path / f"two-{accumulation}", 2, *options, module=SCRIPT)
        assert [widths(s) for s in results[0]["stages"]] == [widths(s) for s in theirs["stages"]]
        assert results[0]["rates"] == pytest.approx(theirs["rates"])
        for name, tensor in ranks[0].items():
            assert torch.equal(tensor, ranks[1][name]), name
            assert torch.allclose(tensor, weights[name], atol=1e-4), name


@pytest.mark.slow
def test_bf16_under_ddp(tmp_path):
    results, ranks = launch(tmp_path / "two", 2, "--mixed-precision", "bf16", module=SCRIPT)
    assert len(results[0]["stages"]) == 2
    assert all(torch.equal(tensor, ranks[1][name]) for name, tensor in ranks[0].items())
