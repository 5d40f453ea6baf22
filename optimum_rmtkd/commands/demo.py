"""`optimum-cli rmtkd demo`: the whole way on a small vision transformer, without network."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..config import RMTKDConfig
from ..errors import RMTKDError
from ..validation import Count, Interval, Seed, check_fields
from .base import Command, set_help
from .options import add_options, from_options, option
from .output import OVERWRITE, comparison, format_table, weight_bytes, writing_beside


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import EvalPrediction, PreTrainedModel

    from ..trainer import RMTKDTrainer, RMTKDTrainingArguments


__all__ = [
    "DemoCommand",
    "DemoOptions",
    "Digits",
    "accuracy",
    "build_vit",
    "distil_narrow",
    "distilled",
    "distillation_arguments",
    "read_digits",
    "train_dense",
]

ALLOWED_LOSS = 0.01  # accuracy the reduced model may lose: one point
BATCH = 64
LOGGED = 40  # steps between two points of the training curve
RECIPE_NAME = "rmtkd_recipe.json"

DESCRIPTION = """\
Train a small vision transformer on the handwritten digits that scikit-learn carries, show its spectra, remove most of
its parameters, distil it from its former self, save it, reload it in a fresh process, and compare both on digits that
neither has seen. No network; a few minutes on two cores. Exit code 1 if the reduced model loses more than one point.
"""

EPILOG = """\
examples:
  the whole way, into ./rmtkd-demo
    optimum-cli rmtkd demo
  a page about what it did (needs matplotlib, which the extra "demo" brings)
    optimum-cli rmtkd report ./rmtkd-demo
  smaller, and distilled for longer
    optimum-cli rmtkd demo --target-reduction 0.9 --distil-epochs 40 -o ./digits-small
"""

RELOAD = """\
import sys, torch, optimum_rmtkd
from transformers import AutoModelForImageClassification
folder, file, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
kept = torch.load(file, weights_only=True)
model = AutoModelForImageClassification.from_pretrained(folder).eval()
with torch.inference_mode():
    print(float((model(pixel_values=kept["pixel_values"]).logits - kept["logits"]).abs().max()))
"""


@dataclass(frozen=True)
class DemoOptions:
    """Size of the demonstration; the defaults take a few minutes on two cores."""

    target_reduction: Annotated[float, Interval(0, 1, "neither", "a share of the parameters")] = option(
        0.8, "Share of the parameters to remove."
    )
    epochs: Count = option(25, "Epochs of the training of the original model.")
    distil_epochs: Count = option(20, "Epochs of the distillation of the narrowed one.")
    hidden_size: Count = option(128, "Width of the vision transformer; a multiple of 4.")
    layers: Count = option(6, "Its number of layers.")
    train_samples: Count = option(1198, "Training images, at most 1198; the other 599 of the 1797 are held out.")
    seed: Seed = option(0, "Seed of the whole demonstration.")

    def __post_init__(self):
        check_fields(self, as_options=True)


@dataclass(frozen=True)
class Digits:
    """Digits scaled to [-1, 1]: pixels (n, 1, 8, 8) float32, labels (n,) int64; the split is the same in every run."""

    train_pixels: Tensor
    train_labels: Tensor
    test_pixels: Tensor
    test_labels: Tensor

    def train_rows(self) -> list[dict]:
        """The training part as rows for a Trainer."""
        return [{"pixel_values": x, "labels": int(y)} for x, y in zip(self.train_pixels, self.train_labels)]


class DemoCommand(Command):
    @staticmethod
    def parse_args(parser):
        set_help(parser, DESCRIPTION, EPILOG, "optimum-cli rmtkd demo [-o OUT] [options]")
        parser.add_argument("-o", "--output", default="rmtkd-demo", metavar="OUT", help="Default: ./rmtkd-demo.")
        parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
        add_options(parser, DemoOptions, "size")

    def execute(self) -> None:
        options = from_options(DemoOptions, self.args)
        with writing_beside(self.args.output, self.args.overwrite) as folder:
            lost = _demonstrate(options, folder, Path(self.args.output).absolute().name)
        print(f"saved to {self.args.output}; reload it with:")
        print("  import optimum_rmtkd")
        print(f"  AutoModelForImageClassification.from_pretrained({str(self.args.output)!r})")
        print(f"what was done, as a page: optimum-cli rmtkd report {self.args.output}")
        if lost > ALLOWED_LOSS:
            print(f"The reduced model lost {100 * lost:.2f} points of accuracy, more than the one point allowed.")
            raise SystemExit(1)


def _demonstrate(options: DemoOptions, folder: Path, name: str) -> float:
    """Train, analyse, narrow, distil and save into `folder`, with the record of it all under the name `name`.

    Returns:
        The accuracy lost on the held-out digits.
    """
    from transformers import set_seed

    import optimum_rmtkd  # noqa: F401  registers the reduced classes

    from ..hub.run import BENCH
    from ..surgery import count_parameters
    from .bench import timings, write_bench

    recipe = RMTKDConfig(target_reduction=options.target_reduction, fit_share=0, seed=options.seed)  # trained below
    digits = read_digits(options.train_samples)
    set_seed(options.seed)

    _say(f"1. training a vision transformer on {len(digits.train_labels)} digits")
    dense = build_vit(options)
    train_dense(dense, digits, options, folder / "trainer")
    dense.save_pretrained(folder / "dense")
    dense_bytes = weight_bytes(folder / "dense")

    _say("2. the spectra of its activations")
    _show_spectra(dense, digits, recipe)

    _say(f"3. narrowing it by {100 * options.target_reduction:.0f} % and distilling it from its former self")
    logged = {"logging_strategy": "steps", "logging_steps": LOGGED}
    trainer = distilled(dense, digits, recipe, options, folder / "trainer", **logged)
    narrow = trainer.accelerator.unwrap_model(trainer.model).eval()

    _say("4. saving, and reloading in a fresh process")
    narrow.save_pretrained(folder)
    _check_reload(narrow, digits.test_pixels[:256], folder)

    _say(f"5. before and after, on {len(digits.test_labels)} digits that were held out")
    values = accuracy(dense, digits), accuracy(narrow, digits)
    sizes = count_parameters(dense), count_parameters(narrow)
    size = dense_bytes, weight_bytes(folder)
    rows = comparison(parameters=sizes, size=size, metric="accuracy", values=values)
    held_out = len(digits.test_labels)
    timed = timings((dense, narrow), [{"pixel_values": digits.test_pixels[:batch]} for batch in (1, 256)])
    write_bench(folder / BENCH, timed)
    _record(trainer, recipe, options, folder, name, parameters=sizes, bytes=size, values=values, rows=held_out)
    for (what, *times, _), value in zip(timed["rows"], timed["values"], strict=True):
        rows.append((what, *times, f"{value['ratio']:.1f} times as fast"))
    print(format_table(("", "before", "after", "change"), rows))
    return values[0] - values[1]


def _record(
    trainer: RMTKDTrainer,
    recipe: RMTKDConfig,
    options: DemoOptions,
    folder: Path,
    name: str,
    *,
    parameters: tuple[int, int],
    bytes: tuple[int, int],
    values: tuple[float, float],
    rows: int,
) -> None:
    """What `report` and the model card are made of, and the card; the trainings' own folders are cleared."""
    from ..hub import write_card, write_results
    from ..hub.run import SPECTRA, STAGES

    for file in (STAGES, SPECTRA):
        shutil.copyfile(folder / "trainer" / file, folder / file)
    for part in ("trainer", "dense"):
        shutil.rmtree(folder / part)
    recipe.to_json_file(folder / RECIPE_NAME)
    write_results(
        folder,
        base_model="digits-vit",
        parameters=parameters,
        bytes=bytes,
        metric={"name": "accuracy", "before": values[0], "after": values[1]},
        dataset={"id": "digits", "name": "digits", "split": "held out", "rows": rows, "on_hub": False},
        log_history=list(trainer.state.log_history),
        training=dataclasses.asdict(options) | {"epochs": options.distil_epochs, "batch_size": BATCH},
        recipe=recipe.to_dict(),
    )
    write_card(folder, name)


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def read_digits(train_samples: int) -> Digits:
    """Scikit-learn's digits; raises RMTKDError without scikit-learn or for a number of samples that is not there."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise RMTKDError('The demo needs scikit-learn: pip install "optimum-rmtkd[demo]".') from error
    import torch

    bunch = load_digits()
    pixels = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
    labels = torch.tensor(bunch.target)
    train, test = train_test_split(range(len(labels)), test_size=1 / 3, random_state=0, stratify=bunch.target)
    if not 1 <= train_samples <= len(train):
        raise RMTKDError(f"--train-samples {train_samples}: expected 1 to {len(train)}.")
    train = train[:train_samples]
    return Digits(pixels[train], labels[train], pixels[test], labels[test])


def build_vit(options: DemoOptions) -> PreTrainedModel:
    """A vision transformer with random weights; raises RMTKDError for a width that its 4 heads do not divide."""
    from transformers import ViTConfig, ViTForImageClassification

    if options.hidden_size % 4 or options.hidden_size < 8:
        raise RMTKDError(f"--hidden-size {options.hidden_size}: expected a multiple of 4, at least 8.")
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        intermediate_size=4 * options.hidden_size,
        hidden_dropout_prob=0.1,
    )
    return ViTForImageClassification(config)


def _arguments(folder: Path, epochs: int, learning_rate: float, options: DemoOptions) -> dict:
    """Keyword arguments of both trainings."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 256,
        "learning_rate": learning_rate,
        "weight_decay": 0.05,
        "warmup_steps": 50,
        "lr_scheduler_type": "cosine",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "seed": options.seed,
        "use_cpu": True,
    }


def train_dense(model: PreTrainedModel, digits: Digits, options: DemoOptions, folder: Path) -> None:
    """Train it on the digits, in place; `folder` takes the trainer's files."""
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(**_arguments(folder, options.epochs, 1e-3, options))
    Trainer(model, args, train_dataset=digits.train_rows()).train()
    model.eval()


def distillation_arguments(options: DemoOptions, folder: Path, **others: Any) -> RMTKDTrainingArguments:
    """Of the training after the cut; `others` replace what the demonstration takes."""
    from ..trainer import RMTKDTrainingArguments

    return RMTKDTrainingArguments(**_arguments(folder, options.distil_epochs, 1e-3, options) | others)


def distil_narrow(
    dense: PreTrainedModel, digits: Digits, recipe: RMTKDConfig, options: DemoOptions, folder: Path
) -> PreTrainedModel:
    """A narrowed and distilled copy; `dense` stays as it is."""
    trainer = distilled(dense, digits, recipe, options, folder)
    return trainer.accelerator.unwrap_model(trainer.model).eval()


def distilled(
    dense: PreTrainedModel, digits: Digits, recipe: RMTKDConfig, options: DemoOptions, folder: Path, **others: Any
) -> RMTKDTrainer:
    """The trainer that has narrowed and distilled a copy of `dense`; its record of stages lies in `folder`.

    The held-out digits are looked at, never trained or chosen on.
    """
    import copy

    from ..trainer import RMTKDTrainer

    judged = {"metric_for_best_model": "accuracy", "greater_is_better": True}
    trainer = RMTKDTrainer(
        model=copy.deepcopy(dense),
        args=distillation_arguments(options, folder, **judged, **others),
        rmtkd_config=recipe,
        train_dataset=digits.train_rows(),
        eval_dataset=[{"pixel_values": x, "labels": int(y)} for x, y in zip(digits.test_pixels, digits.test_labels)],
        compute_metrics=_accuracy_of,
    )
    trainer.train()
    return trainer


def _accuracy_of(prediction: EvalPrediction) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def _show_spectra(model: PreTrainedModel, digits: Digits, recipe: RMTKDConfig) -> None:
    from torch.utils.data import DataLoader
    from transformers import default_data_collator

    from ..surgery import analyze

    loader = DataLoader(digits.train_rows(), batch_size=256, collate_fn=default_data_collator)
    print(analyze(model, loader, recipe).table())


def _logits(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    import torch

    with torch.inference_mode():
        return model(pixel_values=pixels).logits


def accuracy(model: PreTrainedModel, digits: Digits) -> float:
    """Share of the held-out digits that are named right."""
    return float((_logits(model, digits.test_pixels).argmax(-1) == digits.test_labels).double().mean())


def _check_reload(model: PreTrainedModel, pixels: Tensor, folder: Path) -> None:
    """Reload `folder` in a fresh process and compare its logits with those of `model` in this one."""
    import torch

    kept = folder / "logits.pt"
    torch.save({"pixel_values": pixels, "logits": _logits(model, pixels).clone()}, kept)
    command = [sys.executable, "-c", RELOAD, str(folder), str(kept), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
    kept.unlink()
    if done.returncode:
        raise RMTKDError(f"The saved model does not load in a fresh process: {done.stderr.strip().splitlines()[-1]}")
    difference = float(done.stdout.split()[-1])
    print(f"largest difference of the logits: {difference:g}")
    if not difference <= 1e-5:
        raise RMTKDError(f"The reloaded model differs from the saved one: its logits are off by up to {difference:g}.")
