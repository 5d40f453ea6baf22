"""Launched by torchrun: distillation without a cut, ragged batches, an adapter and a matrix product operator."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers

from optimum_rmtkd.config import RMTKDConfig
from optimum_rmtkd.trainer import RMTKDTrainer, RMTKDTrainingArguments

from ..trainer.conftest import ragged, tiny_bert


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    trainer = RMTKDTrainer(
        model=tiny_bert(hidden_size=16, cls=transformers.BertForTokenClassification, **still),
        args=RMTKDTrainingArguments(
            str(options.out / "run"),
            max_steps=6,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=8,
            gradient_accumulation_steps=options.accumulation,
            optim="sgd",
            learning_rate=0.05,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        rmtkd_config=RMTKDConfig(schedule="none", calibration_samples=32),
        teacher_model=tiny_bert(seed=3, cls=transformers.BertForTokenClassification, **still),
        objectives={
            "task": {},
            "kl": {},
            "projected_feature": {"projection": {"name": "pca", "dim": 8}, "layers": "uniform"},
            "attention_relation": {},
        },
        reparameterization="mpo",
        train_dataset=ragged(kind="token"),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    rank = trainer.args.process_index
    torch.save(trainer.model.state_dict(), options.out / f"weights-{rank}.pt")
    values = {
        "processes": trainer.args.world_size,
        "wrapped": type(trainer.model_wrapped).__name__,
        "losses": {
            f"{e['step']}/{k}": v for e in trainer.state.log_history for k, v in e.items() if k.startswith("loss")
        },
        "adapters": [p.detach().tolist() for p in trainer.extras.parameters],
    }
    (options.out / f"result-{rank}.json").write_text(json.dumps(values))


if __name__ == "__main__":
    main()
