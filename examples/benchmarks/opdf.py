"""What a matrix product operator costs while training, and how much further an Adam step moves the weight.

    python examples/benchmarks/opdf.py            # cost and length of a step
    python examples/benchmarks/opdf.py rates      # the first losses of a student cut by 80 %, plain and n = 3

A linear layer 384 -> 1536; times are the smallest of interleaved runs, as ratios to the plain layer in the same run.
The step is also measured on a trained matrix, where RMTKD_SHARED has one: its spectrum is steeper, and the step
longer.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from text import SHARED
from torch import nn

from optimum_rmtkd.reparameterization import MatrixProductOperator, fold, mpo_factor


TENSORS = (3, 5, 7)


def layer(number: int | None, weight: torch.Tensor | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(384, 1536))
    if weight is not None:
        model[0].weight.data.copy_(weight)
    if number:
        MatrixProductOperator(number, target_modules=["0"]).apply(model)
    return model


def seconds(model: nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    model(x).square().mean().backward()
    return time.perf_counter() - start


def trained() -> torch.Tensor | None:
    """The first feed-forward matrix of a third block, (1536, 384)."""
    file = SHARED / "models/minilm_l6_sst2/model.safetensors"
    return load_file(file)["bert.encoder.layer.2.intermediate.dense.weight"].float() if file.is_file() else None


def step(number: int | None, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Change of the weight in one Adam step at a rate of 1e-4 on a random linear target."""
    model = layer(number, weight)
    before = model[0].weight.detach().clone()
    torch.manual_seed(1)
    x, y = torch.randn(512, 384), torch.randn(512, 1536)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    (model(x) - y).square().mean().backward()
    optimizer.step()
    return fold(model)[0].weight.detach() - before


def rates() -> None:
    """Losses of the first five steps after a cut; quick settings, so only the arms are to be compared."""
    from distillation import LOGITS, load, set_seed, training_arguments

    from optimum_rmtkd import RMTKDConfig, RMTKDTrainer

    recipe = RMTKDConfig(target_reduction=0.8, rounds=1, calibration_samples=96)
    for how, rate in (
        (None, 3e-4),
        ({"name": "mpo", "num_tensors": 3}, 3e-4),
        ({"name": "mpo", "num_tensors": 3}, 1e-5),
    ):
        with tempfile.TemporaryDirectory() as folder:
            set_seed(0)
            task = load("sst2", Path(folder))
            trainer = RMTKDTrainer(
                model=task.model,
                args=training_arguments(Path(folder), rate, 0, 5),
                rmtkd_config=recipe,
                objectives=LOGITS,
                reparameterization=how,
                train_dataset=task.train.select(range(512)),
                data_collator=task.collator,
            )
            trainer.train()
        losses = [round(entry["loss"], 2) for entry in trainer.state.log_history if "loss" in entry]
        print("plain" if how is None else "mpo, n = 3", f"{rate:g}", losses, flush=True)


def main() -> None:
    if sys.argv[1:] == ["rates"]:
        rates()
        return
    models = {number: layer(number) for number in (None, *TENSORS)}
    times: dict[tuple, list[float]] = {}
    for batch, repeats in ((512, 15), (4096, 8)):
        x = torch.randn(batch, 384)
        for _ in range(repeats):
            for number, model in models.items():
                times.setdefault((number, batch), []).append(seconds(model, x))
    best = {key: min(values) for key, values in times.items()}
    plain, weight = step(None), trained()
    columns = ("tensors", "parameters", "time, 512 tokens", "time, 4,096 tokens", "length of an Adam step")
    print("| " + " | ".join((*columns, "of a trained matrix", "cosine with the plain step")) + " |")
    print("|" + 7 * "---|")
    for number in TENSORS:
        moved = step(number)
        modes = MatrixProductOperator(number).modes_of(plain)
        cosine = float((moved * plain).sum() / moved.norm() / plain.norm())
        ratios = [best[number, batch] / best[None, batch] for batch in (512, 4096)]
        steep = "-" if weight is None else f"x{float(step(number, weight).norm() / step(None, weight).norm()):.2f}"
        cells = [number, f"x{mpo_factor(modes):.2f}", *(f"x{r:.2f}" for r in ratios)]
        cells += [f"x{float(moved.norm() / plain.norm()):.2f}", steep]
        print("| " + " | ".join(map(str, [*cells, f"{cosine:.2f}"])) + " |")


if __name__ == "__main__":
    main()
