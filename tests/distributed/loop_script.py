"""Launched by torchrun: a loop of the script's own with Accelerate; every process writes what it ended with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ..trainer.conftest import toy_data
from ..trainer.looping import evaluate, looped, prepared, train
from .leaving import leave


def main(given=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--sites", nargs="*", default=None)
    parser.add_argument("--target", type=float, default=0.6)
    parser.add_argument("--fit-share", type=float, default=0.0)
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--mixed-precision", default=None)
    parser.add_argument("--resume", default=None)
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    whole = torch.ones(10, dtype=torch.long)  # no padding: each micro-batch has as many tokens
    script = prepared(
        rows=[dict(row, attention_mask=whole) for row in toy_data()],
        batch_size=options.batch_size,
        max_steps=6,
        accumulation=options.accumulation,
        optimizer=options.optimizer,
        rate=0.05 if options.optimizer == "sgd" else 1e-3,
        mixed_precision=options.mixed_precision,
    )
    recipe = {"target_reduction": options.target, "sites": options.sites, "rounds": 2, "stage_share": 0.4}
    loop = looped(script, recipe | {"fit_share": options.fit_share, "calibration_samples": 48})
    wrapped = script.model
    losses, rates = train(script, loop, resume=options.resume, save_to=options.out, save_every=1)
    inner = script.accelerator.unwrap_model(script.model)
    rank = script.accelerator.process_index
    torch.save(inner.state_dict(), options.out / f"weights-{rank}.pt")
    values = {
        "processes": script.accelerator.num_processes,
        "wrapped": type(wrapped).__name__,
        "modules": len(list(wrapped.module.parameters())) if hasattr(wrapped, "module") else None,
        "known": [known is inner for known in script.accelerator._models],
        "stages": [stage.to_dict() for stage in loop.stages],
        "losses": losses,
        "rates": rates,
        "metrics": evaluate(script),
        "steps": loop._host.step,
    }
    (options.out / f"result-{rank}.json").write_text(json.dumps(values))
    return script.accelerator


if __name__ == "__main__":
    leave(main())
