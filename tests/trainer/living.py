"""A `Run` driven by a host of twenty lines: no Trainer, no data, no optimizer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from optimum_rmtkd.config import RMTKDConfig
from optimum_rmtkd.trainer import fit as fitting
from optimum_rmtkd.trainer import pace as pacing
from optimum_rmtkd.trainer import run as life
from optimum_rmtkd.trainer.columns import Columns
from optimum_rmtkd.trainer.companions import Companions
from optimum_rmtkd.trainer.parts import parts_of
from optimum_rmtkd.trainer.rates import Rate
from optimum_rmtkd.trainer.readiness import Readiness
from optimum_rmtkd.trainer.run import Run

from .conftest import tiny_bert


__all__ = ["NEW", "UNKNOWN", "FakeHost", "live", "quick", "run_of", "tiny"]

NEW = Readiness(False, 0.69, 0.69, "its head is newly initialised")
UNKNOWN = Readiness(True, None, None, "whether it can teach could not be checked: no labels that are known here")
TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}


def tiny(width=16):
    return tiny_bert(**TINY, intermediate_size=width)


class FakeHost:
    """Says what it is told to say, and writes down what is done to it."""

    metric_name, greater_is_better, metric_asked_for, validation_rows = "eval_accuracy", True, False, 1000
    label_names, folder, shows_progress, rate = ("labels",), None, False, 1e-3
    follows_phases, loss_name = True, "eval_loss"

    def __init__(self, metrics=(), max_steps=100):
        self.model, self.accelerator, self.max_steps, self.step = tiny(), Accelerator(cpu=True), max_steps, 0
        self.optimizer, self.columns = torch.optim.AdamW(self.model.parameters()), Columns(self.model)
        self.metrics, self.done = list(metrics), []

    def measure(self):
        if not self.metrics:
            return None
        value = self.metrics.pop(0) if len(self.metrics) > 1 else self.metrics[0]
        return {"eval_accuracy": value, "eval_loss": round(1.3 - value, 3)}

    def looks(self):
        return 5

    def calibration_batches(self, samples=None, strip=True):
        return [{"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}]

    def install(self, replacement, prepare=True):
        self.done.append(f"install {replacement.config.intermediate_size}")
        self.model.__dict__.update(replacement.__dict__)

    def forget_moments(self):
        self.done.append("forget")

    def reschedule(self):
        pass

    def model_changed(self):
        self.done.append("changed")

    def log(self, logs):
        pass


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Surgery, readiness and rates by a table: a cut halves the feed-forward width."""

    def reduced(host, config, cut, reference):
        old, new = host.model, tiny(host.model.config.intermediate_size // 2)
        sizes = [sum(p.numel() for p in m.parameters()) for m in (old, new)]
        return SimpleNamespace(
            model=new, projections={}, sites=(), parameters_before=sizes[0], parameters_after=sizes[1], report=None,
            predicted_loss=None, loss_unit=None, divergence=None, latency=None,
        )  # fmt: skip

    monkeypatch.setattr(life, "reduced", reduced)
    monkeypatch.setattr(fitting, "readiness", lambda *a, **k: Readiness(True, 0.3, 0.69, "it can"))
    monkeypatch.setattr(pacing, "distil_rate", lambda given, removed, steps: Rate(given, "for the test"))
    monkeypatch.setattr(pacing, "warmup_steps", lambda steps: 0)


def run_of(host, **recipe):
    recipe = {"target_reduction": 0.2, "kl_weight": 1.0, "hidden_weight": 0.0, **recipe}
    config = RMTKDConfig(**recipe)
    return Run(host, config, parts_of(config), Companions(host))


def live(run, steps=None):
    """All steps of a run; the model's weights move by one in each."""
    host = run.host
    if not run.active:
        run.begin()
    for step in range(host.step + 1, (steps or host.max_steps) + 1):
        with torch.no_grad():
            for parameter in host.model.parameters():
                parameter += 1.0
        host.step = step
        run.after_step(step)
    if steps is None:
        run.end()
    return run
