"""Fit, cut and distil in one `train()`: from a checkpoint straight from pretraining, against plain fine-tuning.

    python examples/benchmarks/from_raw.py run --task sst2 --targets 0.63 0.8 --seeds 0 1 -o results
    python examples/benchmarks/from_raw.py run --task mrpc --targets 0 0.63 0.8 --seeds 0 1 2 -o results
    python examples/benchmarks/from_raw.py table -o results

all-MiniLM-L6-v2 with a new head; three epochs in all, whatever is done in them. Target 0 is a plain Trainer: the model
that is fine-tuned for as many epochs. `run` measures what --output/from_raw.jsonl does not hold yet, one JSON line
each. Needs RMTKD_SHARED, the folder of data and checkpoints.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    set_seed,
)
from transformers.utils import logging

from optimum_rmtkd import RMTKDConfig, RMTKDTrainer, RMTKDTrainingArguments, count_parameters


SHARED = Path(os.environ.get("RMTKD_SHARED", "../shared"))
PAIR = ("sentence1", "sentence2")
TASKS = {"sst2": ("sentence",), "mrpc": PAIR, "cola": ("sentence",), "rte": PAIR}
# The 408 pairs of MRPC's validation alone leave a standard error of two points.
JUDGED = {"mrpc": ("validation", "test")}


@dataclass
class Arguments:
    """What to run."""

    action: str = field(metadata={"help": "run or table."})
    output: str = field(default="from_raw_results", metadata={"aliases": ["-o"], "help": "Folder of results."})
    task: str = field(default="sst2", metadata={"help": f"One of {', '.join(TASKS)}."})
    targets: list[float] = field(default_factory=lambda: [0.63, 0.8], metadata={"help": "Shares to remove; 0: none."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of head, order of the data and cuts."})
    rate: float = field(default=5e-5, metadata={"help": "Learning rate of the script."})
    epochs: float = field(default=3.0, metadata={"help": "In all."})
    bf16: bool = field(default=False, metadata={"help": "Mixed precision."})
    fit_share: float | None = field(default=None, metadata={"help": "Share of the steps to fit; None: as decided."})
    rounds: int | None = field(default=None, metadata={"help": "Number of cuts; None: the library's default."})


def run(arguments: Arguments) -> None:
    """All combinations that are not there yet."""
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "from_raw.jsonl"
    done = {key_of(line) for line in read(file)}
    columns = TASKS[arguments.task]
    start = SHARED / "models" / "all_minilm_l6_v2"
    tokenizer = AutoTokenizer.from_pretrained(start)
    splits = {"train": ("train",), "validation": JUDGED.get(arguments.task, ("validation",))}
    files = {
        name: [str(SHARED / "data" / f"{arguments.task}_{split}.parquet") for split in found]
        for name, found in splits.items()
    }
    data = load_dataset("parquet", data_files=files)
    data = data.map(
        lambda rows: tokenizer(*(rows[name] for name in columns), truncation=True, max_length=128), batched=True
    )
    matthews = arguments.task == "cola"

    def metrics(prediction) -> dict[str, float]:
        from sklearn.metrics import matthews_corrcoef

        found, true = np.argmax(prediction.predictions, -1), prediction.label_ids
        worth = {"accuracy": float((found == true).mean())}
        return worth | ({"matthews": float(matthews_corrcoef(true, found))} if matthews else {})

    for target, seed in itertools.product(arguments.targets, arguments.seeds):
        line = {
            "task": arguments.task,
            "target": target,
            "seed": seed,
            "rate": arguments.rate,
            "epochs": arguments.epochs,
            "fit_share": arguments.fit_share,
            "rounds": arguments.rounds,
        }
        if key_of(line) in done:
            continue
        set_seed(seed)
        # On a CPU the backward of the fused attention takes twice as long in bf16.
        kernel = "eager" if arguments.bf16 and not torch.cuda.is_available() else None
        how = {"dtype": "float32", "num_labels": 2, "attn_implementation": kernel}
        model = AutoModelForSequenceClassification.from_pretrained(start, **how)
        args = RMTKDTrainingArguments(
            str(folder / f"trainer_{arguments.task}_{target}_{seed}"),
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            learning_rate=arguments.rate,
            train_sampling_strategy="group_by_length",
            bf16=arguments.bf16,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=200,
            report_to=[],
            seed=seed,
            metric_for_best_model="matthews" if matthews else "accuracy",
        )
        given = {
            "model": model,
            "args": args,
            "train_dataset": data["train"],
            "eval_dataset": data["validation"],
            "processing_class": tokenizer,
            "data_collator": DataCollatorWithPadding(tokenizer),
            "compute_metrics": metrics,
        }
        choices = {"fit_share": arguments.fit_share, "rounds": arguments.rounds}
        recipe = RMTKDConfig(target_reduction=target, seed=seed, **choices) if target else None
        trainer = RMTKDTrainer(rmtkd_config=recipe, **given) if target else Trainer(**given)
        began, before = time.time(), count_parameters(model)
        trainer.train()
        found = trainer.evaluate()
        line |= {"removed": 1 - count_parameters(trainer.model) / before, "seconds": time.time() - began}
        line |= {name: found[name] for name in ("eval_loss", "eval_accuracy", "eval_matthews") if name in found}
        line["stages"] = [stage.to_dict() | {"sites": None} for stage in getattr(trainer, "stages", [])]
        with file.open("a") as out:
            out.write(json.dumps(line) + "\n")


def key_of(line: dict) -> tuple:
    """What makes two runs the same one."""
    return tuple(line.get(name) for name in ("task", "target", "seed", "rate", "epochs", "fit_share", "rounds"))


def read(file: Path) -> list[dict]:
    """The results so far."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(arguments: Arguments) -> None:
    """Mean and spread over the seeds."""
    lines = read(Path(arguments.output) / "from_raw.jsonl")
    print(
        "| task | asked | removed | fine-tuned, just before the cut | at the end | seeds |\n|---|---|---|---|---|---|"
    )
    for task, target in sorted({(line["task"], line["target"]) for line in lines}):
        group = [line for line in lines if (line["task"], line["target"]) == (task, target)]
        name = "eval_matthews" if task == "cola" else "eval_accuracy"
        fitted = [line["stages"][0]["metrics_before"][name] for line in group if line["stages"]]
        removed = statistics.mean(line["removed"] for line in group)
        ends = [line[name] for line in group]
        print(f"| {task} | {target:.0%} | {removed:.1%} | {shown(fitted)} | {shown(ends)} | {len(group)} |")


def shown(values: list[float]) -> str:
    """Mean (least .. greatest) in points."""
    if not values:
        return "-"
    mean, least, most = (100 * f(values) for f in (statistics.mean, min, max))
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ({least:.2f} .. {most:.2f})"


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(
        ["--action", *sys.argv[1:]]
    )
    logging.set_verbosity_warning()
    {"run": run, "table": table}[arguments.action](arguments)
