"""Real processes: torchrun with gloo on the CPU. (`accelerate launch --cpu --num_processes 2` silently runs one.)"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300  # seconds
SCRIPT = "tests.distributed.train_script"
NEURONS = ("--sites", "intermediate", "--target", "0.15")


def command(processes: int, module: str, *options: str) -> subprocess.CompletedProcess:
    """Run a module to its end."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone", "-m", module]
    words = [sys.executable, *(torchrun if processes > 1 else ["-m", module]), *options]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)


def start(out: Path, processes: int, *options: str, module: str = SCRIPT) -> subprocess.CompletedProcess:
    """Run the script to its end."""
    out.mkdir()
    return command(processes, module, str(out), *options)


def told(out: Path, processes: int):
    """(results, weights), one of each per process."""
    results = [json.loads((out / f"result-{rank}.json").read_text()) for rank in range(processes)]
    return results, [torch.load(out / f"weights-{rank}.pt") for rank in range(processes)]


def launch(out: Path, processes: int, *options: str, module: str = SCRIPT):
    """Results and weights of a script in new processes, as `told`."""
    done = start(out, processes, *options, module=module)
    assert done.returncode == 0, done.stderr[-4000:]
    return told(out, processes)


def alone(out: Path, *options: str, script: str = "train"):
    """(result, weights) of a script in this process."""
    out.mkdir()
    importlib.import_module(f"tests.distributed.{script}_script").main([str(out), *options])
    (result,), (weights,) = told(out, 1)
    return result, weights


def in_turn(folder: Path, jobs: dict[str, tuple[str, ...]]) -> None:
    """Run scripts by name of their folder, (script, option, ...), one after the other in two new processes."""
    for name in jobs:
        (folder / name).mkdir()
    words = [[f"{script}_script", str(folder / name), *options] for name, (script, *options) in jobs.items()]
    (folder / "jobs.json").write_text(json.dumps(words))
    done = command(2, "tests.distributed.in_turn", str(folder / "jobs.json"))
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left: one start for all that they do."""
    folder = tmp_path_factory.mktemp("two")
    jobs = {
        "whole": ("train", "--batch-size", "4"),
        "resumed": ("train", "--batch-size", "4", "--resume", str(folder / "whole" / "run" / "checkpoint-4")),
        "neurons": ("train", "--batch-size", "2", "--accumulation", "2", *NEURONS),
        "features": ("distil", "--batch-size", "2", "--accumulation", "2"),
        "cached": ("distil", "--batch-size", "4", "--parts", "cached"),
        "policy": ("policy",),
        "policy_resumed": ("policy", "--resume", str(folder / "policy" / "run" / "checkpoint-4")),
        "broken": ("train", "--broken-rank", "1"),
    }
    in_turn(folder, jobs)
    return folder


@pytest.fixture(scope="module")
def two(folder):
    return told(folder / "whole", 2)


def widths(stage):
    return [(s["name"], s["width_before"], s["width_after"], s["rank"]) for s in stage["sites"]]


def same(ours, theirs):
    """Weights of each process, bit for bit."""
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_both_processes_make_the_same_cuts_and_end_with_the_same_weights(two):
    results, weights = two
    assert [r["processes"] for r in results] == [2, 2]
    assert results[0]["wrapped"] == "DistributedDataParallel" and results[0]["find_unused"] is False
    assert results[0]["stages"] == results[1]["stages"] and len(results[0]["stages"]) == 2
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_spectra_and_widths_are_those_of_one_process_with_twice_the_batch(two, tmp_path):
    one, _ = alone(tmp_path / "one", "--batch-size", "8")
    ours, theirs = two[0][0]["stages"][0], one["stages"][0]
    assert one["processes"] == 1
    assert widths(ours) == widths(theirs)
    assert [s["edge"] for s in ours["sites"]] == pytest.approx([s["edge"] for s in theirs["sites"]], rel=1e-6)
    assert ours["metric_cut"] == pytest.approx(theirs["metric_cut"], rel=1e-4)


def check_training(pair, one):
    (results, ranks), (theirs, weights) = pair, one
    ours = results[0]
    assert [widths(s) for s in ours["stages"]] == [widths(s) for s in theirs["stages"]]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3, abs=1e-5)
    for name, tensor in ranks[0].items():
        assert torch.allclose(tensor, weights[name], atol=1e-4), name
        assert torch.equal(tensor, ranks[1][name])


def test_training_is_that_of_one_process_under_accumulation_too(folder, tmp_path):
    """Neurons only: the coordinates inside a narrowed stream or head are free, and rounding may choose other ones."""
    check_training(told(folder / "neurons", 2), alone(tmp_path / "one", "--batch-size", "8", *NEURONS))


@pytest.mark.slow
def test_training_is_that_of_one_process(tmp_path):
    one = alone(tmp_path / "one", "--batch-size", "8", *NEURONS)
    check_training(launch(tmp_path / "two", 2, "--batch-size", "4", *NEURONS), one)


def test_two_processes_resume_to_the_same_bits(two, folder):
    results, weights = told(folder / "resumed", 2)
    assert results[0]["stages"] == two[0][0]["stages"]
    same(weights, two[1])


@pytest.mark.slow
@pytest.mark.parametrize(("whole", "options"), [("whole", ("--batch-size", "4")), ("policy", ())])
def test_new_processes_resume_to_the_same_bits(folder, tmp_path, whole, options):
    script = "policy" if whole == "policy" else "train"
    options += ("--resume", str(folder / whole / "run" / "checkpoint-4"))
    again = launch(tmp_path / "out", 2, *options, module=f"tests.distributed.{script}_script")
    results, weights = told(folder / whole, 2)
    assert again[0][0].get("stages") == results[0].get("stages")
    same(again[1], weights)


def test_what_fails_in_one_process_fails_in_all(folder):
    said = [(folder / "broken" / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert "no such column" in said[1]
    assert said[0].startswith("Another process failed, so all stop. process 1: ") and "no such column" in said[0]


def check_features(pair, one):
    (results, ranks), (theirs, weights) = pair, one
    assert [r["processes"] for r in results] == [2, 2]
    assert results[0]["losses"] == pytest.approx(theirs["losses"], rel=1e-3, abs=1e-5)
    assert len(results[0]["adapters"]) == 2 and results[0]["adapters"] == results[1]["adapters"]
    for ours, other in zip(results[0]["adapters"], theirs["adapters"], strict=True):
        # Adam scales gradients to signs: rounding may turn that of an entry near zero
        assert (torch.tensor(ours) - torch.tensor(other)).abs().mean() < 5e-3
    check_weights(ranks, weights)


def check_weights(ranks, weights):
    for name, tensor in ranks[0].items():
        assert torch.equal(tensor, ranks[1][name]), name
        assert torch.allclose(tensor, weights[name], atol=5e-3), name


def test_distillation_of_ragged_batches_is_that_of_one_process(folder, tmp_path):
    """Means over all tokens of all processes, adapters that DDP does not know, tensors that it does."""
    check_features(told(folder / "features", 2), alone(tmp_path / "one", "--batch-size", "8", script="distil"))


@pytest.mark.slow
def test_distillation_without_accumulation_is_that_of_one_process(tmp_path):
    one = alone(tmp_path / "one", "--batch-size", "8", script="distil")
    check_features(launch(tmp_path / "two", 2, "--batch-size", "4", module="tests.distributed.distil_script"), one)


def check_parts(pair, one):
    (results, ranks), (theirs, weights) = pair, one
    assert results[0]["losses"] == pytest.approx(theirs["losses"], rel=2e-3, abs=1e-5)
    assert results[0]["adapters"] == results[1]["adapters"]
    check_weights(ranks, weights)


def test_cached_answers_distil_alike_in_two_processes(folder, tmp_path):
    options = ("--batch-size", "8", "--parts", "cached")
    check_parts(told(folder / "cached", 2), alone(tmp_path / "one", *options, script="distil"))


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["divergences", "several", "words"])
def test_other_parts_distil_alike_in_two_processes(tmp_path, parts):
    one = alone(tmp_path / "one", "--batch-size", "8", "--parts", parts, script="distil")
    options = ("--batch-size", "4", "--parts", parts)
    check_parts(launch(tmp_path / "two", 2, *options, module="tests.distributed.distil_script"), one)


def test_each_process_resumes_with_its_own_samples_and_all_with_one_adapter(folder):
    whole, weights = told(folder / "policy", 2)
    assert whole[0]["buffer"] and whole[0]["buffer"] != whole[1]["buffer"]
    assert len(whole[0]["adapters"]) == 1 and whole[0]["adapters"] == whole[1]["adapters"]
    resumed, again = told(folder / "policy_resumed", 2)
    assert resumed == whole
    same(again, [weights[0], weights[0]])


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
