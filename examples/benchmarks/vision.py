"""Channels of a small ResNet, cut at once and without training: how much of its answers is left.

    python examples/benchmarks/vision.py run --depth 20 --target 0.3 -o results
    python examples/benchmarks/vision.py table -o results

CIFAR-10 (as JPEG): calibrated on 512 training images, measured on 2,000 test images. `run` measures what
--output/vision.jsonl does not hold yet, one JSON line each. Needs RMTKD_SHARED, the folder of data and models.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from optimum_rmtkd import RMTKDConfig, count_parameters
from optimum_rmtkd.surgery import reduce
from optimum_rmtkd.surgery.checks import anatomy_of, positions_of
from optimum_rmtkd.surgery.costs import flops_of


sys.path.insert(0, str(Path(__file__).parents[1]))
from plain_cnn import images_of, logits_of, pretrained  # noqa: E402


SHARED = Path(os.environ.get("RMTKD_SHARED", "../shared"))
SITES = {"inner": ("channels",), "all": None}


@dataclass
class Arguments:
    """What to run."""

    action: str = field(metadata={"help": "run or table."})
    output: str = field(default="vision_results", metadata={"aliases": ["-o"], "help": "Folder of results."})
    depth: int = field(default=20, metadata={"help": "Of the ResNet: 20, 32, 44 or 56."})
    targets: list[float] = field(default_factory=lambda: [0.3], metadata={"help": "Shares to remove."})
    kinds: list[str] = field(
        default_factory=lambda: ["target_reduction", "target_flops"], metadata={"help": "Of parameters, of work."}
    )
    sites: list[str] = field(default_factory=lambda: ["inner", "all"], metadata={"help": "inner, all."})
    importance: list[str] = field(default_factory=lambda: ["variance"], metadata={"help": "variance, fisher."})
    allocation: list[str] = field(default_factory=lambda: ["loss", "uniform"], metadata={"help": "loss, uniform."})
    samples: int = field(default=512, metadata={"help": "Images of calibration."})
    judged: int = field(default=2000, metadata={"help": "Images of the test."})


def rows_of(output: Path) -> list[dict]:
    file = output / "vision.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run(arguments: Arguments, output: Path) -> None:
    model = pretrained(SHARED / f"models/resnet{arguments.depth}_cifar10")
    calibration = images_of(SHARED / "data", "train", arguments.samples)[0]
    batches = [{"pixel_values": part} for part in calibration.split(64)]
    pixels, labels = images_of(SHARED / "data", "test", arguments.judged)
    theirs = logits_of(model, pixels)
    print(f"dense: {100 * float((theirs.argmax(-1) == labels).double().mean()):.2f} %", flush=True)
    choices = (arguments.kinds, arguments.targets, arguments.sites, arguments.importance, arguments.allocation)
    for kind, target, sites, importance, allocation in itertools.product(*choices):
        key = {"depth": arguments.depth, "kind": kind, "target": target, "sites": sites}
        key |= {"importance": importance, "allocation": allocation}
        if any(key.items() <= row.items() for row in rows_of(output)):
            continue
        recipe = RMTKDConfig(round_to=1, min_width=2, calibration_samples=arguments.samples, sites=SITES[sites])
        recipe = recipe.replace(importance=importance, allocation=allocation, **{kind: target})
        began = time.process_time()
        found = reduce(model, batches, recipe, progress=False)
        ours = logits_of(found.model.eval(), pixels)
        row = key | {"seconds": time.process_time() - began, "parameters": count_parameters(found.model)}
        work = [flops_of(m, anatomy_of(m, recipe), positions_of(m, batches))({}) for m in (model, found.model)]
        row["flops"] = work[1] / work[0]
        row["accuracy"] = 100 * float((ours.argmax(-1) == labels).double().mean())
        row["agreement"] = 100 * float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
        row["divergence"] = float(
            (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).mean()
        )
        row["widths"] = {site.name: site.width_after for site in found.sites}
        with (output / "vision.jsonl").open("a", encoding="utf8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def table(output: Path) -> None:
    print("| removed | sites | prices | widths | parameters | work | accuracy | agreement | KL |\n" + "|---" * 9 + "|")
    for row in rows_of(output):
        removed = f"{100 * row['target']:.0f} % of {'work' if row['kind'] == 'target_flops' else 'parameters'}"
        print(
            f"| {removed} | {row['sites']} | {row['importance']} | {row['allocation']} | {row['parameters']:,} "
            f"| {row['flops']:.3f} | {row['accuracy']:.2f} | {row['agreement']:.2f} | {row['divergence']:.3f} |"
        )


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(["--action", *sys.argv[1:]])
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    run(arguments, output) if arguments.action == "run" else table(output)


if __name__ == "__main__":
    main()
