"""What a refit of the cut layers has learnt of its rows: divergence from the teacher on them, and on others.

    python examples/benchmarks/refit.py run --targets 0.5 0.8 --draws 5 --ridges 1e-4 1e-2 1e-1 none -o results
    python examples/benchmarks/refit.py table -o results

SST-2. A draw is another set of calibration rows; everything else of a cut stays the same within it. `run` measures
what --output/refit.jsonl does not hold yet, one JSON line each. Needs RMTKD_SHARED, the folder of data and models.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rates import load_from
from text import SHARED
from torch.utils.data import DataLoader
from transformers import HfArgumentParser
from transformers.utils import logging

from optimum_rmtkd import RMTKDConfig
from optimum_rmtkd.surgery.surgeon import Surgeon


UNSEEN = 2048  # training rows that no draw calibrates with


@dataclass
class Arguments:
    """What to run."""

    action: str = field(metadata={"help": "run or table."})
    output: str = field(default="refit_results", metadata={"aliases": ["-o"], "help": "Folder of results."})
    targets: list[float] = field(default_factory=lambda: [0.5, 0.8], metadata={"help": "Shares to remove."})
    draws: int = field(default=5, metadata={"help": "Sets of calibration rows."})
    samples: int = field(default=1024, metadata={"help": "Rows of a set."})
    ridges: list[str] = field(default_factory=lambda: ["1e-4", "none"], metadata={"help": "none: chosen by layer."})


def batches_of(task, rows) -> list[dict]:
    return list(DataLoader(task.train.select(rows), 64, collate_fn=task.collator))


@torch.no_grad()
def answers(model, batches: list[dict]) -> torch.Tensor:
    """(rows, classes) log-probabilities, fp64."""
    logits = [model(**{k: v for k, v in batch.items() if k != "labels"}).logits for batch in batches]
    return torch.cat(logits).double().log_softmax(-1)


def divergence(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """Mean KL(teacher | student) in nats."""
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def run(arguments: Arguments, output: Path) -> None:
    task = load_from("sst2", str(SHARED / "models/minilm_l6_sst2"))
    model = task.model.eval()
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0)).tolist()
    unseen = batches_of(task, order[:UNSEEN])
    judged = list(DataLoader(task.validation, 64, collate_fn=task.collator))
    labels = torch.cat([batch["labels"] for batch in judged])
    theirs = answers(model, unseen)
    for draw in range(arguments.draws):
        start = UNSEEN + draw * arguments.samples
        own, surgeon = batches_of(task, order[start : start + arguments.samples]), None
        for target in arguments.targets:
            for ridge in arguments.ridges:
                key = {"draw": draw, "samples": arguments.samples, "target": target, "ridge": ridge}
                if any(key.items() <= row.items() for row in rows_of(output)):
                    continue
                if surgeon is None:
                    config = RMTKDConfig(target_reduction=target, calibration_samples=arguments.samples)
                    surgeon = Surgeon(model, own, config, progress=False)
                value = None if ridge == "none" else float(ridge)
                surgeon.config = surgeon.config.replace(target_reduction=target, ridge=value)
                plan = surgeon.plan(target_reduction=target)
                began = time.process_time()
                student, _ = surgeon.operate(plan.couples)
                student.eval()
                row = key | {"seconds": time.process_time() - began}
                row["own"] = divergence(answers(model, own), answers(student, own))
                row["unseen"] = divergence(theirs, answers(student, unseen))
                row["accuracy"] = 100 * float((answers(student, judged).argmax(-1) == labels).double().mean())
                with (output / "refit.jsonl").open("a", encoding="utf8") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def rows_of(output: Path) -> list[dict]:
    file = output / "refit.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()] if file.is_file() else []


def table(output: Path) -> None:
    """Mean (lowest .. highest) over the draws."""
    print("| removed | rows | ridge | draws | divergence, own rows | unseen rows | accuracy |")
    print("|---|---|---|---|---|---|---|")
    rows = rows_of(output)
    for target, samples, ridge in sorted({(row["target"], row["samples"], row["ridge"]) for row in rows}):
        found = [row for row in rows if (row["target"], row["samples"], row["ridge"]) == (target, samples, ridge)]
        cells = [
            summary([row[name] for row in found], digits)
            for name, digits in (("own", 4), ("unseen", 4), ("accuracy", 2))
        ]
        print("| " + " | ".join([f"{target:.0%}", f"{samples:,}", ridge, str(len(found)), *cells]) + " |")


def summary(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})"


def main() -> None:
    """Command line."""
    positional = sys.argv[1:2] if sys.argv[1:2] and not sys.argv[1].startswith("-") else []
    named = ["--action", *positional] if positional else []
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses([*named, *sys.argv[1 + len(positional) :]])
    logging.set_verbosity_error()
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    if arguments.action == "run":
        run(arguments, output)
    elif arguments.action == "table":
        table(output)
    else:
        raise SystemExit(f"action {arguments.action!r}: expected run or table.")


if __name__ == "__main__":
    main()
