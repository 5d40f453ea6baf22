"""A small ViT on scikit-learn's handwritten digits: points lost at several sizes, with controls.

    python examples/benchmarks/digits.py [-o digits.json]      minutes on one core; needs no network and no other data

One teacher (25 epochs), three seeds of calibration and distillation (20 epochs) for each size; no width is given. 599
digits are held out, so one digit is 0.17 points. Controls, one seed, at the same data and steps:

    paper         mp_quantile edge, its quantile raised until the size fits, layer by layer, teacher before each cut,
                  no hidden states, no refit
    random basis  the same target, uniform shares, random subspaces and neurons
    random init   the architecture of one cut, initialised at random
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path

from controls import PAPER, RANDOM_BASIS, distil_untrained, quantile_for
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, default_data_collator, set_seed
from transformers.utils import logging

from optimum_rmtkd import RMTKDConfig, count_parameters, narrow
from optimum_rmtkd.commands.demo import (
    DemoOptions,
    accuracy,
    build_vit,
    distil_narrow,
    distillation_arguments,
    read_digits,
    train_dense,
)
from optimum_rmtkd.commands.output import check_target
from optimum_rmtkd.files import UNSIGNED, write_signed
from optimum_rmtkd.models.timing import compare_latency


CONTROLS = {"paper": PAPER, "random basis": RANDOM_BASIS, "random init": {}}
SEEDS = (0, 1, 2)
SIZES = ((0.5, 0), (0.63, 20), (0.8, 20), (0.9, 20))  # share removed, epochs


def main() -> None:
    """Train the teacher, run all arms, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=None, help="Also write the rows as JSON.")
    parser.add_argument("--controls", action="store_true", help="The controls only, in the file, too: 4 minutes.")
    arguments = parser.parse_args()
    if arguments.output is not None:
        check_target(arguments.output)
    output, sizes = arguments.output, () if arguments.controls else SIZES
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = DemoOptions()
    digits = read_digits(options.train_samples)
    set_seed(0)
    dense = build_vit(options)
    loader = DataLoader(digits.train_rows(), batch_size=256, collate_fn=default_data_collator)
    with tempfile.TemporaryDirectory() as folder:
        train_dense(dense, digits, options, Path(folder))
        before, teacher = count_parameters(dense), accuracy(dense, digits)
        print(f"teacher: {teacher:.2%}, {before:,} parameters")
        print(
            f"{'arm':14} {'target':>6} {'removed':>8} {'epochs':>6} {'seeds':>5} {'lost, points':>22} {'batch 256':>9}"
        )

        def student_of(name: str, recipe: RMTKDConfig, epochs: int) -> PreTrainedModel:
            chosen = dataclasses.replace(options, seed=recipe.seed, distil_epochs=epochs)
            if name == "paper":
                recipe = recipe.replace(tau=quantile_for(dense, loader, recipe))
            if name != "random init":
                return distil_narrow(dense, digits, recipe, chosen, Path(folder))
            student = narrow(dense, loader, recipe, progress=False)
            args = distillation_arguments(chosen, Path(folder))
            return distil_untrained(student, dense, args, recipe, train_dataset=digits.train_rows()).model.eval()

        def measure(name: str, target: float, epochs: int, seeds: tuple[int, ...], **changes) -> dict:
            lost, removed, ratio = [], [], 0.0
            for seed in seeds:
                set_seed(seed)
                recipe = RMTKDConfig(target_reduction=target, seed=seed, **changes)
                if epochs:
                    student = student_of(name, recipe, epochs)
                else:
                    student = narrow(dense, loader, recipe, progress=False)
                lost.append(100 * (teacher - accuracy(student, digits)))
                removed.append(1 - count_parameters(student) / before)
                ratio = compare_latency(dense, student, {"pixel_values": digits.test_pixels[:256]}, repeats=5).ratio
            spread = f"{statistics.mean(lost):.2f} ({min(lost):.2f} .. {max(lost):.2f})"
            print(
                f"{name:14} {target:6} {statistics.mean(removed):8.1%} {epochs:6} {len(seeds):5} {spread:>22} "
                f"{ratio:8.1f}x",
                flush=True,
            )
            return {
                "arm": name,
                "target": target,
                "epochs": epochs,
                "lost": lost,
                "removed": removed,
                "latency": ratio,
            }

        rows = [measure("rmtkd", target, epochs, SEEDS) for target, epochs in sizes]
        rows += [measure(name, 0.8, 20, SEEDS[:1], **changes) for name, changes in CONTROLS.items()]
    if output is not None:
        found = {"teacher": teacher, "parameters": before, "rows": rows, "written_by": UNSIGNED}
        write_signed(output, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
