"""How long surgery takes, and what one-shot narrowing costs.

    python examples/benchmarks/surgery.py          needs RMTKD_SHARED (default ../shared); prints three tables

Times are ratios against a plain forward pass of the same model over the same batches in the same process.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import torch
from transformers.utils import logging

from optimum_rmtkd import RMTKDConfig, count_parameters, narrow
from optimum_rmtkd.commands.data import DataArguments
from optimum_rmtkd.commands.task import Task, evaluate, load_task
from optimum_rmtkd.surgery.calibration import Calibration, calibrate, collect_batches, model_inputs
from optimum_rmtkd.surgery.surgeon import anatomy_of


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
    """Calibration without and with gradients against the forward passes alone."""
    config = RMTKDConfig()
    batches = collect_batches(task.calibration_loader(64, 0), config.calibration_samples, task.model.device)
    points = sorted({p for s in anatomy_of(task.model, config).sites.values() for p in s.points}, key=str)
    hidden = anatomy_of(task.model, config).sites["hidden"].points

    def seconds(run) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                task.model.eval()(**model_inputs(batch))

    def moments(gradients) -> None:
        calibrate(task.model, batches, Calibration(points, gradients, config), progress=False)

    forward()
    rounds = [(seconds(forward), seconds(lambda: moments(())), seconds(lambda: moments(hidden))) for _ in range(3)]
    plain, fisher = (statistics.median(r[i] / r[0] for r in rounds) for i in (1, 2))
    print(
        f"calibration / forward over {config.calibration_samples} sentences: {plain:.2f}x, with loss gradients {fisher:.2f}x"
    )


def main() -> None:
    """Print the tables."""
    logging.set_verbosity_error()
    task = load()
    calibration_cost(task)
    teacher = evaluate(task, task.model)
    print(
        f"teacher {teacher:.4f}, {torch.get_num_threads()} threads\n{'one cut, no training':40} {'target':>6} {'removed':>8} {'accuracy':>9} {'seconds':>8}"
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
