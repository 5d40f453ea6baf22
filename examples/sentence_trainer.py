"""Train a sentence encoder with the trainer of sentence-transformers, and narrow the transformer inside it on the way.

    python examples/sentence_trainer.py --model ./all-MiniLM-L6-v2 --train_file stsb_train.parquet \\
        --validation_file stsb_validation.parquet --target_reduction 0.5 --output_dir out --num_train_epochs 2 \\
        --learning_rate 5e-4 --per_device_train_batch_size 64

The tables (csv, json, jsonl or parquet) hold two columns of texts and, last, a score of their similarity; the loss
is `CoSENTLoss` on the scores. Beside it the hidden states of the narrowed transformer are distilled from the uncut
one, on the texts of both columns. The embedding gets as wide as the stream that is left; `--keep_width` leaves it as
it is. Every option of `SentenceTransformerTrainingArguments` is an option here. `examples/sentence_embeddings.py`
needs no scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from transformers import HfArgumentParser

from optimum_rmtkd import RMTKDConfig, RMTKDMixin


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "Hub name or local folder of a sentence encoder."})
    train_file: str = field(metadata={"help": "Table of two texts and a score."})
    validation_file: str = field(metadata={"help": "The same, for the evaluation."})
    columns: list[str] = field(
        default_factory=lambda: ["sentence1", "sentence2", "label"],
        metadata={"help": "Names of the two texts and of the score."},
    )
    target_reduction: float = field(default=0.5, metadata={"help": "Share of the transformer's parameters to remove."})
    keep_width: bool = field(default=False, metadata={"help": "Embeddings keep their number of features."})


class NarrowingSentenceTrainer(RMTKDMixin, SentenceTransformerTrainer):
    """SentenceTransformerTrainer, which narrows the transformer inside its model while it trains it."""


def read(path: str, columns: list[str]):
    kind = path.rsplit(".", 1)[-1]
    return load_dataset({"jsonl": "json"}.get(kind, kind), data_files=path, split="train").select_columns(columns)


def main() -> None:
    script, training = HfArgumentParser(
        (ScriptArguments, SentenceTransformerTrainingArguments)
    ).parse_args_into_dataclasses()
    sites = ("embedding", "intermediate", "attention_qk", "attention_vo") if script.keep_width else None
    model = SentenceTransformer(script.model, model_kwargs={"dtype": torch.float32})  # as it is trained
    validation = read(script.validation_file, script.columns)
    evaluator = EmbeddingSimilarityEvaluator(*(validation[name][:] for name in script.columns), name="dev")
    before = evaluator(model)
    training.metric_for_best_model, training.greater_is_better = "eval_dev_spearman_cosine", True
    trainer = NarrowingSentenceTrainer(
        model=model,
        args=training,
        rmtkd_config=RMTKDConfig(target_reduction=script.target_reduction, sites=sites, seed=training.seed),
        loss=CoSENTLoss(model),
        evaluator=evaluator,
        train_dataset=read(script.train_file, script.columns),
    )
    metrics = trainer.train().metrics
    trainer.save_model()  # SentenceTransformer(folder) loads it, after `import optimum_rmtkd`
    if trainer.is_world_process_zero():
        after, name = evaluator(model), evaluator.primary_metric
        print(f"removed {metrics['reduction']:.1%}, {len(model.encode('a sentence'))} features an embedding")
        print(f"{name}: {before[name]:.4f} -> {after[name]:.4f}")


if __name__ == "__main__":
    main()
