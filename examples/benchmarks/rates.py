"""Which learning rate suits a cut, by the share removed and the number of steps; what a run ends with at any.

    python examples/benchmarks/rates.py run --task mrpc --targets 0.8 0.9 --epochs 1 3 --rates 0 1e-4 3e-4 -o results
    python examples/benchmarks/rates.py run --task sst2 --targets 0.8 --epochs 3 --rates 2e-5 1e-3 --rule -o results
    python examples/benchmarks/rates.py table -o results          points lost, by rate
    python examples/benchmarks/rates.py guard -o results          loss and accuracy just after each cut, and later

`run` measures every combination that --output/rates.jsonl does not hold yet, one JSON line each, so an interrupted run
goes on. Rate 0 is the same cut without training. By default a rate is held fixed; with --rule it is what the script's
arguments say, and `optimum_rmtkd.trainer.rates` decides. Needs RMTKD_SHARED, the folder of data and checkpoints; a
teacher that is not among them is fine-tuned first, by a plain Trainer.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import concatenate_datasets
from text import SHARED
from transformers import HfArgumentParser, Trainer, set_seed
from transformers.utils import logging

from optimum_rmtkd import RMTKDConfig, RMTKDTrainer, RMTKDTrainingArguments, count_parameters, narrow
from optimum_rmtkd.commands.data import DataArguments
from optimum_rmtkd.commands.task import Task, load_task


BATCH = 32
LOOKS = 4  # evaluations on the way
RECIPE = {"calibration_samples": 512}


@dataclass(frozen=True)
class Setting:
    """Data of a task, and how its teacher comes about."""

    files: tuple[str, ...]  # of the training rows, then of the validation rows, put together
    columns: tuple[str, ...] = ("sentence",)
    classes: int = 2
    rows: int | None = None  # of the training rows; None: all
    judged: int | None = None  # of the validation rows; None: all
    teacher: str | None = None  # a stored checkpoint; None: all-MiniLM-L6-v2, fine-tuned
    teacher_epochs: float = 3.0


SENTENCES = Setting(("sst2_train", "sst2_validation"), teacher="models/minilm_l6_sst2")
PAIR = ("sentence1", "sentence2")
NEWS = ("ag_news_sub_train", "ag_news_test")
TASKS = {
    "sst2": SENTENCES,
    "sst2_2k": dataclasses.replace(SENTENCES, rows=2048),
    "sst2_8k": dataclasses.replace(SENTENCES, rows=8192),
    "mrpc": Setting(("mrpc_train", "mrpc_validation", "mrpc_test"), PAIR),
    "cola": Setting(("cola_train", "cola_validation")),
    "rte": Setting(("rte_train", "rte_validation"), PAIR, teacher_epochs=5.0),
    "news": Setting(NEWS, ("text",), 4, rows=3648, judged=2000),
    "ag_news": Setting(NEWS, ("text",), 4),
}


@dataclass
class Arguments:
    """What to run."""

    action: str = field(metadata={"help": "run, table or guard."})
    output: str = field(default="rates_results", metadata={"aliases": ["-o"], "help": "Folder of results."})
    task: str = field(default="mrpc", metadata={"help": ", ".join(TASKS)})
    targets: list[float] = field(default_factory=lambda: [0.8], metadata={"help": "target_reduction."})
    epochs: list[float] = field(default_factory=lambda: [1.0], metadata={"help": "Epochs of batches of 32."})
    rates: list[float] = field(default_factory=lambda: [3e-4], metadata={"help": "Peak learning rates; 0: none."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of training, calibration and surgery."})
    rounds: int = field(default=0, metadata={"help": "Number of cuts. 0: the library's default."})
    rule: bool = field(default=False, metadata={"help": "The rates are those given by a script; the rule decides."})


def data_of(task: str, validation: str) -> DataArguments:
    setting = TASKS[task]
    files = {"train_file": setting.files[0], "validation_file": validation}
    paths = {name: str(SHARED / f"data/{file}.parquet") for name, file in files.items()}
    return DataArguments(**paths, max_length=128, text_column=list(setting.columns))


def load_from(task: str, model: str, trim: bool = False, by_length: bool = True) -> Task:
    """The rows of a task and a model for them, with `trim` of the words of the training texts alone; validation rows
    `by_length`, which saves padding, or as the files have them, whatever the words."""
    setting = TASKS[task]
    # On a CPU the backward of the fused attention takes 5 to 10 times as long in bf16.
    kernel = None if torch.cuda.is_available() else "eager"
    options = {"attn_implementation": kernel, "trim": trim}
    found = [load_task(model, data_of(task, file), **options) for file in setting.files[1:]]
    train, judged = found[0].train, concatenate_datasets([part.validation for part in found])
    if setting.rows is not None:
        train = train.shuffle(seed=0).select(range(setting.rows))
    if setting.judged is not None:
        judged = judged.shuffle(seed=0).select(range(setting.judged))
    if by_length:
        lengths = [len(ids) for ids in judged["input_ids"]]
        judged = judged.select(sorted(range(len(judged)), key=lengths.__getitem__))
    return dataclasses.replace(found[0], train=train, validation=judged)


def training_arguments(folder: Path, rate: float, epochs: float, seed: int) -> RMTKDTrainingArguments:
    return RMTKDTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=64,
        learning_rate=rate,
        warmup_steps=0.06,
        weight_decay=0.01,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        eval_strategy="steps",
        eval_steps=1 / LOOKS,
        logging_steps=1 / LOOKS,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def teacher_of(task: str, output: Path) -> str:
    """The fine-tuned model to narrow; one that is not stored is fine-tuned by the ordinary script, at 5e-5."""
    setting = TASKS[task]
    if setting.teacher:
        return str(SHARED / setting.teacher)
    folder = output / f"teacher_{task}"
    if (folder / "model.safetensors").is_file():
        return str(folder)
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    set_seed(0)
    source, start = SHARED / "models/all_minilm_l6_v2", output / f"start_{task}"
    model = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32, num_labels=setting.classes)
    model.save_pretrained(start)
    AutoTokenizer.from_pretrained(source).save_pretrained(start)
    loaded = load_from(task, str(start))
    args = training_arguments(folder / "run", 5e-5, setting.teacher_epochs, 0)
    parts = {"data_collator": loaded.collator, "compute_metrics": loaded.compute_metrics}
    trainer = Trainer(loaded.model, args, train_dataset=loaded.train, eval_dataset=loaded.validation, **parts)
    trainer.train()
    loaded.processor.save_pretrained(folder)
    trainer.model.save_pretrained(folder)
    return str(folder)


class Watched(RMTKDTrainer):
    """Keeps what every evaluation gave, those before and after the cuts included."""

    def evaluation_loop(self, *positional, **kwargs):
        output = super().evaluation_loop(*positional, **kwargs)
        values = {"step": self.state.global_step, "parameters": count_parameters(self.model)}
        self.looks = [*getattr(self, "looks", []), values | figures(output.metrics)]
        return output


def figures(metrics: dict[str, float]) -> dict[str, float]:
    """Loss and accuracy."""
    return {name: round(metrics[f"eval_{name}"], 5) for name in ("loss", "accuracy")}


def parts_of(task: Task) -> dict:
    """What every trainer of a task is given."""
    return {"data_collator": task.collator, "compute_metrics": task.compute_metrics, "eval_dataset": task.validation}


def run(task: Task, output: Path, key: dict) -> dict:
    """One cut, one rate, one seed; a row of the tables, but for the teacher."""
    start, rate, seed = time.perf_counter(), key["rate"], key["seed"]
    set_seed(seed)
    args, parts = training_arguments(output / "runs", rate, key["epochs"], seed), parts_of(task)
    model, row = copy.deepcopy(task.model), dict(key)
    fixed = None if key["rule"] or not rate else rate
    choices = {"target_reduction": key["target"], "rounds": key["rounds"] or None, "distil_learning_rate": fixed}
    config = RMTKDConfig(seed=seed, **choices, **RECIPE)
    before = count_parameters(model)
    if rate:
        trainer = Watched(model, args, rmtkd_config=config, train_dataset=task.train, **parts)
        row["train_loss"] = trainer.train().metrics["train_loss"]
        row |= {"steps": trainer.state.max_steps, "looks": trainer.looks}
        row["seconds_per_step"] = round((time.perf_counter() - start) / row["steps"], 3)
    else:
        loader = task.calibration_loader(64, seed)
        trainer, row["steps"] = Trainer(narrow(model, loader, config), args, **parts), 0
    removed = 1 - count_parameters(trainer.model) / before
    return row | {"student": figures(trainer.evaluate()), "removed": removed}


def keys(arguments: Arguments) -> list[dict]:
    """All combinations that are asked for."""
    axes = itertools.product(arguments.targets, arguments.seeds, arguments.epochs, arguments.rates)
    found = []
    for target, seed, epochs, rate in axes:
        epochs = epochs if rate else 0.0  # nothing is trained
        key = {"task": arguments.task, "target": target, "epochs": epochs, "rate": rate, "seed": seed}
        found.append(key | {"rounds": arguments.rounds if rate else 1, "rule": bool(arguments.rule and rate)})
    return found


def rows_of(output: Path) -> list[dict]:
    file = output / "rates.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()] if file.is_file() else []


def measure(arguments: Arguments, output: Path) -> None:
    """What is not there yet."""
    task = teacher = None
    for key in keys(arguments):
        if any(key.items() <= row.items() for row in rows_of(output)):
            continue
        if task is None:
            task = load_from(arguments.task, teacher_of(arguments.task, output))
            args = training_arguments(output / "runs", 0.0, 0.0, 0)
            teacher = figures(Trainer(copy.deepcopy(task.model), args, **parts_of(task)).evaluate())
        row = run(task, output, key) | {"teacher": teacher}
        with (output / "rates.jsonl").open("a", encoding="utf8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({name: value for name, value in row.items() if name != "looks"}), flush=True)


def lost(row: dict) -> float:
    """Points of accuracy below the teacher."""
    return 100 * (row["teacher"]["accuracy"] - row["student"]["accuracy"])


def table(output: Path) -> None:
    """Points lost by rate; a column is a rate, a line a cut and its steps."""
    rows = rows_of(output)
    for rule in (False, True):
        found = [row for row in rows if row["rule"] == rule and row["rate"]]
        if not found:
            continue
        rates = sorted({row["rate"] for row in found})
        print("\ngiven rate, the rule decides" if rule else "\nfixed rate")
        names = " | ".join(f"{rate:.0e}" for rate in rates)
        print(f"| set | removed | cuts | steps | teacher | cut alone | {names} |")
        print("|---|---|---|---|---|---|" + "---|" * len(rates))
        axes = ("task", "target", "rounds", "steps")
        for line in sorted({tuple(row[axis] for axis in axes) for row in found}):
            trained = [row for row in found if tuple(row[axis] for axis in axes) == line]
            alone = [row for row in rows if not row["rate"] and (row["task"], row["target"]) == line[:2]]
            cuts = len(stages(trained[0]["looks"]))
            teacher = 100 * trained[0]["teacher"]["accuracy"]
            head = [line[0], f"{line[1]:.0%}", str(cuts), str(line[3]), f"{teacher:.2f}"]
            cells = [summary([row for row in trained if row["rate"] == rate]) for rate in rates]
            print("| " + " | ".join([*head, summary(alone), *cells]) + " |")


def summary(rows: list[dict]) -> str:
    """Mean points lost (lowest .. highest)."""
    values = [lost(row) for row in rows]
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else ""
    return f"{statistics.mean(values):.1f} ({min(values):.1f} .. {max(values):.1f})"


def guard(output: Path) -> None:
    """Of each stage: loss and accuracy before its cut, just after it, at its worst look, at its end."""
    print("| set | removed | steps | rate | seed | stage | before | just after the cut | highest loss | end |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in sorted(rows_of(output), key=lambda row: (row["task"], row["target"], row.get("steps", 0), row["rate"])):
        for number, (before, stage) in enumerate(stages(row.get("looks", []))):
            worst = max(stage[1:] or stage, key=lambda look: look["loss"])
            chosen = (before, stage[0], worst, stage[-1])
            cells = [f"{look['loss']:.3f} / {100 * look['accuracy']:.1f}" for look in chosen]
            rate = f"{row['rate']:.0e}" + (", rule" if row["rule"] else "")
            line = [row["task"], f"{row['target']:.0%}", row["steps"], rate, row["seed"], number]
            print("| " + " | ".join(map(str, line + cells)) + " |")


def stages(looks: list[dict]) -> list[tuple[dict, list[dict]]]:
    """(last look before a cut, looks from just after it to the next one) of each cut."""
    groups = [list(group) for _, group in itertools.groupby(looks, key=lambda look: look["parameters"])]
    return [(before[-1], group) for before, group in itertools.pairwise(groups)]


def main() -> None:
    """Command line."""
    positional = sys.argv[1:2] if sys.argv[1:2] and not sys.argv[1].startswith("-") else []
    named = ["--action", *positional] if positional else []
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses([*named, *sys.argv[1 + len(positional) :]])
    logging.set_verbosity_error()
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    if arguments.action == "run":
        measure(arguments, output)
    elif arguments.action == "table":
        table(output)
    elif arguments.action == "guard":
        guard(output)
    else:
        raise SystemExit(f"action {arguments.action!r}: expected run, table or guard.")


if __name__ == "__main__":
    main()
