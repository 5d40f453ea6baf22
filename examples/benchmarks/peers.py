"""This library beside what a user would pick instead, at equal total parameters.

    python examples/benchmarks/peers.py run --targets 0.3 0.5 -o results                                no training
    python examples/benchmarks/peers.py run --targets 0.63 0.8 0.9 --steps 384 --rates 3e-5 1e-4 3e-4 --seeds 0 1 2 \
        -o results
    python examples/benchmarks/peers.py table -o results                                                Markdown

All methods get the same model, rows of calibration, training rows in the same order, steps and loss (0.7 KL to the
teacher + 0.3 cross-entropy; rows that say so: cross-entropy alone); each is shown at the best of the rates that were
tried. Points lost and divergence are of validation rows, which nothing was calibrated or trained on. `run` measures
what --output/peers.jsonl does not hold yet, one JSON line each, so an interrupted run goes on. The methods are in
`peer_methods`, each with its source. Needs RMTKD_SHARED, the folder of data and checkpoints; `pip install -e
".[peers]"` for Torch-Pruning and torchao, without which their rows are left out, with a line that says so.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from datasets import Dataset
from peer_methods import METHODS, Given, Method, OutOfReachError
from peer_methods.measures import flops, latencies, saved
from peer_methods.training import BATCH, batch_of, divergence, logits_of, train
from rates import TASKS, load_from, teacher_of
from transformers import HfArgumentParser, PreTrainedModel
from transformers.utils import logging

from optimum_rmtkd import count_parameters


REPEATS = {1: 8, 32: 1}  # pairs of blocks, by the size of the batch


@dataclass
class Arguments:
    """What to run."""

    action: str = field(metadata={"help": "run or table."})
    output: str = field(default="peers_results", metadata={"aliases": ["-o"], "help": "Folder of results."})
    tasks: list[str] = field(default_factory=lambda: ["sst2"], metadata={"help": ", ".join(TASKS)})
    targets: list[float] = field(
        default_factory=lambda: [0.5], metadata={"help": "Shares of the parameters to remove."}
    )
    methods: list[str] = field(default_factory=lambda: [*METHODS], metadata={"help": ", ".join(METHODS)})
    steps: int = field(default=0, metadata={"help": f"Batches of {BATCH}. 0: no training."})
    rates: list[float] = field(default_factory=lambda: [1e-4], metadata={"help": "Peak learning rates."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of calibration rows and training order."})
    calibration: int = field(default=1024, metadata={"help": "Rows of calibration."})
    untrained: bool = field(default=True, metadata={"help": "Measure the cut models themselves as well."})
    latency: bool = field(default=True, metadata={"help": "Time the cut models against the dense one (minutes)."})


class Bench:
    """One task: its data with the whole vocabulary and with a trimmed one, and the teacher's answers.

    Args:
        rows: of the training set, the first in a fixed random order; the same for all methods.
    """

    def __init__(self, task: str, output: Path, rows: int, calibration: int):
        self.name, self.calibration, self.rows = task, calibration, rows
        teacher = teacher_of(task, output)
        # rows in one order whatever the vocabulary: they are compared one by one
        self.task = functools.cache(lambda trim: load_from(task, teacher, trim, by_length=False))
        self.given = functools.cache(self._given)
        self.dense: PreTrainedModel = self.task(False).model.eval()
        self.before = count_parameters(self.dense)

    def training(self, trim: bool) -> Dataset:
        """The rows that are trained on: all, or the first of a fixed random order."""
        train = self.task(trim).train.shuffle(seed=0)
        return train.select(range(min(self.rows, len(train))))

    @functools.cached_property
    def answers(self) -> torch.Tensor:
        """The teacher's logits of the validation rows."""
        return logits_of(self.dense, self.task(False).validation, self.task(False).collator)

    @functools.cached_property
    def taught(self) -> torch.Tensor:
        """The teacher's logits of the training rows."""
        return logits_of(self.dense, self.training(False), self.task(False).collator)

    def _given(self, trim: bool, seed: int) -> Given:
        """What a method starts from, but for the target; the same rows, whatever the vocabulary."""
        task, size = self.task(trim), self.task(trim).model.config.vocab_size
        numbers = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed)).tolist()
        lengths = [len(ids) for ids in task.train.select(numbers[: self.calibration])["input_ids"]]
        numbers = [numbers[i] for i in sorted(range(len(lengths)), key=lengths.__getitem__)]  # less padding
        batches = [batch_of(task.train, numbers[at : at + 64], task.collator) for at in range(0, len(numbers), 64)]
        counts = torch.zeros(size, dtype=torch.float64)
        for rows in task.train.iter(4096):
            counts += torch.bincount(torch.tensor([i for ids in rows["input_ids"] for i in ids]), minlength=size)
        return Given(task.model.eval(), task.processor, batches, counts, 0.0, self.before, seed)

    def judged(self, model: PreTrainedModel, trim: bool) -> dict[str, float]:
        """Of the validation rows: points lost, KL from the teacher, agreement with it."""
        task = self.task(trim)
        ours, labels = logits_of(model, task.validation, task.collator), torch.tensor(task.validation["labels"])
        right = [float((logits.argmax(-1) == labels).double().mean()) for logits in (self.answers, ours)]
        agreement = float((ours.argmax(-1) == self.answers.argmax(-1)).double().mean())
        return {
            "teacher": 100 * right[0],
            "lost": 100 * (right[0] - right[1]),
            "divergence": float(divergence(self.answers, ours)),
            "agreement": 100 * agreement,
        }


def cut(bench: Bench, key: dict, folder: Path) -> tuple[PreTrainedModel, dict]:
    """The method's model, and what its making took; from the folder where it was made already, for it is the start of
    every training."""
    file = folder / f"{key['task']}-{key['method'].removesuffix('_fine_tuned')}-{key['target']}-{key['seed']}.pt"
    if file.is_file():
        return torch.load(file, weights_only=False)
    method = METHODS[key["method"]]
    given = dataclasses.replace(bench.given(method.trim, key["seed"]), target=key["target"] or 0.0)
    began, clock = time.process_time(), time.perf_counter()
    model = method.make(given).eval()
    took = {"cpu_seconds": time.process_time() - began, "seconds": time.perf_counter() - clock}
    if method.trains:  # what does not is wanted once, and need not be of a kind that can be pickled
        folder.mkdir(exist_ok=True)
        torch.save((model, took), beside := file.with_suffix(".tmp"))
        beside.replace(file)
    return model, took


def measured(bench: Bench, method: Method, model: PreTrainedModel) -> dict:
    """What does not depend on training."""
    found = {"parameters": count_parameters(model), "before": bench.before, "lines": method.code_lines()}
    found |= {"flops": flops(model), "dense_flops": flops(bench.dense)}
    task = bench.task(method.trim)
    return found | saved(model, task.processor, batch_of(task.validation, range(8), task.collator))


def keys(arguments: Arguments) -> Iterator[tuple[dict, list[dict]]]:
    """Of each cut its key, and those of what is to be measured: the cut, its latency, its trainings."""
    for task, target, seed, name in product(arguments.tasks, arguments.targets, arguments.seeds, arguments.methods):
        method = METHODS[name]
        key = {"task": task, "target": target if method.sized else None, "method": name, "seed": seed}
        wanted = []
        if method.distils and arguments.untrained:  # else another method made the same cut
            wanted.append(key | {"steps": 0, "rate": 0.0})
        if method.distils and arguments.latency and seed == arguments.seeds[0]:
            wanted.append(key | {"steps": 0, "threads": torch.get_num_threads()})
        if arguments.steps and method.trains and method.sized:
            wanted += [key | {"steps": arguments.steps, "rate": rate} for rate in arguments.rates]
        yield key, wanted


def rows_of(output: Path) -> list[dict]:
    file = output / "peers.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()] if file.is_file() else []


def measure(arguments: Arguments, output: Path) -> None:
    """What is not there yet."""
    bench = None
    for key, wanted in keys(arguments):
        done = rows_of(output)
        missing = [one for one in wanted if not any(one.items() <= row.items() for row in done)]
        if not missing:
            continue
        if bench is None or bench.name != key["task"]:
            bench = Bench(key["task"], output, arguments.steps * BATCH, arguments.calibration)
        for row in rows_for(bench, key, missing, output / "cuts"):
            with (output / "peers.jsonl").open("a", encoding="utf8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def rows_for(bench: Bench, key: dict, missing: list[dict], folder: Path) -> Iterator[dict]:
    """One cut, and what is missing of it."""
    method = METHODS[key["method"]]
    try:
        model, took = cut(bench, key, folder)
    except OutOfReachError as error:
        yield from (one | {"refused": str(error)} for one in missing)
        return
    except ModuleNotFoundError as error:
        print(f"{key['method']} is left out: {error}. pip install -e '.[peers]'", flush=True)
        return
    for one in missing:
        if "threads" in one:
            yield one | {"latency": latencies(bench.dense, model, REPEATS)}
        elif one["steps"]:
            yield one | trained(bench, method, model, one)
        else:
            yield one | took | bench.judged(model, method.trim) | measured(bench, method, model)


def trained(bench: Bench, method: Method, model: PreTrainedModel, key: dict) -> dict:
    """A copy of the model, distilled or fine-tuned."""
    student, task, began = copy.deepcopy(model), bench.task(method.trim), time.process_time()
    options = {name: key[name] for name in ("steps", "rate", "seed")} | {"distils": method.distils}
    train(student, bench.training(method.trim), bench.taught, task.collator, **options)
    found = {"cpu_seconds": time.process_time() - began, "parameters": count_parameters(student)}
    return found | {"before": bench.before} | bench.judged(student, method.trim)


HEAD = (
    "method", "removed", "lost", "KL", "agreement", "MB", "GFLOPs", "dense / small, batch 1, 32", "CPU s", "lines",
    "`from_pretrained` in a fresh process",
)  # fmt: skip


def table(output: Path) -> None:
    """Markdown: a table for each task, target and number of steps."""
    rows = rows_of(output)
    groups = sorted({(row["task"], row["target"] or 0.0, row["steps"]) for row in rows}, key=str)
    for task, target, steps in groups:
        found = [row for row in rows if (row["task"], row["target"] or 0.0, row["steps"]) == (task, target, steps)]
        size = f"{target:.0%} removed" if target else "methods of one size"
        print(f"\n{task}, {size}, {f'{steps} steps of {BATCH}' if steps else 'no training'}\n")
        head = (HEAD[0], HEAD[1], f"rate, seeds | {HEAD[2]}", *HEAD[3:5]) if steps else HEAD
        head = " | ".join(head)
        print(f"| {head} |\n|" + "---|" * (head.count("|") + 1))
        lines = [line_of(name, [row for row in found if row["method"] == name], steps) for name in METHODS]
        for _, cells in sorted((line for line in lines if line), key=lambda line: line[0]):
            print("| " + " | ".join(cells) + " |")


def line_of(name: str, rows: list[dict], steps: int) -> tuple[float, list[str]] | None:
    """(points lost, cells) of a method; None where it was not measured."""
    method, refused = METHODS[name], [row for row in rows if "refused" in row]
    times = next((row["latency"] for row in rows if "latency" in row), None)
    rows = [row for row in rows if "rate" in row]
    if not rows or (method.only_trained and not steps):
        return None
    if refused:
        return float("inf"), [method.title, f"out of reach: {refused[0]['refused']}"]
    by_rate = {rate: [row for row in rows if row["rate"] == rate] for rate in {row["rate"] for row in rows}}
    best = min(by_rate, key=lambda rate: (mean(by_rate[rate], "lost"), mean(by_rate[rate], "divergence")))
    rows, first = by_rate[best], by_rate[best][0]
    tried = f"{best:.0e} of {len(by_rate)}, {len(rows)}"
    cells = [method.title, f"{100 * (1 - first['parameters'] / first['before']):.1f} %", *([tried] if steps else [])]
    cells += [spread(rows, "lost", 2), spread(rows, "divergence", 3), f"{mean(rows, 'agreement'):.1f} %"]
    if not steps:
        cells += [
            f"{first['bytes'] / 1e6:.1f}" if first["bytes"] else "-",
            f"{first['flops'] / 1e9:.2f}",
            f"{times['1']:.1f}x, {times['32']:.1f}x" if times else "not measured",
            f"{mean(rows, 'cpu_seconds'):.0f}",
            str(first["lines"]),
            first["loads"],
        ]
    return mean(rows, "lost"), cells


def mean(rows: list[dict], name: str) -> float:
    return statistics.mean(row[name] for row in rows)


def spread(rows: list[dict], name: str, digits: int) -> str:
    """Mean (lowest .. highest)."""
    values = [row[name] for row in rows]
    around = f" ({min(values):.{digits}f} .. {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{around}"


def main() -> None:
    """Command line."""
    positional = sys.argv[1:2] if sys.argv[1:2] and not sys.argv[1].startswith("-") else []
    named = ["--action", *positional] if positional else []
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses([*named, *sys.argv[1 + len(positional) :]])
    for what, known, given in (("method", METHODS, arguments.methods), ("task", TASKS, arguments.tasks)):
        if unknown := [name for name in given if name not in known]:
            raise SystemExit(f"{what} {unknown[0]!r}: expected one of {', '.join(known)}.")
    logging.set_verbosity_error()
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    if arguments.action == "run":
        measure(arguments, output)
    elif arguments.action == "table":
        table(output)
    else:
        raise SystemExit(f"action {arguments.action!r}: expected run or table.")


if __name__ == "__main__":
    main()
