"""Two neighbours of the family that are no option of this library, measured: why not.

    python examples/benchmarks/neighbours.py shared       # MPO with one central tensor for all layers (MPOE)
    python examples/benchmarks/neighbours.py dynamics     # is what fine-tuning changes of low rank?

Both on the 6-layer, 384-wide BERT fine-tuned on SST-2 (RMTKD_SHARED), accuracy on its 872 sentences of development, no
training.
"""

from __future__ import annotations

import sys

import torch
from text import SHARED
from transformers import AutoModel

from optimum_rmtkd.commands.data import DataArguments
from optimum_rmtkd.commands.task import evaluate, load_task
from optimum_rmtkd.reparameterization.mpo import choose_modes, mpo_contract, mpo_decompose


ROLES = ("attention.self.query", "attention.self.value", "intermediate.dense", "output.dense")
SHARED_ROLES = ("attention.self.value", "intermediate.dense")


def fine_tuned():
    files = {f"{name}_file": str(SHARED / f"data/sst2_{name}.parquet") for name in ("train", "validation")}
    return load_task(str(SHARED / "models/minilm_l6_sst2"), DataArguments(**files, max_length=128))


def shared_centre(weights: list[torch.Tensor], steps: int = 600) -> tuple[list[torch.Tensor], float]:
    """The best A_l, B_l private and C common with W_l = A_l C B_l as balanced operators of 3 tensors, by Adam on the
    error.

    Returns:
        (approximations, parameters kept over those of the matrices)
    """
    rows, columns = weights[0].shape
    modes = choose_modes(rows, 3, "balanced"), choose_modes(columns, 3, "balanced")
    # The large mode into the middle: the central tensor is to hold most parameters.
    modes = tuple((m[1], m[0], m[2]) for m in modes)
    tensors = [mpo_decompose(weight, modes) for weight in weights]
    centre = torch.nn.Parameter(torch.stack([t[1] for t in tensors]).mean(0))
    private = [[torch.nn.Parameter(t[0]), torch.nn.Parameter(t[2])] for t in tensors]
    parameters = [centre, *(p for pair in private for p in pair)]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = sum(
            (mpo_contract([a, centre, b]) - w).square().sum() for (a, b), w in zip(private, weights, strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    kept = sum(p.numel() for p in parameters) / sum(w.numel() for w in weights)
    return [mpo_contract([a, centre, b]).detach() for a, b in private], kept


def low_rank(weight: torch.Tensor, kept: float) -> torch.Tensor:
    """Truncated SVD with the share `kept` of the parameters."""
    rows, columns = weight.shape
    rank = max(1, int(kept * rows * columns / (rows + columns)))
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def shared() -> None:
    torch.manual_seed(0)
    task = fine_tuned()
    start = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    print(f"before: {100 * evaluate(task, task.model):.2f} %")
    print(
        "| matrix, all 6 layers | parameters kept | relative error, shared centre | error, SVD of that size | "
        "accuracy, shared | accuracy, SVD |"
    )
    print("|---|---|---|---|---|---|")
    for role in SHARED_ROLES:
        names = [f"bert.encoder.layer.{layer}.{role}.weight" for layer in range(6)]
        weights = [start[name] for name in names]
        found, kept = shared_centre(weights)
        plain = [low_rank(w, kept) for w in weights]
        cells = [role, f"{100 * kept:.0f} %"]
        for approximations in (found, plain):
            error = sum((a - w).square().sum() for a, w in zip(approximations, weights, strict=True))
            cells.append(f"{float((error / sum(w.square().sum() for w in weights)).sqrt()):.2f}")
        for approximations in (found, plain):
            with torch.no_grad():
                for name, value in zip(names, approximations, strict=True):
                    task.model.get_parameter(name).copy_(value)
            cells.append(f"{100 * evaluate(task, task.model):.2f} %")
        with torch.no_grad():
            for name in names:
                task.model.get_parameter(name).copy_(start[name])
        print("| " + " | ".join(cells) + " |", flush=True)


def dynamics() -> None:
    task = fine_tuned()
    origin = dict(
        AutoModel.from_pretrained(SHARED / "models/all_minilm_l6_v2", dtype=torch.float32).named_parameters()
    )
    names = [f"bert.encoder.layer.{layer}.{role}.weight" for layer in range(6) for role in ROLES]
    end = {name: task.model.get_parameter(name).detach().clone() for name in names}
    change = {name: end[name] - origin[name.removeprefix("bert.")].detach() for name in names}
    moved = sum(d.square().sum() for d in change.values()) / sum(w.square().sum() for w in end.values())
    print(
        f"fine-tuned: {100 * evaluate(task, task.model):.2f} %; relative change of the matrices "
        f"{float(moved.sqrt()):.4f}"
    )
    print("| rank of the change | share of its energy | of the weights' own energy | accuracy |")
    print("|---|---|---|---|")
    for rank in (0, 4, 16, 64):
        energy = total = own = whole = 0.0
        for name in names:
            u, s, vt = torch.linalg.svd(change[name], full_matrices=False)
            values = torch.linalg.svdvals(end[name])
            energy, total = energy + s[:rank].square().sum(), total + s.square().sum()
            own, whole = own + values[:rank].square().sum(), whole + values.square().sum()
            with torch.no_grad():
                kept = (u[:, :rank] * s[:rank]) @ vt[:rank]
                task.model.get_parameter(name).copy_(end[name] - change[name] + kept)
        cells = [
            rank,
            f"{float(energy / total):.2f}",
            f"{float(own / whole):.2f}",
            f"{100 * evaluate(task, task.model):.2f} %",
        ]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    actions = {"shared": shared, "dynamics": dynamics}
    if len(sys.argv) != 2 or sys.argv[1] not in actions:
        raise SystemExit(__doc__)
    actions[sys.argv[1]]()
