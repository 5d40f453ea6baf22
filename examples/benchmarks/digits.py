"""A small ViT on scikit-learn's handwritten digits: points lost at several sizes, with controls.

    python examples/benchmarks/digits.py [-o digits.json]      minutes on one core; needs no network and no other data

One teacher (25 epochs), three seeds of calibration and distillation (20 epochs) for each size; no width is given. 599 digits are
held out, so one digit is 0.17 points. Controls, one seed, at the same data and steps:

    paper         mp_quantile edge, layer by layer, teacher before each cut, no hidden states, no refit
    random basis  the same target, uniform shares, random subspaces and neurons
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path

from torch.utils.data import DataLoader
from transformers import default_data_collator, set_seed
from transformers.utils import logging

from optimum_rmtkd import RMTKDConfig, count_parameters, narrow
from optimum_rmtkd.commands.demo import DemoOptions, accuracy, build_vit, distil_narrow, read_digits, train_dense
from optimum_rmtkd.commands.timing import compare_latency


PAPER = {
    "edge_estimator": "mp_quantile",
    "importance": "variance",
    "schedule": "layerwise",
    "teacher": "previous",
    "hidden_weight": 0.0,
    "sample_unit": "token",
    "refit": False,
}
CONTROLS = {"paper": PAPER, "random basis": {"basis": "random", "allocation": "uniform"}}
SEEDS = (0, 1, 2)


def main() -> None:
    """Train the teacher, run all arms, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=None, help="Also write the rows as JSON.")
    output = parser.parse_args().output
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

        def measure(name: str, target: float, epochs: int, seeds: tuple[int, ...], **changes) -> dict:
            lost, removed, ratio = [], [], 0.0
            for seed in seeds:
                set_seed(seed)
                recipe = RMTKDConfig(target_reduction=target, seed=seed, **changes)
                if epochs:
                    chosen = dataclasses.replace(options, seed=seed, distil_epochs=epochs)
                    student = distil_narrow(dense, digits, recipe, chosen, Path(folder))
                else:
                    student = narrow(dense, loader, recipe, progress=False)
                lost.append(100 * (teacher - accuracy(student, digits)))
                removed.append(1 - count_parameters(student) / before)
                ratio = compare_latency(dense, student, {"pixel_values": digits.test_pixels[:256]}, repeats=5).ratio
            spread = f"{statistics.mean(lost):.2f} ({min(lost):.2f} .. {max(lost):.2f})"
            print(
                f"{name:14} {target:6} {statistics.mean(removed):8.1%} {epochs:6} {len(seeds):5} {spread:>22} {ratio:8.1f}x",
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

        rows = [
            measure("rmtkd", target, epochs, SEEDS) for target, epochs in ((0.5, 0), (0.63, 20), (0.8, 20), (0.9, 20))
        ]
        rows += [measure(name, 0.8, 20, SEEDS[:1], **changes) for name, changes in CONTROLS.items()]
    if output is not None:
        output.write_text(
            json.dumps({"teacher": teacher, "parameters": before, "rows": rows}, indent=1) + "\n", encoding="utf8"
        )


if __name__ == "__main__":
    main()
