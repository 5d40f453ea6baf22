"""Launched by torchrun: one short run with two cuts; every process writes what it ended with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
import transformers

from optimum_rmtkd.config import RMTKDConfig
from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.trainer import RMTKDTrainer, RMTKDTrainingArguments

from ..trainer.conftest import tiny_bert, toy_data
from .leaving import leave


class Broken:
    """Two batches, of which the second cannot be read."""

    def __len__(self):
        return 2

    def __iter__(self):
        yield {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}
        raise ValueError("no such column")


def main(given=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--sites", nargs="*", default=None)
    parser.add_argument("--target", type=float, default=0.6)
    parser.add_argument("--resume", default=None)
    parser.add_argument("--broken-rank", type=int, default=None, help="whose calibration data breaks off")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    whole = torch.ones(
        10, dtype=torch.long
    )  # no padding: means over tokens are then the same however a batch is split
    trainer = RMTKDTrainer(
        model=tiny_bert(),
        args=RMTKDTrainingArguments(
            str(options.out / "run"),
            max_steps=6,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=8,
            gradient_accumulation_steps=options.accumulation,
            optim="sgd",
            learning_rate=0.05,
            logging_steps=1,
            save_steps=4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        rmtkd_config=RMTKDConfig(
            target_reduction=options.target,
            sites=options.sites,
            rounds=2,
            stage_share=0.4,
            fit_share=0,
            calibration_samples=48,
            min_width=4,
            round_to=4,
        ),
        train_dataset=[dict(sample, attention_mask=whole) for sample in toy_data()],
        eval_dataset=toy_data(16, seed=2),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if trainer.args.process_index == options.broken_rank:
        trainer.run.host.calibration_batches = lambda *_, **options: Broken()
    rank = trainer.args.process_index
    if options.broken_rank is not None:
        with pytest.raises((RMTKDError, ValueError)) as caught:
            trainer.train()
        (options.out / f"error-{rank}.txt").write_text(str(caught.value))
        return trainer.accelerator
    output = trainer.train(resume_from_checkpoint=options.resume)
    torch.save(trainer.model.state_dict(), options.out / f"weights-{rank}.pt")
    values = {
        "processes": trainer.args.world_size,
        "wrapped": type(trainer.model_wrapped).__name__,
        "find_unused": trainer.args.ddp_find_unused_parameters,
        "stages": [stage.to_dict() for stage in trainer.stages],
        "losses": {
            f"{e['step']}/{k}": v for e in trainer.state.log_history for k, v in e.items() if k.startswith("loss")
        },
        "reduction": output.metrics["reduction"],
    }
    (options.out / f"result-{rank}.json").write_text(json.dumps(values))
    return trainer.accelerator


if __name__ == "__main__":
    leave(main())
