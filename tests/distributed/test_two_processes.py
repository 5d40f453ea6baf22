"""Real processes: torchrun with gloo on the CPU. (`accelerate launch --cpu --num_processes 2` silently runs one.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300  # seconds
SCRIPT = "tests.distributed.train_script"
SLOW = partial(pytest.param, marks=pytest.mark.slow)
SHARES = pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), SLOW(4, 1)])  # of a batch of 8, in two processes


def start(out: Path, processes: int, *options: str, module: str = SCRIPT) -> subprocess.CompletedProcess:
    """Run the script to its end."""
    out.mkdir()
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone", "-m", module]
    command = [sys.executable, *(torchrun if processes > 1 else ["-m", module]), str(out), *options]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)


def launch(out: Path, processes: int, *options: str, module: str = SCRIPT):
    """(results, weights), one of each per process."""
    done = start(out, processes, *options, module=module)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads((out / f"result-{rank}.json").read_text()) for rank in range(processes)]
    return results, [torch.load(out / f"weights-{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "out"
    return (*launch(folder, 2, "--batch-size", "4"), folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("one") / "out", 1, "--batch-size", "8")


def widths(stage):
    return [(s["name"], s["width_before"], s["width_after"], s["rank"]) for s in stage["sites"]]


def test_both_processes_make_the_same_cuts_and_end_with_the_same_weights(two):
    results, weights, _ = two
    assert [r["processes"] for r in results] == [2, 2]
    assert results[0]["wrapped"] == "DistributedDataParallel" and results[0]["find_unused"] is False
    assert results[0]["stages"] == results[1]["stages"] and len(results[0]["stages"]) == 2
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_spectra_and_widths_are_those_of_one_process_with_twice_the_batch(two, one):
    ours, theirs = two[0][0]["stages"][0], one[0][0]["stages"][0]
    assert one[0][0]["processes"] == 1
    assert widths(ours) == widths(theirs)
    assert [s["edge"] for s in ours["sites"]] == pytest.approx([s["edge"] for s in theirs["sites"]], rel=1e-6)
    assert ours["metric_cut"] == pytest.approx(theirs["metric_cut"], rel=1e-4)


@SHARES
def test_training_is_that_of_one_process_under_accumulation_too(tmp_path, batch, accumulation):
    """Neurons only: the coordinates inside a narrowed stream or head are free, and rounding may choose other ones."""
    cut = ("--sites", "intermediate", "--target", "0.15")
    (theirs,), (weights,) = launch(tmp_path / "one", 1, "--batch-size", "8", *cut)
    options = ("--batch-size", str(batch), "--accumulation", str(accumulation), *cut)
    results, ranks = launch(tmp_path / "two", 2, *options)
    ours = results[0]
    assert [widths(s) for s in ours["stages"]] == [widths(s) for s in theirs["stages"]]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3, abs=1e-5)
    for name, tensor in ranks[0].items():
        assert torch.allclose(tensor, weights[name], atol=1e-4), name
        assert torch.equal(tensor, ranks[1][name])


def test_two_processes_resume_to_the_same_bits(two, tmp_path):
    checkpoint = two[2] / "run" / "checkpoint-4"
    results, weights = launch(tmp_path / "out", 2, "--batch-size", "4", "--resume", str(checkpoint))
    assert results[0]["stages"] == two[0][0]["stages"]
    for rank in range(2):
        assert all(torch.equal(tensor, two[1][rank][name]) for name, tensor in weights[rank].items())


def test_what_fails_in_one_process_fails_in_all(tmp_path):
    done = start(tmp_path / "out", 2, "--broken-rank", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    told = [(tmp_path / "out" / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert "no such column" in told[1]
    assert told[0].startswith("Another process failed, so all stop. process 1: ") and "no such column" in told[0]


@SHARES
def test_distillation_of_ragged_batches_is_that_of_one_process(tmp_path, batch, accumulation):
    """Means over all tokens of all processes, adapters that DDP does not know, tensors that it does."""
    script = "tests.distributed.distil_script"
    (theirs,), (weights,) = launch(tmp_path / "one", 1, "--batch-size", "8", module=script)
    options = ("--batch-size", str(batch), "--accumulation", str(accumulation))
    results, ranks = launch(tmp_path / "two", 2, *options, module=script)
    assert [r["processes"] for r in results] == [2, 2]
    assert results[0]["losses"] == pytest.approx(theirs["losses"], rel=1e-3, abs=1e-5)
    assert len(results[0]["adapters"]) == 2 and results[0]["adapters"] == results[1]["adapters"]
    for ours, other in zip(results[0]["adapters"], theirs["adapters"], strict=True):
        # Adam scales gradients to signs: rounding may turn that of an entry near zero
        assert (torch.tensor(ours) - torch.tensor(other)).abs().mean() < 5e-3
    for name, tensor in ranks[0].items():
        assert torch.equal(tensor, ranks[1][name]), name
        assert torch.allclose(tensor, weights[name], atol=5e-3), name


@pytest.mark.parametrize("parts", [SLOW("divergences"), "cached", SLOW("several"), SLOW("words")])
def test_other_parts_distil_alike_in_two_processes(tmp_path, parts):
    script, parts = "tests.distributed.distil_script", ("--parts", parts)
    (theirs,), (weights,) = launch(tmp_path / "one", 1, "--batch-size", "8", *parts, module=script)
    results, ranks = launch(tmp_path / "two", 2, "--batch-size", "4", *parts, module=script)
    assert results[0]["losses"] == pytest.approx(theirs["losses"], rel=2e-3, abs=1e-5)
    assert results[0]["adapters"] == results[1]["adapters"]
    for name, tensor in ranks[0].items():
        assert torch.equal(tensor, ranks[1][name]), name
        assert torch.allclose(tensor, weights[name], atol=5e-3), name


def test_each_process_resumes_with_its_own_samples_and_all_with_one_adapter(tmp_path):
    script = "tests.distributed.policy_script"
    whole, weights = launch(tmp_path / "whole", 2, module=script)
    assert whole[0]["buffer"] and whole[0]["buffer"] != whole[1]["buffer"]
    assert len(whole[0]["adapters"]) == 1 and whole[0]["adapters"] == whole[1]["adapters"]
    checkpoint = tmp_path / "whole" / "run" / "checkpoint-4"
    resumed, again = launch(tmp_path / "resumed", 2, "--resume", str(checkpoint), module=script)
    assert resumed == whole
    for rank in range(2):
        assert all(torch.equal(tensor, weights[0][name]) for name, tensor in again[rank].items())


@pytest.mark.slow
@pytest.mark.parametrize("module", ["distil", "policy", "loop"])
def test_under_load_every_process_ends_in_order(tmp_path, module):
    """Twenty runs beside two busy processes: none of them is aborted at its exit."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        for repeat in range(20):
            done = start(tmp_path / str(repeat), 2, module=f"tests.distributed.{module}_script")
            assert done.returncode == 0, done.stderr[-4000:]
    finally:
        for process in busy:
            process.kill()
