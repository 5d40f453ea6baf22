"""Launched by torchrun: a causal student that trains on its own samples, with an adapter to a wider teacher."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers

from optimum_rmtkd.config import RMTKDConfig
from optimum_rmtkd.distillation import AdaptiveOffPolicy
from optimum_rmtkd.trainer import RMTKDTrainer, RMTKDTrainingArguments

from ..trainer.conftest import ragged
from ..trainer.test_accumulation import tiny_gpt2
from .leaving import leave


def main(given=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--resume", default=None)
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    policy = AdaptiveOffPolicy(max_new_tokens=3, increase=0.8, tolerance=-9.0)
    trainer = RMTKDTrainer(
        model=tiny_gpt2(n_embd=16),
        args=RMTKDTrainingArguments(
            str(options.out / "run"),
            max_steps=8,
            per_device_train_batch_size=4,
            learning_rate=0.01,
            logging_steps=1,
            save_steps=4,
            eval_strategy="steps",
            eval_steps=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        rmtkd_config=RMTKDConfig(schedule="none", calibration_samples=32),
        teacher_model=tiny_gpt2(seed=1),
        objectives={"kl": {}, "projected_feature": {"projection": {"name": "pca", "dim": 8}}},
        transforms=policy,
        train_dataset=ragged(kind="causal"),
        eval_dataset=ragged(8, kind="causal"),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=options.resume)
    rank = trainer.args.process_index
    torch.save(trainer.model.state_dict(), options.out / f"weights-{rank}.pt")
    values = {
        "processes": trainer.args.world_size,
        "adapters": [p.detach().tolist() for p in trainer.run.tutor.companions.parameters],
        "buffer": [batch["input_ids"].tolist() for batch in policy.buffer],
    }
    (options.out / f"result-{rank}.json").write_text(json.dumps(values))
    return trainer.accelerator


if __name__ == "__main__":
    leave(main())
