"""Ternary heads against dense, pruned and int8 ones: accuracy, bytes on disk, latency.

    python examples/benchmarks/ternary.py run --task digits --seed 0 -o results      one seed, all arms, one JSON file
    python examples/benchmarks/ternary.py all -o results                             three tasks, five seeds (hours)
    python examples/benchmarks/ternary.py latency -o results                         ratios to the dense trained head
    python examples/benchmarks/ternary.py table -o results                           prints what is there

Tasks: digits of scikit-learn (64 pixels); cifar10 (64 features in front of the classifier of a ResNet-56, JPEG
images); ag_news (384 features, the mean token of a MiniLM sentence encoder). Data and checkpoints are looked for in
RMTKD_SHARED (default ../shared). Heads have three hidden layers of `--width` neurons. Arms:

    linear           ridge regression on the features: what a head has to beat
    dense_trained    AdamW, fp32
    int8             the same, hidden weights rounded to int8 per row (torchao)
    pruned           the same, smallest weights set to 0 until the file (bitmap + fp16 values) is as small as the
                     ternary one
    naive            the same, hidden weights rounded to three values, scale mean |W|, no training
    rounded_matched  the same with the matched scale
    ..._refit        with a new ridge readout; pruned always has one, which favours it
    trained_...      naive or rounded_matched, trained straight-through for `--epochs` with the dense one as teacher;
                     _1: one epoch
    dense_random     Gaussian hidden weights, ridge readout
    <mode>_<eps>     random ternary weights of that sparsity, ridge readout
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from logging import ERROR, getLogger
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from optimum_rmtkd import RMTKDConfig, RMTKDTrainer, RMTKDTrainingArguments, TernaryConfig, compress_features
from optimum_rmtkd.commands.output import format_table
from optimum_rmtkd.distillation.objectives import KLDivergence, TaskLoss
from optimum_rmtkd.models.timing import compare_latency
from optimum_rmtkd.ternary.build import as_model
from optimum_rmtkd.ternary.diagnostics import standardizer
from optimum_rmtkd.ternary.packing import TernaryMLP, convert, pack_model, serialized_bytes
from optimum_rmtkd.ternary.readout import fit_readout, one_hot, probability_scale
from optimum_rmtkd.ternary.training import ternarize


SHARED = Path(os.environ.get("RMTKD_SHARED", "../shared"))
TASKS = ("digits", "cifar10", "ag_news")
SEEDS = range(5)
RANDOM = {
    f"{mode}{levels or ''}_{sparsity}": {"mode": mode, "sparsity": sparsity} | ({"levels": levels} if levels else {})
    for mode, levels in (("weights_only", 0), ("min_shift", 3), ("min_shift", 4), ("two_level", 0))
    for sparsity in (0.5, 0.9)
}
STARTS = {"naive": "mean_abs", "rounded_matched": "matched"}


@dataclass
class Arguments:
    """What to run."""

    action: str = field(metadata={"help": "run, all, latency or table."})
    output: str = field(default="results", metadata={"aliases": ["-o"], "help": "Folder of the result files."})
    task: str = field(default="digits", metadata={"help": ", ".join(TASKS)})
    seed: int = field(default=0, metadata={"help": "Seed of the split, of random weights and of training."})
    width: int = field(default=1000, metadata={"help": "Neurons of each hidden layer."})
    epochs: int = field(default=10, metadata={"help": "Of the dense training, and of the straight-through training."})
    rows: int = field(default=8000, metadata={"help": "Training rows at most."})


# -- data -------------------------------------------------------------------------------------------------------------


def load(task: str, folder: Path, rows: int, seed: int) -> tuple[torch.Tensor, ...]:
    """(x, y, test x, test y). digits is split by the seed; the others draw their training rows by it."""
    generator = torch.Generator().manual_seed(seed)
    if task == "digits":
        from sklearn.datasets import load_digits

        x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
        order = torch.randperm(len(x), generator=generator)
        x, y = x[order].float(), y[order].long()
        return x[:1300], y[:1300], x[1300:], y[1300:]
    file = folder / f"features_{task}.safetensors"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(EXTRACTORS[task](), file)
    stored = load_file(file)
    order = torch.randperm(len(stored["x"]), generator=generator)[:rows]
    return stored["x"][order], stored["y"][order], stored["test_x"], stored["test_y"]


def read(name: str, rows: int):
    from datasets import load_dataset

    data = load_dataset("parquet", data_files={"part": str(SHARED / "data" / f"{name}.parquet")})["part"]
    return data.select(range(min(rows, len(data))))


@torch.no_grad()
def ag_news_features() -> dict[str, torch.Tensor]:
    """Mean of the last hidden states over the tokens of each text, at most 48 tokens."""
    from transformers import AutoModel, AutoTokenizer

    folder, found = SHARED / "models/all_minilm_l6_v2", {}
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModel.from_pretrained(folder, dtype=torch.float32).eval(),
    )
    for part, prefix, rows in (("ag_news_sub_train", "", 10_000), ("ag_news_test", "test_", 7600)):
        data, pooled = read(part, rows), []
        for batch in data.iter(64):
            inputs = tokenizer(batch["text"], truncation=True, max_length=48, padding=True, return_tensors="pt")
            mask = inputs["attention_mask"][..., None]
            pooled.append((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1))
        found |= {f"{prefix}x": torch.cat(pooled), f"{prefix}y": torch.tensor(data["label"][:])}
    return found


class Block(nn.Module):
    """conv-bn-relu-conv-bn plus shortcut; where the shape changes the shortcut is subsampled and padded with zeros."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.stride, self.padding = stride, after // 4 if stride > 1 else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        x = x[:, :, :: self.stride, :: self.stride]
        return torch.relu(y + nn.functional.pad(x, (0, 0, 0, 0, self.padding, self.padding)))


class ResNet56(nn.Module):
    """He et al. 2016, section 4.2, up to the global average pooling: (batch, 3, 32, 32) -> (batch, 64)."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for stage, (before, after, stride) in enumerate(((16, 16, 1), (16, 32, 2), (32, 64, 2)), start=1):
            blocks = [Block(before if i == 0 else after, after, stride if i == 0 else 1) for i in range(9)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))


@torch.no_grad()
def cifar10_features() -> dict[str, torch.Tensor]:
    """Features in front of the classifier; prints the accuracy of the checkpoint's own classifier as a check."""
    import numpy as np

    tensors = load_file(SHARED / "models/resnet56_cifar10/model.safetensors")
    model, found = ResNet56().eval(), {}
    model.load_state_dict({name: t for name, t in tensors.items() if not name.startswith("linear")}, strict=True)
    mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for part, prefix, rows in (("cifar10_jpg_train", "", 10_000), ("cifar10_jpg_test", "test_", 5000)):
        data, pooled = read(part, rows), []
        for batch in data.iter(100):
            pixels = torch.from_numpy(np.stack([np.asarray(image) for image in batch["image"]])) / 255
            pooled.append(model(((pixels - mean) / spread).movedim(-1, 1)))
        found |= {f"{prefix}x": torch.cat(pooled), f"{prefix}y": torch.tensor(data["label"][:])}
    logits = found["test_x"] @ tensors["linear.weight"].T + tensors["linear.bias"]
    print(f"classifier of the checkpoint: {(logits.argmax(1) == found['test_y']).float().mean():.4f}", flush=True)
    return found


EXTRACTORS = {"cifar10": cifar10_features, "ag_news": ag_news_features}


# -- arms -------------------------------------------------------------------------------------------------------------


def training_arguments(kind: type, folder: str, arguments: Arguments, **options) -> TrainingArguments:
    return kind(
        output_dir=folder,
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=128,
        learning_rate=1e-3,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        seed=arguments.seed,
        **options,
    )


def rows_of(x: torch.Tensor, y: torch.Tensor) -> list[dict]:
    return [{"features": a, "labels": b} for a, b in zip(x, y)]


def train_dense(x: torch.Tensor, y: torch.Tensor, arguments: Arguments):
    """He's initialisation, AdamW, cosine."""
    set_seed(arguments.seed)
    relu = {"name": "relu", "mean": 0.0}
    mlp = TernaryMLP(x.shape[1], int(y.max()) + 1, [arguments.width] * 3, [relu] * 3, "dense", bias=True)
    mean, factor = standardizer(x)
    with torch.no_grad():
        mlp.input_mean.copy_(mean)
        mlp.input_factor.copy_(factor * x.shape[1] ** 0.5)
        for layer in mlp.layers:
            layer.latent.mul_(2**0.5)
    model = as_model(mlp, TernaryConfig(storage="dense"))
    with tempfile.TemporaryDirectory() as folder:
        Trainer(model, training_arguments(TrainingArguments, folder, arguments), train_dataset=rows_of(x, y)).train()
    return model.eval()


def sequential(mlp: TernaryMLP) -> nn.Sequential:
    """The layers of a dense head as anybody writes them; standardised inputs are expected."""
    network = nn.Sequential()
    for layer in mlp.layers:
        linear = nn.Linear(layer.in_features, layer.out_features)
        linear.weight.data, linear.bias.data = layer.latent.data.clone(), layer.bias.data.clone()
        network += nn.Sequential(linear, nn.ReLU())
    return network.append(copy.deepcopy(mlp.readout))


class Head(nn.Module):
    """A network as the model that the timing and the scoring call."""

    def __init__(self, network: nn.Module, mlp: TernaryMLP):
        super().__init__()
        self.network, self.mean, self.factor = network, mlp.input_mean, mlp.input_factor

    def forward(self, features):
        return {"logits": self.network((features - self.mean) * self.factor)}


class Bare(nn.Module):
    """The same for inputs that are standardised already."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, features):
        return {"logits": self.network(features)}


def start(dense, x: torch.Tensor, scale: str):
    """The dense head rounded; standardised inputs are kept."""
    inputs = (x - dense.mlp.input_mean) * dense.mlp.input_factor
    model = ternarize(sequential(dense.mlp), inputs, TernaryConfig(weights="trained", scale=scale, sparsity=0.5))[0]
    model.mlp.input_mean.copy_(dense.mlp.input_mean)
    model.mlp.input_factor.copy_(dense.mlp.input_factor)
    return model


def train_straight_through(model, teacher, x: torch.Tensor, y: torch.Tensor, arguments: Arguments):
    with tempfile.TemporaryDirectory() as folder:
        RMTKDTrainer(
            model=model,
            args=training_arguments(RMTKDTrainingArguments, folder, arguments),
            rmtkd_config=RMTKDConfig(schedule="none", seed=arguments.seed),
            teacher_model=teacher,
            objectives=[TaskLoss(0.3), KLDivergence(0.7)],
            train_dataset=rows_of(x, y),
        ).train()
    return pack_model(model).eval()


@torch.no_grad()
def refit(model, x: torch.Tensor, y: torch.Tensor):
    """A new readout by ridge regression."""
    fit = fit_readout(model.mlp.hidden_features(x), one_hot(y, model.config.num_labels))
    scale = probability_scale(fit.left_out, y)
    model.mlp.readout.weight.copy_(fit.weight * scale)
    model.mlp.readout.bias.copy_(fit.bias * scale)
    return model


@torch.no_grad()
def prune(dense, budget: int):
    """Magnitude pruning, the same share of every layer, to a file of at most `budget` bytes: (model, bytes)."""
    model, kept = copy.deepcopy(dense), {n: t for n, t in dense.state_dict().items() if "latent" not in n}
    weights = sum(layer.latent.numel() for layer in model.mlp.layers)
    density = max((budget - serialized_bytes(kept) - weights / 8 - 512) / 2 / weights, 0.001)
    for number, layer in enumerate(model.mlp.layers):
        flat = layer.latent.reshape(-1)
        threshold = flat.abs().topk(round(density * len(flat))).values[-1]
        flat.mul_(flat.abs() >= threshold)
        layer.latent.copy_(layer.latent.half().float())
        nonzero = flat != 0
        bits = nn.functional.pad(nonzero, (0, -len(flat) % 8)).reshape(-1, 8).to(torch.uint8)
        kept[f"{number}.bitmap"] = (bits << torch.arange(8)).sum(1).to(torch.uint8)
        kept[f"{number}.values"] = flat[nonzero].half()
    return model, serialized_bytes(kept)


@torch.no_grad()
def int8(dense):
    """torchao's int8 weights on the hidden layers: (model, bytes), or None without torchao."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        return None
    network = sequential(dense.mlp)
    held = {n: t for n, t in dense.state_dict().items() if "latent" not in n}
    for number, layer in enumerate(dense.mlp.layers):
        held[f"{number}.int8"] = torch.zeros(layer.latent.shape, dtype=torch.int8)
        held[f"{number}.scale"] = torch.zeros(layer.out_features)
    quantize_(network[:-1], Int8WeightOnlyConfig())
    return Head(network, dense.mlp).eval(), serialized_bytes(held)


@torch.no_grad()
def accuracy(model, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((torch.cat([model(features=part)["logits"] for part in x.split(1000)]).argmax(1) == y).float().mean())


def linear_accuracy(x, y, test_x, test_y) -> float:
    mean, factor = standardizer(x, "feature")
    scale = factor * x.shape[1] ** 0.5
    fit = fit_readout((x - mean) * scale, one_hot(y, int(y.max()) + 1))
    return float((((test_x - mean) * scale) @ fit.weight.T + fit.bias).argmax(1).eq(test_y).float().mean())


def size_of(model) -> int:
    """Bytes of the weights file that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "model.safetensors").stat().st_size


def run(arguments: Arguments, folder: Path) -> None:
    """All arms of one task and seed; a result that is there already is kept."""
    target = folder / f"ternary_{arguments.task}_{arguments.seed}.json"
    if target.is_file():
        return
    x, y, test_x, test_y = load(arguments.task, folder, arguments.rows, arguments.seed)
    found: dict[str, dict] = {
        "linear": {
            "accuracy": linear_accuracy(x, y, test_x, test_y),
            "bytes": 4 * (x.shape[1] + 1) * (int(y.max()) + 1),
        }
    }

    def note(name: str, model, size: int | None = None) -> None:
        found[name] = {"accuracy": accuracy(model, test_x, test_y), "bytes": size or size_of(model)}
        print(arguments.task, arguments.seed, name, found[name], flush=True)

    hidden = (arguments.width,) * 3
    for name, options in {**RANDOM, "dense_random": {"storage": "dense"}}.items():
        config = TernaryConfig(hidden=hidden, seed=arguments.seed, **options)
        note(name, compress_features(x, y, config)[0])
    dense = train_dense(x, y, arguments)
    note("dense_trained", dense)
    pruned, size = prune(dense, found["weights_only_0.5"]["bytes"])
    note("pruned", refit(pruned, x, y), size)
    quantized = int8(dense)
    if quantized is not None:
        note("int8", *quantized)
    for name, scale in STARTS.items():
        model = start(dense, x, scale)
        rounded = pack_model(copy.deepcopy(model))
        note(name, rounded)
        note(f"{name}_refit", refit(rounded, x, y))
        for epochs, suffix in ((1, "_1"), (arguments.epochs, "")):
            brief = dataclasses.replace(arguments, epochs=epochs)
            note(f"trained_{scale}{suffix}", train_straight_through(copy.deepcopy(model), dense, x, y, brief))
    folder.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".partial").write_text(json.dumps(found, indent=2), encoding="utf8")
    target.with_suffix(".partial").rename(target)


# -- latency and tables -----------------------------------------------------------------------------------------------


def latency(arguments: Arguments) -> None:
    """Time of the dense fp32 head (linear layers with biases and ReLU, a transformers model that standardises its
    inputs, like the others) over the time of each other, batch 1 and 256, interleaved. `bare_layers`: the same layers
    as an nn.Sequential that is given standardised inputs; what it is faster by is the price of being a model."""
    x = torch.randn(2000, 384, generator=torch.Generator().manual_seed(0))
    y = torch.arange(2000) % 4
    relu, hidden = {"name": "relu", "mean": 0.0}, [arguments.width] * 3
    dense = as_model(TernaryMLP(384, 4, hidden, [relu] * 3, "dense", bias=True), TernaryConfig(storage="dense"))
    others = {"dense_again": copy.deepcopy(dense), "bare_layers": Bare(sequential(dense.mlp))}
    for name in ("weights_only_0.5", "weights_only_0.9", "min_shift3_0.5", "min_shift4_0.5", "two_level_0.5"):
        config = TernaryConfig(hidden=tuple(hidden), **RANDOM[name])
        others[name] = compress_features(x, y, config)[0]
    packed = as_model(convert(others["weights_only_0.5"].mlp, "base3"), TernaryConfig())
    others["unpacked_each_time"] = _forgetful(packed)
    quantized = int8(dense)
    if quantized is not None:
        others["int8"] = quantized[0]
    rows = []
    for name, model in others.items():
        cells = []
        for batch in (1, 256):
            timing = compare_latency(dense, model, {"features": x[:batch]}, repeats=30)
            cells += [f"{1e3 * timing.after:.2f} ms", f"{timing.ratio:.2f}x ({timing.low:.2f} to {timing.high:.2f})"]
        rows.append((name, *cells))
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), width {arguments.width}; ratio: dense / this"
    )
    print(format_table(("head", "batch 1", "ratio", "batch 256", "ratio"), rows))


def _forgetful(model):
    """What unpacking in every forward pass would cost."""
    for layer in model.mlp.layers:
        layer.register_forward_pre_hook(lambda module, _: module.forget())
    return model


def table(folder: Path) -> None:
    for task in TASKS:
        files = sorted(folder.glob(f"ternary_{task}_*.json"))
        if not files:
            continue
        runs = [json.loads(file.read_text(encoding="utf8")) for file in files]
        rows = []
        for name in runs[0]:
            values = [100 * result[name]["accuracy"] for result in runs if name in result]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            rows.append((name, f"{statistics.mean(values):.2f}", f"{spread:.2f}", f"{runs[0][name]['bytes']:,}"))
        print(f"\n{task}, {len(runs)} seed(s)")
        print(format_table(("head", "accuracy %", "sd", "bytes"), rows))
        apart = [100 * (r["weights_only_0.9"]["accuracy"] - r["dense_random"]["accuracy"]) for r in runs]
        print(
            f"weights_only_0.9 less dense_random: {statistics.mean(apart):+.2f} points ({min(apart):+.2f} to "
            f"{max(apart):+.2f})"
        )


def main() -> None:
    positional = sys.argv[1:2] if sys.argv[1:2] and not sys.argv[1].startswith("-") else []
    named = ["--action", *positional] if positional else []
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses([*named, *sys.argv[1 + len(positional) :]])
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("optimum_rmtkd").setLevel(ERROR)
    folder = Path(arguments.output)
    if arguments.action == "run":
        run(arguments, folder)
    elif arguments.action == "all":
        for seed in SEEDS:
            for task in TASKS:
                arguments.task, arguments.seed = task, seed
                run(arguments, folder)
        table(folder)
    elif arguments.action == "latency":
        latency(arguments)
    elif arguments.action == "table":
        table(folder)
    else:
        raise SystemExit(f"Unknown action {arguments.action!r}: expected run, all, latency or table.")


if __name__ == "__main__":
    main()
