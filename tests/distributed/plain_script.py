"""Launched by torchrun: transformers' own Trainer trains a narrowed checkpoint under FSDP2."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import optimum_rmtkd  # noqa: F401  (the classes of narrowed models)

from ..trainer.conftest import toy_data
from .leaving import leave
from .sharding import open_the_door, options, whole


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    open_the_door()
    trainer = Trainer(
        AutoModelForSequenceClassification.from_pretrained(asked.model),
        TrainingArguments(
            str(asked.out / "run"),
            max_steps=8,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **options(),
        ),
        train_dataset=toy_data(),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    rank = trainer.args.process_index
    torch.save(whole(trainer.model), asked.out / f"weights-{rank}.pt")
    values = {
        "class": type(trainer.model).__name__,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    (asked.out / f"result-{rank}.json").write_text(json.dumps(values))
    leave(trainer.accelerator)


if __name__ == "__main__":
    main()
