"""Do the objectives help? RMT-KD at -80 % with each of them, learning rate swept for each arm.

    python examples/benchmarks/distillation.py ACTION --task sst2 -o results      or --task rte

    sweep   one seed, the learning rates around the best of each family of arms
    seeds   each arm's best rate, and the common one, 3 seeds
    once    every other arm at the common rate, one seed
    table   what has been measured so far
    run     one run: --arm opdf_3 --learning_rate 1e-4 --seed 1

Equal steps for all arms: SST-2 on 16,384 of its sentences, RTE on all. One JSON line a run in
--output/distillation.jsonl; runs that are there already are not repeated, so an interrupted sweep goes on. Needs
RMTKD_SHARED, the folder of data and checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from text import SHARED
from transformers import HfArgumentParser, Trainer, set_seed

from optimum_rmtkd import RMTKDConfig, RMTKDTrainer, RMTKDTrainingArguments
from optimum_rmtkd.commands.data import DataArguments
from optimum_rmtkd.commands.task import Task, load_task
from optimum_rmtkd.surgery import count_parameters


LOGITS = {"task": {"weight": 0.3}, "kl": {"weight": 0.7}}
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
START, LOW_START = 3e-5, 1e-5  # of the sweep; reparameterized arms take longer steps at the same rate, see opdf.py
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Setting:
    """What a task is trained with."""

    steps: int
    rows: int | None = None  # of the training set; None: all
    teacher: str | None = None  # stored checkpoint; None: fine-tuned once, by the ordinary script
    attention: str = "sdpa"  # on long rows in bf16, CPUs take 5 to 10 times as long for the backward of the fused one


TASKS = {
    "sst2": Setting(512, 16384, "models/minilm_l6_sst2"),
    "rte": Setting(156, attention="eager"),
}
TEACHER_STEPS = 390  # five epochs of RTE


def feature(projection, **options) -> dict:
    """The projected loss on every block, beside the logits."""
    name = {"projection": projection, "layers": "uniform", **options}
    return LOGITS | {"projected_feature": name}


def beside(name: str, **options) -> dict:
    """Another objective beside the logits."""
    return LOGITS | {name: options}


# Of tensor alignment. The default of 1e-3 changes nothing here: for a cut student the term starts at 0 and is measured
# relative to the weights, so it stays near 1e-6. This is of the order of L2-SP (arXiv 1802.01483).
ANCHOR = 1e3
# arm -> (objectives, reparameterization, transforms)
ARMS: dict[str, tuple] = {
    "logits": (LOGITS, None, None),
    "hidden": (LOGITS | {"hidden": {"weight": 1.0}}, None, None),  # full L2 features: the default of the recipe
    "rdimkd_random": (feature("random"), None, None),
    "rdimkd_pca": (feature("pca"), None, None),
    "rdimkd_autoencoder": (feature("autoencoder"), None, None),
    "rdimkd_rmt": (feature("marchenko_pastur"), None, None),
    "opdf_3": (LOGITS, {"name": "mpo", "num_tensors": 3}, None),
    "opdf_5": (LOGITS, {"name": "mpo", "num_tensors": 5}, None),
    "opdf_3_aligned": (beside("tensor_alignment", weight=ANCHOR), {"name": "mpo", "num_tensors": 3}, None),
    "opdf_5_aligned": (beside("tensor_alignment", weight=ANCHOR), {"name": "mpo", "num_tensors": 5}, None),
    "hidden_opdf_3": (LOGITS | {"hidden": {"weight": 1.0}}, {"name": "mpo", "num_tensors": 3}, None),
    "reverse_kl": ({"task": {"weight": 0.3}, "kl": {"weight": 0.7, "reverse": True}}, None, None),
    "jensen_shannon": ({"task": {"weight": 0.3}, "jensen_shannon": {"weight": 0.7, "rescale": True}}, None, None),
    "skew_kl": ({"task": {"weight": 0.3}, "skew_kl": {"weight": 0.7}}, None, None),
    "skew_reverse_kl": ({"task": {"weight": 0.3}, "skew_kl": {"weight": 0.7, "reverse": True}}, None, None),
    "correlation": ({"task": {"weight": 0.3}, "correlation": {"weight": 0.7, "dim": "batch"}}, None, None),
    "attention_relation": (beside("attention_relation"), None, None),
    "powerpropagation": (LOGITS, "powerpropagation", None),
    "mixup": (LOGITS, None, "embedding_mixup"),
}  # fmt: skip
# One cut, so that all arms of a seed train the same student from the first step on.
RECIPE = {"rounds": 1, "calibration_samples": 512}
# Arm -> the arm whose best learning rate it takes: variants of one loss, normalised alike, or of one parameterization.
COMPARED = {
    "logits": "logits",
    "hidden": "hidden",
    "rdimkd_rmt": "rdimkd_rmt",
    "rdimkd_random": "rdimkd_rmt",
    "rdimkd_pca": "rdimkd_rmt",
    "rdimkd_autoencoder": "rdimkd_rmt",
    "opdf_3": "opdf_3",
    "opdf_3_aligned": "opdf_3",
    "opdf_5": "opdf_3",
    "opdf_5_aligned": "opdf_3",
}


@dataclass
class Arguments:
    action: str = field(metadata={"help": "sweep, seeds, once, run or table."})
    task: str = field(default="sst2", metadata={"help": "sst2 or rte."})
    arm: str = field(default="logits", metadata={"help": "For run: " + ", ".join(ARMS) + "."})
    arms: list[str] = field(
        default_factory=list,
        metadata={
            "help": "For sweep and seeds: these arms only. A sweep of an arm that would take its rate from another "
            "gives it its own."
        },
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "For run."})
    seed: int = field(default=0, metadata={"help": "For run."})
    steps: int = field(default=0, metadata={"help": "Training steps; 0: as the task says. For trying the script out."})
    target: float = field(default=0.8, metadata={"help": "Share of the parameters removed."})
    output: str = field(default="distillation_results", metadata={"aliases": ["-o"], "help": "Folder of results."})


def data_of(task: str) -> DataArguments:
    columns = {"rte": {"text_column": ["sentence1", "sentence2"]}}.get(task, {})
    files = {name: str(SHARED / f"data/{task}_{name}.parquet") for name in ("train", "validation")}
    return DataArguments(train_file=files["train"], validation_file=files["validation"], max_length=128, **columns)


def training_arguments(folder: Path, rate: float, seed: int, steps: int) -> RMTKDTrainingArguments:
    return RMTKDTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        learning_rate=rate,
        warmup_steps=0.06,
        weight_decay=0.01,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        logging_steps=max(1, steps // 8),
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def teacher_of(task: str, output: Path) -> Path:
    """The fine-tuned model to narrow; for a task without one, all-MiniLM-L6-v2 is fine-tuned by the ordinary
    script."""
    stored = TASKS[task].teacher
    if stored:
        return SHARED / stored
    folder = output / f"teacher_{task}"
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = SHARED / "models/all_minilm_l6_v2"
    set_seed(0)
    start = output / f"start_{task}"
    AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32, num_labels=2).save_pretrained(
        start
    )
    AutoTokenizer.from_pretrained(source).save_pretrained(start)
    loaded = load_task(str(start), data_of(task), attn_implementation=TASKS[task].attention)
    args = training_arguments(folder / "run", 5e-5, 0, TEACHER_STEPS)
    trainer = Trainer(
        loaded.model,
        args,
        train_dataset=loaded.train,
        data_collator=loaded.collator,
        compute_metrics=loaded.compute_metrics,
    )
    trainer.train()
    print("teacher:", trainer.evaluate(loaded.validation)["eval_accuracy"])
    loaded.processor.save_pretrained(folder)
    trainer.model.save_pretrained(folder)
    return folder


def load(task: str, output: Path) -> Task:
    loaded = load_task(str(teacher_of(task, output)), data_of(task), attn_implementation=TASKS[task].attention)
    rows = TASKS[task].rows
    if rows is None:
        return loaded
    return dataclasses.replace(loaded, train=loaded.train.shuffle(seed=0).select(range(rows)))


def run(arguments: Arguments, arm: str, rate: float, seed: int) -> dict:
    """One arm, one rate, one seed; a row of the table."""
    output = Path(arguments.output)
    set_seed(seed)
    task = load(arguments.task, output)
    objectives, reparameterization, transforms = ARMS[arm]
    steps = arguments.steps or TASKS[arguments.task].steps
    before = count_parameters(task.model)
    trainer = RMTKDTrainer(
        model=task.model,
        args=training_arguments(output / "runs" / f"{arguments.task}-{arm}-{rate:g}-{seed}", rate, seed, steps),
        rmtkd_config=RMTKDConfig(target_reduction=arguments.target, seed=seed, **RECIPE),
        objectives=objectives,
        reparameterization=reparameterization,
        transforms=transforms,
        train_dataset=task.train,
        data_collator=task.collator,
        compute_metrics=task.compute_metrics,
    )
    seconds = []
    training_step = trainer.training_step

    def timed(*positional, **kwargs):
        start = time.perf_counter()
        loss = training_step(*positional, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        return loss

    trainer.training_step = timed
    trainer.train()
    log = trainer.state.log_history
    terms = {k: v for e in log for k, v in e.items() if k.startswith("loss/")}
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 1024 * maximum_resident()
    return {
        "task": arguments.task,
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "steps": steps,
        "target": arguments.target,
        "accuracy": trainer.evaluate(task.validation)["eval_accuracy"],
        "removed": 1 - count_parameters(trainer.model) / before,
        "seconds_per_step": statistics.median(seconds[len(seconds) // 2 :]),
        "peak_memory_gb": memory / 2**30,
        "terms": terms,
    }


def maximum_resident() -> int:
    """Kilobytes; of the process so far, so only the first run of a process says something about its arm."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def rows_of(arguments: Arguments) -> list[dict]:
    file = Path(arguments.output) / "distillation.jsonl"
    lines = file.read_text(encoding="utf8").splitlines() if file.is_file() else []
    steps = arguments.steps or TASKS[arguments.task].steps
    rows = [json.loads(line) for line in lines]
    wanted = (arguments.task, steps, arguments.target)
    return [row for row in rows if (row["task"], row["steps"], row["target"]) == wanted]


def measure(arguments: Arguments, arm: str, rate: float, seed: int) -> None:
    """One run in a process of its own (peak memory is the process's), unless it is there already."""
    done = {(row["arm"], row["learning_rate"], row["seed"]) for row in rows_of(arguments)}
    if (arm, rate, seed) in done:
        return
    options = {"task": arguments.task, "arm": arm, "learning_rate": rate, "seed": seed, "output": arguments.output}
    options |= {"steps": arguments.steps, "target": arguments.target}
    command = [sys.executable, __file__, "run", *(str(x) for k, v in options.items() for x in (f"--{k}", v))]
    subprocess.run(command, check=True)


def best_rates(rows: list[dict]) -> dict[str, float]:
    """Arm -> the rate (the larger of equals) of its highest accuracy on the first seed; its leader's, where only that
    was swept."""
    tried: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["seed"] == SEEDS[0]:
            tried.setdefault(row["arm"], {})[row["learning_rate"]] = row["accuracy"]
    own = {arm: max(rates, key=lambda rate: (rates[rate], rate)) for arm, rates in tried.items()}
    swept = {arm for arm, rates in tried.items() if len(rates) >= 3}
    return own | {arm: own[led] for arm, led in COMPARED.items() if arm not in swept and led in own}


def climb(arguments: Arguments, arm: str) -> None:
    """From the usual rate uphill, until the best rate of the arm has both its neighbours measured."""
    place = RATES.index(LOW_START if ARMS[arm][1] else START)
    while True:
        for rate in RATES[max(place - 1, 0) : place + 2]:
            measure(arguments, arm, rate, SEEDS[0])
        best = RATES.index(best_rates(rows_of(arguments))[arm])
        if best == place:
            return
        place = best


def once(arguments: Arguments) -> None:
    """The arms that are not compared in depth, at the best rate of `logits`."""
    rate = best_rates(rows_of(arguments))["logits"]
    for arm in (arm for arm in ARMS if arm not in COMPARED):
        measure(arguments, arm, rate, SEEDS[0])


def seeds(arguments: Arguments) -> None:
    """The three seeds at each arm's best rate, and at the best rate of `logits`."""
    best = best_rates(rows_of(arguments))
    for seed in SEEDS:
        for arm in (arm for arm in arguments.arms or COMPARED if arm in best):
            for rate in dict.fromkeys((best[arm], best["logits"])):
                measure(arguments, arm, rate, seed)


def table(arguments: Arguments) -> None:
    """Best against best, and at the rate that is best for logits alone. Arms of one seed start from the same
    student."""
    rows = rows_of(arguments)
    best = best_rates(rows)
    if "logits" not in best:
        raise SystemExit("Nothing measured yet for the arm 'logits': run the sweep first.")

    def by_seed(arm: str, rate: float) -> dict[int, float]:
        return {
            row["seed"]: 100 * row["accuracy"] for row in rows if (row["arm"], row["learning_rate"]) == (arm, rate)
        }

    def summary(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread} ({len(values)})" if values else "-"

    def gains(arm: str) -> str:
        ours, plain = by_seed(arm, best[arm]), by_seed("logits", best["logits"])
        found = [ours[seed] - plain[seed] for seed in sorted(ours.keys() & plain.keys())]
        return ", ".join(f"{gain:+.1f}" for gain in found)

    print(f"{arguments.task}: accuracy, mean ± standard deviation (number of seeds); common rate {best['logits']:.0e}")
    plain = [row["seconds_per_step"] for row in rows if row["arm"] == "logits"]
    print(
        "| arm | best rate | at its best rate | gain over logits, seed by seed | at the common rate | time a step / "
        "logits | peak memory, GB |"
    )
    print("|---|---|---|---|---|---|---|")
    measured = {arm: [row for row in rows if row["arm"] == arm] for arm in ARMS}
    for arm, own in ((arm, own) for arm, own in measured.items() if own):
        speed = min(row["seconds_per_step"] for row in own) / min(plain)  # the runs that shared the machine least
        memory = statistics.median(row["peak_memory_gb"] for row in own)
        cells = [
            arm,
            f"{best[arm]:.0e}",
            summary(list(by_seed(arm, best[arm]).values())),
            gains(arm),
            summary(list(by_seed(arm, best["logits"]).values())),
            f"{speed:.2f}",
            f"{memory:.2f}",
        ]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    positional = sys.argv[1:2] if sys.argv[1:2] and not sys.argv[1].startswith("-") else []
    named = ["--action", *positional] if positional else []
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses([*named, *sys.argv[1 + len(positional) :]])
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    if arguments.action == "run":
        row = run(arguments, arguments.arm, arguments.learning_rate, arguments.seed)
        with (output / "distillation.jsonl").open("a", encoding="utf8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row))
    elif arguments.action == "sweep":
        teacher_of(arguments.task, output)
        for arm in arguments.arms or dict.fromkeys(COMPARED.values()):
            climb(arguments, arm)
        table(arguments)
    elif arguments.action == "seeds":
        seeds(arguments)
        table(arguments)
    elif arguments.action == "once":
        once(arguments)
        table(arguments)
    elif arguments.action == "table":
        table(arguments)
    else:
        raise SystemExit(f"action {arguments.action!r}: expected sweep, seeds, once, run or table.")


if __name__ == "__main__":
    main()
