"""Whole blocks against widths at equal total parameters: accuracy, divergence and time, without training.

    python examples/benchmarks/depth.py run --targets 0.5 0.63 0.8 -o results
    python examples/benchmarks/depth.py run --targets 0.5 0.63 --trim -o results      the vocabulary trimmed first
    python examples/benchmarks/depth.py table -o results

`minilm_l6_sst2` on SST-2: cut to the same size with widths alone and with `block` among the sites, the calibration
rows the same. `run` measures what --output/depth.jsonl does not hold yet, one JSON line each. A ratio is the time of
the dense model over that of the small one, at batch 1 and 128 tokens, in one process. Needs RMTKD_SHARED, the folder
of data and checkpoints.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser
from transformers.utils import logging

from optimum_rmtkd import RMTKDConfig, count_parameters, narrow, trim_vocabulary
from optimum_rmtkd.models.timing import compare_latency


SHARED = Path(os.environ.get("RMTKD_SHARED", "../shared"))
WIDTHS = ("hidden", "embedding", "intermediate", "attention_qk", "attention_vo")
KINDS = {"widths": WIDTHS, "widths and blocks": ("block", *WIDTHS)}


@dataclass
class Arguments:
    """What to run."""

    action: str = field(metadata={"help": "run or table."})
    output: str = field(default="depth_results", metadata={"aliases": ["-o"], "help": "Folder of results."})
    targets: list[float] = field(default_factory=lambda: [0.5, 0.63, 0.8], metadata={"help": "target_reduction."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of the calibration rows."})
    samples: int = field(default=1024, metadata={"help": "Calibration rows."})
    trim: bool = field(default=False, metadata={"help": "Trim the vocabulary to the training rows first."})
    repeats: int = field(default=40, metadata={"help": "Passes of each model in a measurement of time."})


def batches_of(tokenizer: Any, rows: Dataset, size: int) -> list[dict[str, torch.Tensor]]:
    """Batches of texts of about one length, with labels."""
    rows = rows.map(lambda row: {"length": len(row["sentence"])}).sort("length")
    found = []
    for batch in rows.iter(size):
        given = tokenizer(batch["sentence"], padding=True, truncation=True, return_tensors="pt")
        found.append({**given, "labels": torch.tensor(batch["label"])})
    return found


@torch.no_grad()
def logits_of(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """(rows, classes)"""
    return torch.cat([model(**batch).logits for batch in batches]).double()


def run(arguments: Arguments) -> None:
    """All combinations that are not there yet."""
    file = Path(arguments.output) / "depth.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = SHARED / "models/minilm_l6_sst2"
    uncut = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=128)
    train, dev = (
        Dataset.from_parquet(str(SHARED / f"data/sst2_{split}.parquet")) for split in ("train", "validation")
    )
    model = uncut
    if arguments.trim:
        model, tokenizer, _ = trim_vocabulary(uncut, tokenizer, train["sentence"][:])
    judged = batches_of(tokenizer, dev, 64)
    true, labels = logits_of(model, judged), torch.cat([batch["labels"] for batch in judged])
    text = {"input_ids": torch.randint(5, 500, (1, 128), generator=torch.Generator().manual_seed(0))}
    for target, seed, kind in product(arguments.targets, arguments.seeds, KINDS):
        key = {"target": target, "seed": seed, "kind": kind, "samples": arguments.samples, "trim": arguments.trim}
        if any(key.items() <= line.items() for line in read(file)):
            continue
        rows = train.shuffle(seed=seed).select(range(arguments.samples))
        config = RMTKDConfig(target_reduction=target, sites=KINDS[kind], calibration_samples=arguments.samples)
        began = time.process_time()
        small = narrow(model, batches_of(tokenizer, rows, 32), config).eval()
        seconds, found = time.process_time() - began, logits_of(small, judged)
        p, q = true.log_softmax(-1), found.log_softmax(-1)
        right = [float((x.argmax(-1) == labels).double().mean()) for x in (true, found)]
        line = key | {
            "removed": 1 - count_parameters(small) / count_parameters(uncut),
            "blocks": small.config.num_hidden_layers,
            "lost": 100 * (right[0] - right[1]),
            "divergence": float((p.exp() * (p - q)).sum(-1).mean()),
            "ratio": compare_latency(model, small, text, repeats=arguments.repeats).ratio,
            "seconds": seconds,
        }
        with file.open("a", encoding="utf8") as out:
            out.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def read(file: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()] if file.exists() else []


def table(arguments: Arguments) -> None:
    """One line a cut; means over the seeds."""
    lines = read(Path(arguments.output) / "depth.jsonl")
    print("| vocabulary | removed | sites | blocks | points lost | KL | dense / narrow, batch 1 | seeds |")
    print("|---|---|---|---|---|---|---|---|")
    for trim, target, kind in sorted({(line["trim"], line["target"], line["kind"]) for line in lines}):
        group = [x for x in lines if (x["trim"], x["target"], x["kind"]) == (trim, target, kind)]
        mean = {n: sum(x[n] for x in group) / len(group) for n in ("removed", "lost", "divergence", "ratio")}
        blocks = ", ".join(sorted({str(x["blocks"]) for x in group}))
        print(
            f"| {'trimmed' if trim else 'whole'} | {mean['removed']:.1%} | {kind} | {blocks} | {mean['lost']:.2f} "
            f"| {mean['divergence']:.3f} | {mean['ratio']:.2f} | {len(group)} |"
        )


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(
        ["--action", *sys.argv[1:]]
    )
    logging.set_verbosity_error()
    {"run": run, "table": table}[arguments.action](arguments)
