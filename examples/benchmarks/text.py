"""Accuracy of narrowed text classifiers against their teacher, over targets and seeds, with controls.

    python examples/benchmarks/text.py run --task sst2 --target 0.8 --seed 0 -o results      one run, one JSON file
    python examples/benchmarks/text.py all --task sst2 -o results                            the whole table (hours)
    python examples/benchmarks/text.py latency -o results                                    dense / narrow, CPU
    python examples/benchmarks/text.py table -o results                                      prints what is there

Data and checkpoints are looked for in RMTKD_SHARED (default ../shared). Arms:

    rmtkd        widths by budget, in two rounds above 65 % (as the tables were made; today the default is one)
    narrow       the same cut without any training
    paper        mp_quantile edge, its quantile raised until the size fits, layer by layer, shallow to deep, teacher
                 before each cut, no hidden states, no refit
    random_basis as rmtkd at the same target, uniform shares, random subspaces and neurons
    random_init  the architecture that rmtkd would find in one cut, initialised at random, distilled alike
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from controls import PAPER, RANDOM_BASIS, distil_untrained, quantile_for
from transformers import HfArgumentParser, Trainer, set_seed
from transformers.utils import logging

from optimum_rmtkd import RMTKDConfig, RMTKDTrainer, RMTKDTrainingArguments, count_parameters, narrow
from optimum_rmtkd.commands.data import DataArguments
from optimum_rmtkd.commands.task import Task, load_task
from optimum_rmtkd.models.timing import compare_latency


SHARED = Path(os.environ.get("RMTKD_SHARED", "../shared"))
TASKS = {
    "sst2": ("models/minilm_l6_sst2", "data/sst2_train.parquet", "data/sst2_validation.parquet"),
    "ag_news": (None, "data/ag_news_sub_train.parquet", "data/ag_news_test.parquet"),
}
ARMS = ("rmtkd", "narrow", "paper", "random_basis", "random_init")
CONTROLLED = 0.63
ONE_CUT_UP_TO = 0.65


@dataclass(frozen=True)
class Training:
    """Distillation after the cut, as the tables were made: in two rounds above 65 %, at a rate that is kept."""

    epochs: float
    batch_size: int
    learning_rate: float = 3e-4

    def recipe(self, target: float) -> dict[str, float]:
        """Fields of RMTKDConfig."""
        return {"rounds": 1 if target <= ONE_CUT_UP_TO else 2, "distil_learning_rate": self.learning_rate}


TRAININGS = {
    0.5: Training(0.0, 64),
    0.63: Training(1.0, 32, 1e-4),  # one epoch of 64 has few steps to recover in; what is left intact, 3e-4 disturbs
    0.8: Training(3.0, 64),
    0.9: Training(1.0, 32),
}
OF_TASK = {("ag_news", 0.8): Training(2.0, 32)}


@dataclass
class Arguments:
    """What to run."""

    action: str = field(metadata={"help": "run, all, teacher, latency or table."})
    output: str = field(default="results", metadata={"aliases": ["-o"], "help": "Folder of the result files."})
    task: str = field(default="sst2", metadata={"help": "sst2 or ag_news."})
    target: float = field(default=0.8, metadata={"help": "target_reduction."})
    seed: int = field(default=0, metadata={"help": "Seed of training, calibration and surgery."})
    arm: str = field(default="rmtkd", metadata={"help": ", ".join(ARMS)})
    epochs: float | None = field(default=None, metadata={"help": "None: as TRAININGS says for the target."})
    learning_rate: float | None = field(default=None, metadata={"help": "Peak learning rate. None: the same."})
    batch_size: int | None = field(default=None, metadata={"help": "Training batch. None: the same."})
    recipe: str = field(default="{}", metadata={"help": "JSON of RMTKDConfig fields that replace the defaults."})
    name: str = field(default="", metadata={"help": "Suffix of the result file."})


def teacher_path(task: str, output: Path) -> Path:
    """The checkpoint to narrow; AG News has none at hand, so one is fine-tuned first (action `teacher`)."""
    stored = TASKS[task][0]
    return SHARED / stored if stored else output / f"teacher_{task}"


def load(task: str, output: Path, model: str | None = None) -> Task:
    """Model and data of a task."""
    _, train, validation = TASKS[task]
    data = DataArguments(train_file=str(SHARED / train), validation_file=str(SHARED / validation), max_length=128)
    # On a CPU the backward of the fused attention takes 5 to 10 times as long in bf16.
    kernel = None if torch.cuda.is_available() else "eager"
    return load_task(model or str(teacher_path(task, output)), data, attn_implementation=kernel)


def training_of(arguments: Arguments) -> Training:
    """What the options say, else what is usual for the task and the target."""
    usual = OF_TASK.get((arguments.task, arguments.target)) or TRAININGS.get(arguments.target, Training(3.0, 64))
    if arguments.arm == "random_init":
        usual = dataclasses.replace(usual, learning_rate=3e-4)  # nothing is there that it could disturb
    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Training)}
    return dataclasses.replace(usual, **{name: value for name, value in given.items() if value is not None})


def training_arguments(arguments: Arguments, folder: Path, training: Training) -> RMTKDTrainingArguments:
    """Arguments of the trainer: the same for all arms."""
    return RMTKDTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=max(training.epochs, 1e-3),  # arms without training evaluate only
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=training.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.06,
        weight_decay=0.01,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        seed=arguments.seed,
        logging_steps=100,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def make_teacher(arguments: Arguments, output: Path) -> None:
    """Fine-tune all-MiniLM-L6-v2 on AG News, two epochs at 4e-5: the ordinary script."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = SHARED / "models/all_minilm_l6_v2"
    names = ("World", "Sports", "Business", "Sci/Tech")
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32, num_labels=4, **labels)
    folder = output / f"teacher_{arguments.task}"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    task = load(arguments.task, output, str(folder))
    args = training_arguments(arguments, folder / "run", Training(2.0, 64, 4e-5))
    trainer = Trainer(
        task.model, args, train_dataset=task.train, data_collator=task.collator, compute_metrics=task.compute_metrics
    )
    trainer.train()
    print("teacher", trainer.evaluate(task.validation))
    trainer.model.half().save_pretrained(folder)


def recipe_of(arguments: Arguments) -> RMTKDConfig:
    """The recipe of an arm."""
    common = {"target_reduction": arguments.target, "seed": arguments.seed}
    common |= training_of(arguments).recipe(arguments.target) | json.loads(arguments.recipe)
    changes = {"paper": PAPER, "random_basis": RANDOM_BASIS}.get(arguments.arm, {})
    return RMTKDConfig(**common | changes)


def accuracy(trainer: Trainer, task: Task) -> float:
    """Validation accuracy of the trainer's model now."""
    return trainer.evaluate(task.validation)["eval_accuracy"]


def run(arguments: Arguments, output: Path) -> dict:
    """One arm, one seed."""
    start = time.perf_counter()
    set_seed(arguments.seed)
    task = load(arguments.task, output)
    training = training_of(arguments)
    recipe, folder = (
        recipe_of(arguments),
        output / "runs" / f"{arguments.arm}-{arguments.target}-{arguments.seed}{arguments.name}",
    )
    before = count_parameters(task.model)
    args = training_arguments(arguments, folder, training)
    common = {"data_collator": task.collator, "compute_metrics": task.compute_metrics, "train_dataset": task.train}
    judge = Trainer(task.model, args, data_collator=task.collator, compute_metrics=task.compute_metrics)
    row = {"task": task.metric and arguments.task, "teacher": accuracy(judge, task)}
    cuts = []
    if arguments.arm == "narrow" or training.epochs == 0:
        student = narrow(judge.model, task.calibration_loader(64, arguments.seed), recipe)
        trainer = Trainer(student, args, data_collator=task.collator, compute_metrics=task.compute_metrics)
    elif arguments.arm == "random_init":
        student = narrow(judge.model, task.calibration_loader(64, arguments.seed), recipe)
        trainer = distil_untrained(student, judge.model, args, recipe, **common)
    else:
        if arguments.arm == "paper":
            tau = quantile_for(task.model, task.calibration_loader(64, recipe.seed), recipe)
            recipe = recipe.replace(tau=tau)
        trainer = RMTKDTrainer(task.model, args, rmtkd_config=recipe, eval_dataset=task.validation, **common)
        metrics = trainer.train().metrics
        cuts = [stage.to_dict() for stage in trainer.stages]
        row["train_loss"] = metrics.get("train_loss")
    row |= {
        "arm": arguments.arm,
        "target": arguments.target,
        "seed": arguments.seed,
        **dataclasses.asdict(training),
        "accuracy": accuracy(trainer, task),
        "parameters_before": before,
        "parameters_after": count_parameters(trainer.model),
        "seconds": round(time.perf_counter() - start, 1),
        "recipe": json.loads(arguments.recipe) | ({"tau": recipe.tau} if arguments.arm == "paper" else {}),
        "stages": cuts,
        "config": trainer.model.config.to_dict(),
    }
    return row


def write(row: dict, output: Path, suffix: str) -> None:
    """One result file, whole or not at all."""
    target = output / f"{row['task']}-{row['arm']}-{row['target']}-{row['seed']}{suffix}.json"
    beside = target.with_suffix(".tmp")
    beside.write_text(json.dumps(row, indent=1, default=str), encoding="utf8")
    beside.replace(target)
    lost = 100 * (row["teacher"] - row["accuracy"])
    print(f"{target.name}: {row['accuracy']:.4f}, lost {lost:.2f} points, {row['seconds']} s", flush=True)


def rows(output: Path) -> list[dict]:
    """All results there are, of this script."""
    files = sorted(file for task in TASKS for file in output.glob(f"{task}-*.json"))
    return [json.loads(file.read_text(encoding="utf8")) for file in files]


def table(output: Path) -> None:
    """Mean and spread over seeds, as points lost against the teacher."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows(output):
        key = (row["task"], row["target"], row["arm"], row["epochs"], row["batch_size"], row["learning_rate"])
        groups.setdefault(key, []).append(row)
    print(
        f"{'task':8} {'target':>6} {'removed':>8} {'arm':13} {'epochs':>6} {'batch':>5} {'lr':>7} {'seeds':>5} "
        f"{'accuracy':>9} {'lost, points':>20}"
    )
    for (task, target, arm, epochs, batch, rate), found in sorted(groups.items()):
        lost = [100 * (r["teacher"] - r["accuracy"]) for r in found]
        spread = f"{statistics.mean(lost):.2f} ({min(lost):.2f} .. {max(lost):.2f})"
        removed = statistics.mean(1 - r["parameters_after"] / r["parameters_before"] for r in found)
        mean = statistics.mean(r["accuracy"] for r in found)
        print(
            f"{task:8} {target:6} {removed:8.1%} {arm:13} {epochs:6} {batch:5} {rate:7} {len(found):5} {mean:9.4f} "
            f"{spread:>20}"
        )


def latency(output: Path, task: str) -> None:
    """Dense against each narrow architecture found (weights do not matter), fp32, length 128, batch 1 and 32."""
    import transformers

    from optimum_rmtkd import modeling_rmtkd

    found = {}
    for row in rows(output):
        if row["arm"] == "rmtkd" and row["task"] == task and row["seed"] == 0:
            config_class = modeling_rmtkd.RMTKDBertConfig
            values = {k: v for k, v in row["config"].items() if k not in ("model_type", "architectures", "auto_map")}
            narrow_model = modeling_rmtkd.RMTKDBertForSequenceClassification(config_class(**values)).eval()
            dense = transformers.BertForSequenceClassification.from_pretrained(
                teacher_path(task, output), dtype=torch.float32
            )
            for batch in (1, 32):
                ids = torch.randint(1000, 20000, (batch, 128))
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                timing = compare_latency(dense.eval(), narrow_model, inputs, repeats=40 if batch == 1 else 10)
                found[f"{row['target']}-batch{batch}"] = timing.ratio
                print(
                    f"target {row['target']}, batch {batch}: dense / narrow = {timing.ratio:.2f} "
                    f"({torch.get_num_threads()} threads)"
                )
    (output / "latency.json").write_text(json.dumps(found, indent=1), encoding="utf8")


def main() -> None:
    """Command line."""
    positional = sys.argv[1:2] if sys.argv[1:2] and not sys.argv[1].startswith("-") else []
    named = ["--action", *positional] if positional else []
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses([*named, *sys.argv[1 + len(positional) :]])
    logging.set_verbosity_error()
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    if arguments.action == "teacher":
        make_teacher(arguments, output)
    elif arguments.action == "run":
        write(run(arguments, output), output, arguments.name)
    elif arguments.action == "all":
        for target in TRAININGS:
            for seed in range(3):
                write(run(dataclasses.replace(arguments, target=target, seed=seed), output), output, "")
        for arm in ("paper", "random_basis", "random_init"):
            write(run(dataclasses.replace(arguments, target=CONTROLLED, arm=arm), output), output, "")
        table(output)
    elif arguments.action == "latency":
        latency(output, arguments.task)
    else:
        table(output)


if __name__ == "__main__":
    main()
