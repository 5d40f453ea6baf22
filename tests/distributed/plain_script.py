"""Launched by torchrun: transformers' own Trainer trains a narrowed checkpoint under FSDP2, or DeepSpeed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import optimum_rmtkd  # noqa: F401  (the classes of narrowed models)
from optimum_rmtkd.trainer.swap import built_whole

from ..trainer.conftest import toy_data
from .leaving import leave
from .sharding import join, open_the_door, options, whole, zero


def gathered(trainer):
    """What the engine holds, on every process."""
    import deepspeed

    parameters = list(trainer.model.parameters())
    with deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")]):
        return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def away(trainer, weights, folder) -> float:
    """How far what is saved and loaded again is from what was trained."""
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()
    with built_whole():
        loaded = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    return max(float((weights[name] - tensor).abs().max()) for name, tensor in loaded.items())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--stage", type=int, help="of DeepSpeed's ZeRO")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.stage is None:
        open_the_door()
    args = TrainingArguments(
        str(asked.out / "run"),
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **(options() if asked.stage is None else {"deepspeed": zero(asked.stage)}),
    )
    if asked.stage is not None:
        join()
    model = AutoModelForSequenceClassification.from_pretrained(asked.model)  # in partitions under ZeRO-3
    trainer = Trainer(model, args, train_dataset=toy_data())
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    rank = trainer.args.process_index
    weights = whole(trainer.model) if asked.stage is None else gathered(trainer)
    torch.save(weights, asked.out / f"weights-{rank}.pt")
    values = {
        "class": type(trainer.model).__name__,
        "reloaded": None if asked.stage is None else away(trainer, weights, asked.out / "final"),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    (asked.out / f"result-{rank}.json").write_text(json.dumps(values))
    leave(trainer.accelerator)


if __name__ == "__main__":
    main()
