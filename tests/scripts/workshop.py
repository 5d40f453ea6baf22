"""Starts the scripts of this folder as a user does, each in a process of its own, and reads what they left."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECIPE = {"target_reduction": 0.5, "calibration_samples": 128, "round_to": 4, "min_width": 4}
STEPS = {
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "learning_rate": 2e-3,
    "num_train_epochs": 8,
}


@dataclass(frozen=True)
class Kind:
    """What scripts of a kind are told.

    Attributes:
        options: of every run.
        during: those that make it write checkpoints on its way.
        again: those that make it evaluate a model, and no more.
        prefix: of its metrics in what it saves.
        checkpoints: pattern of the names of their folders.
    """

    options: Mapping[str, Any]
    during: Mapping[str, Any]
    again: Mapping[str, Any]
    prefix: str
    checkpoints: str


TRAINER = Kind(
    STEPS
    | {"do_train": True, "do_eval": True, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    | {"save_strategy": "no", "logging_steps": 16},
    {"eval_strategy": "steps", "eval_steps": 0.25, "save_strategy": "steps", "save_steps": 0.25},
    {"do_train": False},
    "eval_",
    "checkpoint-*",
)
# Not at the end of an epoch (32 steps): the script evaluates after it has saved there, and iterating draws a random
# number, with a plain loop as with ours, which a resumed run has not drawn.
LOOP = Kind(STEPS, {"checkpointing_steps": 48}, {"num_train_epochs": 0}, "", "step_*")


@dataclass(frozen=True)
class Script:
    """A script, a task for it, and what is expected of it.

    Attributes:
        name: of the declaration.
        file: of the script, without ".py".
        data: writes the files of the task into a folder; returns the options that name them.
        model: saves a raw checkpoint, a backbone without a head for the task, and its tokenizer.
        metric: by which the model is judged, one of those that the script computes.
        chance: its value for a model that has learnt nothing.
        within: the most that ours may end below the plain script, from a raw checkpoint and as many steps.
        options: of the script, beside those of its kind.
        recipe: beside `RECIPE`.
        kind: with a Trainer, or a loop of its own.
        greater_is_better: the metric is to be large.
        exact: an evaluation gives the same metrics each time (False where it masks at random).
    """

    name: str
    file: str
    data: Callable[[Path], dict[str, Path]]
    model: Callable[[Path], None]
    metric: str
    chance: float
    within: float
    options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = True
    kind: Kind = TRAINER
    greater_is_better: bool = True

    @property
    def judged_by(self) -> str:
        """Its metric, as it is called in results."""
        return f"{self.kind.prefix}{self.metric}"

    @property
    def tolerance(self) -> float:
        """How far two evaluations of one model may lie apart, relatively."""
        return 1e-5 if self.exact else 0.1


def as_options(values: Mapping[str, Any]) -> list[str]:
    """{"do_train": True, "seed": 1} as --do_train True --seed 1."""
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]


def environment(folder: Path) -> dict[str, str]:
    """One thread of the CPU, this package, no network, and a cache of its own."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    own |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    own |= {"HF_DATASETS_CACHE": str(folder / "cache")}
    return os.environ | own


def start(script: Path, options: list[str], folder: Path, processes: int = 1) -> subprocess.CompletedProcess:
    """Run a script to its end, in another working directory."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(script), *options]
    return subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=600)


class Workshop:
    """Data, checkpoints and runs of one script, under one folder.

    Attributes:
        said: what the last run wrote to stderr and stdout.
    """

    def __init__(self, script: Script, folder: Path):
        self.script, self.folder, self.said = script, folder, ""
        self.raw = folder / "raw"
        (folder / "data").mkdir(parents=True)
        self.raw.mkdir()
        script.model(self.raw)
        self.files = script.data(folder / "data")

    @cached_property
    def plain(self) -> Path:
        """What the script makes of the raw checkpoint with a plain Trainer: a fine-tuned model."""
        return self.run("plain", self.raw)

    @cached_property
    def narrow(self) -> Path:
        """What it makes of the raw checkpoint in as many steps with ours; with checkpoints on the way."""
        return self.run("narrow", self.raw, {}, **self.script.kind.during)

    def run(self, out: str, model: Path, recipe: Mapping | None = None, processes: int = 1, **options) -> Path:
        """Start the script on `model` and see it succeed; returns its output folder.

        Args:
            recipe: None: a plain Trainer; else what differs from the script's own recipe.
            **options: what differs from its own options; None: leave it away.
        """
        place = self.folder / out
        values: dict[str, Any] = (
            {"model_name_or_path": model, "output_dir": place} | self.files | dict(self.script.kind.options)
        )
        values |= dict(self.script.options) | options
        if recipe is not None:
            recipe = RECIPE | dict(self.script.recipe) | dict(recipe)
            values["rmtkd"] = json.dumps({k: v for k, v in recipe.items() if v is not None})
        done = start(HERE / f"{self.script.file}.py", as_options(values), self.folder, processes)
        self.said = done.stdout + done.stderr
        assert done.returncode == 0, self.said[-6000:]
        return place

    def evaluated_again(self, model: Path) -> dict[str, float]:
        """Metrics of a saved model, by the plain script in a fresh process."""
        return results(self.run(f"again-{model.name}", model, **self.script.kind.again))

    def checkpoints(self, out: Path) -> list[Path]:
        """In the order in which they were written."""
        return sorted(out.glob(self.script.kind.checkpoints), key=steps_of)


def results(out: Path) -> dict[str, float]:
    """What the script saved of its evaluation."""
    return json.loads((out / "eval_results.json").read_text())


def journal(out: Path) -> dict[str, Any]:
    return json.loads((out / "rmtkd_stages.json").read_text())


def tensors(path: Path) -> dict[str, Any]:
    """Those of a file, by name."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def weights(out: Path) -> dict[str, Any]:
    """The saved tensors of a model by name; tied ones once."""
    return tensors(out / "model.safetensors")


def steps_of(checkpoint: Path) -> int:
    """The number at the end of its name."""
    return int(re.split("[-_]", checkpoint.name)[-1])
