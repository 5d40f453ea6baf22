"""How long surgery takes, and what one-shot narrowing costs.

    python examples/benchmarks/surgery.py          both; needs RMTKD_SHARED (default ../shared)
    python examples/benchmarks/surgery.py cost     calibration against plain forward passes alone
    python examples/benchmarks/surgery.py speed    what speed_weight and round_to buy, needs a quiet machine
    python examples/benchmarks/surgery.py depth    what a basis for each depth would save over one for the whole stream

Times are ratios against the dense model in the same process.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import statistics
import time
from pathlib import Path

import torch
from transformers.utils import logging

from optimum_rmtkd import RMTKDConfig, count_parameters, narrow
from optimum_rmtkd.batches import collect_batches, model_inputs
from optimum_rmtkd.commands.data import DataArguments
from optimum_rmtkd.commands.task import Task, evaluate, load_task
from optimum_rmtkd.models.timing import compare_latency
from optimum_rmtkd.surgery.calibration import Calibration, calibrate
from optimum_rmtkd.surgery.directions import site_directions
from optimum_rmtkd.surgery.grouping import by_length
from optimum_rmtkd.surgery.surgeon import Surgeon, anatomy_of


SHARED = Path(os.environ.get("RMTKD_SHARED", "../shared"))
ARMS = {
    "default": {},
    "variance instead of the loss gradient": {"importance": "variance"},
    "no refit": {"refit": False},
    "widths by share (uniform)": {"allocation": "uniform"},
    "widths by eigenvalue over edge": {"allocation": "edge"},
    "whole word table": {"sites": ("hidden", "intermediate", "attention_vo")},
    "size alone (speed_weight=0)": {"speed_weight": 0.0},
    "random basis": {"basis": "random"},
}


def load() -> Task:
    """The fixed teacher and SST-2."""
    files = {f"{name}_file": str(SHARED / f"data/sst2_{name}.parquet") for name in ("train", "validation")}
    return load_task(str(SHARED / "models/minilm_l6_sst2"), DataArguments(**files))


def calibration_cost(task: Task) -> None:
    """Calibration without and with gradients against the forward passes alone, over the batches of the loader and over
    those that calibration makes of them."""
    config = RMTKDConfig()
    given = list(itertools.islice(task.calibration_loader(64, 0), config.calibration_samples // 64))
    points = sorted({p for s in anatomy_of(task.model, config).sites.values() for p in s.points}, key=str)
    hidden = anatomy_of(task.model, config).sites["hidden"].points

    def seconds(run, *arguments) -> float:
        start = time.perf_counter()
        run(*arguments)
        return time.perf_counter() - start

    def forward(batches) -> None:
        with torch.no_grad():
            for batch in batches:
                task.model.eval()(**model_inputs(batch))

    def moments(gradients) -> None:
        batches = by_length(task.model, collect_batches(task.model, given, config.calibration_samples), points)
        calibrate(task.model, batches, Calibration(points, gradients, config), progress=False)

    regrouped = by_length(task.model, collect_batches(task.model, given, config.calibration_samples), points)
    forward(given)
    runs = ((forward, given), (forward, regrouped), (moments, ()), (moments, hidden))
    rounds = [[seconds(*run) for run in runs] for _ in range(3)]
    print(f"calibration / forward passes, {config.calibration_samples} sentences, {torch.get_num_threads()} threads")
    for row, name in ((2, "without loss gradients"), (3, "with them")):
        plain, same = (statistics.median(times[row] / times[base] for times in rounds) for base in (0, 1))
        print(f"{name}: {plain:.2f}x over the loader's batches, {same:.2f}x over batches regrouped by length")


def speed(task: Task) -> None:
    """One cut under several worths of FLOPs: predicted loss, accuracy, dense / narrow latency at length 128."""
    surgeon = Surgeon(task.model.eval(), task.calibration_loader(64, 0), RMTKDConfig(), progress=False)
    print(
        f"{'target':>6} {'speed_weight':>12} {'round_to':>8} {'nats':>7} {'accuracy':>9} {'batch 1':>8} "
        f"{'batch 32':>8}"
    )
    for target, step, weight in itertools.product((0.63, 0.8), (8, 16), (0.0, 2.0, 4.0, 10.0)):
        surgeon.config = RMTKDConfig(target_reduction=target, speed_weight=weight, round_to=step)
        couples, curve, _ = surgeon.plan()
        student = surgeon.operate(couples)[0]
        ratios = []
        for batch in (1, 32):
            ids = torch.randint(1000, 20000, (batch, 128))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            ratios.append(compare_latency(task.model, student, inputs, repeats=12 if batch == 1 else 3).ratio)
        print(
            f"{target:6} {weight:12} {step:8} {curve[-1].predicted_loss:7.4f} {evaluate(task, student):9.4f} "
            f"{ratios[0]:8.2f} {ratios[1]:8.2f}",
            flush=True,
        )


def depth(task: Task) -> None:
    """Predicted loss of the stream's cut with one basis for all places, and with the best basis of each place."""
    surgeon = Surgeon(task.model.eval(), task.calibration_loader(64, 0), RMTKDConfig(), ("hidden",), progress=False)
    site = surgeon.anatomy.sites["hidden"]
    widths = (256, 192, 128, 96)

    def damage(points: tuple) -> list[float]:
        found = site_directions(
            surgeon.teacher,
            dataclasses.replace(site, points=points),
            surgeon.anatomy,
            surgeon.calibration,
            "signal",
        )
        return [float(found.damage[width]) for width in widths]

    common = damage(site.points)
    own = [statistics.mean(place) for place in zip(*(damage((point,)) for point in site.points), strict=True)]
    print(f"{'width':>6} {'one basis, nats':>16} {'one a place':>12} {'matrices on the skip path':>26}")
    for width, ours, theirs in zip(widths, common, own, strict=True):
        extra = (len(site.points) - 1) * width**2
        print(f"{width:6} {ours:16.4f} {theirs:12.4f} {f'{extra:,} parameters':>26}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("cost", "speed", "depth"), help="One part; none: the whole table.")
    part = parser.parse_args().part
    logging.set_verbosity_error()
    task = load()
    if part in ("speed", "depth"):
        {"speed": speed, "depth": depth}[part](task)
        return
    calibration_cost(task)
    if part == "cost":
        return
    teacher = evaluate(task, task.model)
    print(
        f"teacher {teacher:.4f}, {torch.get_num_threads()} threads\n{'one cut, no training':40} {'target':>6} "
        f"{'removed':>8} {'accuracy':>9} {'seconds':>8}"
    )
    before = count_parameters(task.model)
    for target in (0.5, 0.63, 0.8):
        for name, changes in ARMS.items():
            start = time.perf_counter()
            config = RMTKDConfig(target_reduction=target, **changes)
            student = narrow(task.model, task.calibration_loader(64, 0), config, progress=False)
            took = time.perf_counter() - start
            removed = 1 - count_parameters(student) / before
            print(f"{name:40} {target:6} {removed:8.2%} {evaluate(task, student):9.4f} {took:8.1f}", flush=True)


if __name__ == "__main__":
    main()
