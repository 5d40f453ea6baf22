"""Launched by torchrun: distillation without a cut of ragged batches, by the parts that were asked for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import datasets
import torch
import transformers
from accelerate.utils import DistributedType

from optimum_rmtkd.config import RMTKDConfig
from optimum_rmtkd.distillation import CachedTeacher, OnlineTeacher, cache_answers
from optimum_rmtkd.trainer import RMTKDTrainer, RMTKDTrainingArguments

from ..trainer.conftest import ragged, tiny_bert
from ..trainer.test_language_models import tiny_llama
from .leaving import leave, wait
from .sharding import tensors, zero


STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}


def teacher(seed=3):
    return tiny_bert(seed=seed, cls=transformers.BertForTokenClassification, **STILL)


def features():
    """Adapters that DDP does not know, tensors that it does."""
    objectives = {
        "task": {},
        "kl": {},
        "projected_feature": {"projection": {"name": "pca", "dim": 8}, "layers": "uniform"},
        "attention_relation": {},
    }
    return {"objectives": objectives, "reparameterization": "mpo", "teacher_model": teacher()}


def divergences():
    """A teacher that is trained beside the student, and a term that looks at no data."""
    objectives = {
        "skew_kl": {},
        "back": {"name": "skew_kl", "reverse": True},
        "jensen_shannon": {},
        "tensor_alignment": {"weight": 1.0},
    }
    student = tiny_bert(cls=transformers.BertForTokenClassification, **STILL)
    online = OnlineTeacher(student, rank=2, learning_rate=1e-2)
    return {"objectives": objectives, "reparameterization": "mpo", "teacher_model": online, "model": student}


def cached():
    """Answers from the data, in place of a teacher."""
    rows = [{k: v.tolist() for k, v in row.items()} for row in ragged(kind="token")]
    train = cache_answers(teacher(), datasets.Dataset.from_list(rows), transformers.default_data_collator, k=2)
    parts = {"objectives": ["task", "kl"], "reparameterization": "powerpropagation"}
    return parts | {"teacher_model": CachedTeacher(), "train_dataset": train}


def several():
    """Two teachers, and a schedule of a weight."""
    objectives = {"kl": {"weight": {"start": 1, "end": 0}}, "projected_feature": {"projection": "marchenko_pastur"}}
    return {"objectives": objectives, "teacher_model": [(teacher(3), 2.0), (teacher(4), 1.0)]}


def beside():
    """All that is trained beside a student, and nothing in its place."""
    student = tiny_bert(cls=transformers.BertForTokenClassification, **STILL)
    objectives = {
        "task": {},
        "skew_kl": {},
        "projected_feature": {"projection": {"name": "pca", "dim": 8}, "layers": "uniform"},
        "attention_relation": {},
    }
    online = OnlineTeacher(student, rank=2, learning_rate=1e-2)
    return {"objectives": objectives, "teacher_model": online, "model": student}


def words():
    """A language model, whose logits are made a few positions at a time."""
    return {
        "model": tiny_llama(),
        "teacher_model": tiny_llama(3),
        "objectives": ["task", "kl"],
        "train_dataset": ragged(kind="causal"),
        "rmtkd_config": RMTKDConfig(schedule="none", logits_chunk=5),
    }


PARTS = {part.__name__: part for part in (features, divergences, cached, several, beside, words)}


def main(given=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", choices=PARTS, default="features")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--stage", type=int, help="of DeepSpeed's ZeRO")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    parts = {
        "model": tiny_bert(hidden_size=16, cls=transformers.BertForTokenClassification, **STILL),
        "train_dataset": ragged(kind="token"),
    }
    parts |= {"rmtkd_config": RMTKDConfig(schedule="none", calibration_samples=32)} | PARTS[options.parts]()
    transformers.set_seed(0)
    trainer = RMTKDTrainer(
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
            deepspeed=None if options.stage is None else zero(options.stage),
        ),
        **parts,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    rank = trainer.args.process_index
    torch.save(tensors(trainer.model), options.out / f"weights-{rank}.pt")
    values = {
        "processes": trainer.args.world_size,
        "wrapped": type(trainer.model_wrapped).__name__,
        "losses": {
            f"{e['step']}/{k}": v for e in trainer.state.log_history for k, v in e.items() if k.startswith("loss")
        },
        "adapters": [p.detach().tolist() for p in trainer.run.tutor.companions.parameters],
    }
    (options.out / f"result-{rank}.json").write_text(json.dumps(values))
    return trainer.accelerator


if __name__ == "__main__":
    used = main()
    # to end as a script does that leaves its group behind
    (leave if used.distributed_type == DistributedType.DEEPSPEED else wait)(used)
