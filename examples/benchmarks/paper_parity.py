"""The paper's setting: a network trained from scratch, then cut layer by layer at the paper's edge while it trains on.

    python examples/benchmarks/paper_parity.py run --tasks sst2 ag_news cifar10 -o results      sizes that fit a CPU
    python examples/benchmarks/paper_parity.py run --tasks bert_base resnet50 -o results        the paper's, with a GPU
    python examples/benchmarks/paper_parity.py table -o results

RMT-KD (arXiv:2509.15724): mp_quantile edge, layer by layer from shallow to deep, teacher before each cut, a cut where
validation has come back to 90 % of where it was, 0.7 cross-entropy + 0.3 KL, AdamW at 1e-4 (text) or 1e-3 (images),
weight decay 5e-4. Its figures compare the result with the network trained from scratch, so three are given: that
network, the same trained on for as many steps as the reduction took (what more training alone would have brought), and
the reduced one. One JSON line a run in --output/paper_parity.jsonl; what is there is not repeated. Needs RMTKD_SHARED.
The two of the paper's own size report latency at batch 1 and energy a pass by NVML, and are skipped, with a line that
says why, where there is no GPU.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from controls import PAPER
from rates import load_from
from text import SHARED
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    HfArgumentParser,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    set_seed,
)
from transformers.utils import logging

from optimum_rmtkd import RMTKDConfig, RMTKDTrainer, RMTKDTrainingArguments, count_parameters
from optimum_rmtkd.models.timing import compare_latency


sys.path.insert(0, str(Path(__file__).parents[1]))
from plain_cnn import CifarResNetConfig, CifarResNetForImageClassification, images_of  # noqa: E402


# The network has been trained already, so nothing is fitted first; cuts go on for most of the training.
TRAINED = {"fit_share": 0.0, "stage_share": 0.8, "stage_threshold": 0.9}
RECIPE = PAPER | {"task_weight": 0.7, "kl_weight": 0.3} | TRAINED
BASE_VOCABULARY = "models/bert_base_uncased_vocab"
SECONDS = 5.0  # of passes under one reading of the energy


@dataclass(frozen=True)
class Setting:
    """A network and its data.

    Attributes:
        task: of the texts, as in `rates.TASKS`; None: CIFAR-10.
        shape: fields of the config.
        needs_gpu: the paper's own size.
    """

    task: str | None
    shape: dict[str, Any]
    rate: float
    batch: int
    needs_gpu: bool = False


SMALL = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
RESNET50 = {"depths": [3, 4, 6, 3], "embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048], "num_labels": 10}
SETTINGS = {
    "sst2": Setting("sst2", SMALL, 1e-4, 32),
    "ag_news": Setting("ag_news", SMALL, 1e-4, 32),
    "cifar10": Setting(None, {"depth": 20, "num_labels": 10}, 1e-3, 128),
    "bert_base": Setting("sst2", {}, 1e-4, 32, needs_gpu=True),
    "resnet50": Setting(None, RESNET50, 1e-3, 128, needs_gpu=True),
}


@dataclass
class Arguments:
    """What to run."""

    action: str = field(metadata={"help": "run or table."})
    output: str = field(default="parity_results", metadata={"aliases": ["-o"], "help": "Folder of results."})
    tasks: list[str] = field(default_factory=lambda: ["sst2"], metadata={"help": ", ".join(SETTINGS)})
    rows: int = field(default=0, metadata={"help": "Training rows. 0: all."})
    judged: int = field(default=0, metadata={"help": "Validation rows. 0: all."})
    epochs: float = field(default=5.0, metadata={"help": "Of training from scratch, and again of the reduction."})
    tau: float = field(default=0.5, metadata={"help": "Quantile of the paper's edge; it reports 0.4 to 0.6."})
    calibration: int = field(default=1024, metadata={"help": "Rows of calibration (paper: a tenth of them)."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of weights, order and calibration."})


@dataclass
class Parts:
    """A network of random weights, and what a Trainer needs beside it."""

    model: PreTrainedModel
    train: Any
    validation: Any
    collator: Callable
    compute_metrics: Callable


class Images(torch.utils.data.Dataset):
    """Pixels and labels as rows."""

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor):
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def texts(setting: Setting, arguments: Arguments, folder: Path) -> Parts:
    """A BERT of random weights and its texts."""
    config = BertConfig(vocab_size=30522, num_labels=4 if setting.task == "ag_news" else 2, **setting.shape)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHARED / BASE_VOCABULARY).save_pretrained(folder)
    task = load_from(setting.task, str(folder))
    train, validation = task.train.shuffle(seed=0), task.validation
    train = train.select(range(min(arguments.rows or len(train), len(train))))
    validation = validation.shuffle(seed=0).select(range(min(arguments.judged or len(validation), len(validation))))
    return Parts(task.model, train, validation, task.collator, task.compute_metrics)


def images(setting: Setting, arguments: Arguments) -> Parts:
    """A ResNet of random weights and CIFAR-10."""
    from transformers import default_data_collator

    made = {"train": arguments.rows or 50_000, "test": arguments.judged or 10_000}
    train, validation = (Images(*images_of(SHARED / "data", part, count)) for part, count in made.items())
    if setting.needs_gpu:
        model = ResNetForImageClassification(ResNetConfig(**setting.shape))
    else:
        model = CifarResNetForImageClassification(CifarResNetConfig(**setting.shape))

    def accuracy(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    return Parts(model, train, validation, default_data_collator, accuracy)


def arguments_of(setting: Setting, arguments: Arguments, folder: Path, seed: int) -> RMTKDTrainingArguments:
    return RMTKDTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=setting.batch,
        per_device_eval_batch_size=64,
        learning_rate=setting.rate,
        weight_decay=5e-4,
        warmup_steps=0.06,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        eval_strategy="epoch",
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def run(name: str, arguments: Arguments, output: Path, seed: int) -> dict:
    """From scratch; on for as long; reduced."""
    setting, began = SETTINGS[name], time.perf_counter()
    set_seed(seed)
    folder = output / f"parity_{name}_{seed}"
    parts = images(setting, arguments) if setting.task is None else texts(setting, arguments, folder / "start")
    args, common = arguments_of(setting, arguments, folder, seed), {"eval_dataset": parts.validation}
    common |= {"train_dataset": parts.train, "data_collator": parts.collator, "compute_metrics": parts.compute_metrics}
    first = Trainer(parts.model, args, **common)
    first.train()
    dense, found = first.model, {"from_scratch": first.evaluate()["eval_accuracy"]}
    longer = Trainer(type(dense)(dense.config), args, **common)
    longer.model.load_state_dict(dense.state_dict())
    longer.train()
    found["as_long"] = longer.evaluate()["eval_accuracy"]
    recipe = RMTKDConfig(tau=arguments.tau, calibration_samples=arguments.calibration, seed=seed, **RECIPE)
    trainer = RMTKDTrainer(type(dense)(dense.config), args, rmtkd_config=recipe, **common)
    trainer.model.load_state_dict(dense.state_dict())
    trainer.train()
    found["reduced"] = trainer.evaluate()["eval_accuracy"]
    small, steps = trainer.model.eval(), trainer.state.max_steps
    found |= {"before": count_parameters(dense), "after": count_parameters(small), "steps": steps}
    found |= {"stages": len(trainer.stages), "rows": len(parts.train), "judged": len(parts.validation)}
    inputs = {key: value.to(small.device) for key, value in parts.collator([parts.validation[0]]).items()}
    inputs.pop("labels")
    found["latency"] = compare_latency(dense.to(small.device), small, inputs, repeats=20).ratio
    if setting.needs_gpu:
        found["joules"] = [joules(model, inputs) for model in (dense, small)]
    return found | {"seconds": round(time.perf_counter() - began)}


@torch.inference_mode()
def joules(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> float:
    """Energy of one pass, by the counter of the GPU, idle power included."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
    model.eval()(**inputs)
    torch.cuda.synchronize()
    passes, start, before = 0, time.perf_counter(), pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    while time.perf_counter() - start < SECONDS:
        model(**inputs)
        torch.cuda.synchronize()
        passes += 1
    return (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1000 / passes


def reason_to_skip(setting: Setting) -> str | None:
    """Why a setting cannot be measured here."""
    if not setting.needs_gpu:
        return None
    if not torch.cuda.is_available():
        return "no GPU here; this size is not measured"
    try:
        import pynvml  # noqa: F401
    except ModuleNotFoundError:
        return "no NVML for the energy: pip install -e '.[energy]'"
    return None


def rows_of(output: Path) -> list[dict]:
    file = output / "paper_parity.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()] if file.is_file() else []


def measure(arguments: Arguments, output: Path) -> None:
    """What is not there yet."""
    said = {name: getattr(arguments, name) for name in ("epochs", "tau", "calibration")}
    said |= {"asked_rows": arguments.rows, "asked_judged": arguments.judged}
    for name in arguments.tasks:
        if why := reason_to_skip(SETTINGS[name]):
            print(f"{name}: skipped, {why}", flush=True)
            continue
        for seed in arguments.seeds:
            key = {"task": name, "seed": seed} | said
            if any(key.items() <= row.items() for row in rows_of(output)):
                continue
            row = key | run(name, arguments, output, seed)
            with (output / "paper_parity.jsonl").open("a", encoding="utf8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def table(output: Path) -> None:
    """Markdown."""
    head = "task | rows, epochs | removed | from scratch | trained on | reduced | stages | dense / small, batch 1"
    print(f"| {head} |\n|" + "---|" * (head.count("|") + 1))
    for row in rows_of(output):
        cells = [row["task"], f"{row['rows']:,}, {row['epochs']:g}", f"{1 - row['after'] / row['before']:.1%}"]
        cells += [f"{100 * row[name]:.2f}" for name in ("from_scratch", "as_long", "reduced")]
        cells += [str(row["stages"]), f"{row['latency']:.1f}x"]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Command line."""
    positional = sys.argv[1:2] if sys.argv[1:2] and not sys.argv[1].startswith("-") else []
    named = ["--action", *positional] if positional else []
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses([*named, *sys.argv[1 + len(positional) :]])
    if unknown := [name for name in arguments.tasks if name not in SETTINGS]:
        raise SystemExit(f"task {unknown[0]!r}: expected one of {', '.join(SETTINGS)}.")
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
