"""Narrow a sentence encoder and distil it from its former self on plain text: features only, no label is read.

    python examples/sentence_embeddings.py --model ./all-MiniLM-L6-v2 --train_files stsb_train.parquet \\
        --pairs_file stsb_validation.parquet --target-reduction 0.5 --output_dir out --num_train_epochs 2 \\
        --learning_rate 5e-4 --per_device_train_batch_size 64

Training texts come from every string column of `--train_files` (csv, json or parquet), each text once. `--pairs_file`
holds two text columns and a score; it is used for Spearman's correlation before and after, in per cent, and for
nothing else. The embedding is the mean over tokens, as sentence-transformers takes it. It gets narrower with the
model: the cosines are what is kept. `--sites intermediate attention_qk attention_vo embedding` keeps its width.

Every option of `transformers.TrainingArguments` is an option here; `--recipe FILE` reads any field of `RMTKDConfig`
from JSON. With sentence-transformers installed, `OUT/sentence-transformers` is a folder that
`SentenceTransformer(...)` loads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, HfArgumentParser

from optimum_rmtkd import RMTKDConfig, RMTKDTrainer, RMTKDTrainingArguments, count_parameters, register_objective
from optimum_rmtkd.objectives import DistillationObjective, HiddenStateLoss


@dataclass
class EmbeddingArguments:
    model: str = field(metadata={"help": "Hub name or local folder of an encoder."})
    train_files: list[str] = field(metadata={"help": "Tables whose string columns are the training texts."})
    pairs_file: str = field(metadata={"help": "Table of two text columns and a similarity score, for the evaluation."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})


@dataclass
class ReductionArguments:
    target_reduction: float | None = field(default=None, metadata={"help": "Share of the parameters to remove."})
    sites: list[str] | None = field(default=None, metadata={"help": "What is narrowed; without it all there is."})
    recipe: str | None = field(default=None, metadata={"help": "JSON file of fields of RMTKDConfig."})

    def config(self, seed: int) -> RMTKDConfig:
        config = RMTKDConfig.from_json_file(self.recipe) if self.recipe else RMTKDConfig()
        given = {"target_reduction": self.target_reduction, "sites": self.sites and tuple(self.sites)}
        return config.replace(seed=seed, **{name: value for name, value in given.items() if value is not None})


@register_objective
class CosineSimilarity(DistillationObjective):
    """Mean squared difference of the cosines of all pairs of sentences of a batch, student against teacher.

    Cosines need no common width, so this holds whatever happens to the stream. Times 100: cosines differ by a tenth.
    """

    name = "cosine"

    def forward(self, step):
        ours = embed(step.student_outputs["last_hidden_state"], step.mask)
        theirs = embed(step.teacher_outputs["last_hidden_state"], step.mask)
        return 100 * (ours @ ours.T - theirs @ theirs.T).square().mean()


def embed(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, d) and a mask (batch, tokens) -> (batch, d) means over tokens, of length one, fp32."""
    kept = mask.unsqueeze(-1).float()
    return torch.nn.functional.normalize((states.float() * kept).sum(1) / kept.sum(1).clamp_min(1), dim=-1)


def read(path: str) -> Dataset:
    kind = {"csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}.get(path.rsplit(".", 1)[-1])
    if kind is None:
        raise ValueError(f"{path}: expected a csv, json, jsonl or parquet file.")
    return load_dataset(kind, data_files=path, split="train")


def string_columns(rows: Dataset) -> list[str]:
    return [
        name for name, feature in rows.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]


def training_texts(paths: list[str], tokenizer, max_length: int) -> Dataset:
    """Each text of the tables once, tokenized."""
    texts = dict.fromkeys(text for rows in map(read, paths) for name in string_columns(rows) for text in rows[name])
    texts = Dataset.from_dict({"text": list(texts)})
    return texts.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=max_length),
        batched=True,
        remove_columns="text",
    )


def pair_columns(pairs: Dataset) -> tuple[str, str, str]:
    """Names of the two text columns and of the score."""
    texts = string_columns(pairs)
    scores = [name for name in ("label", "score", "similarity") if name in pairs.column_names]
    if len(texts) < 2 or not scores:
        raise ValueError(
            f"--pairs_file has the columns {', '.join(pairs.column_names)}: expected two of strings, and a number "
            "called label, score or similarity."
        )
    return texts[0], texts[1], scores[0]


@torch.inference_mode()
def spearman(model, tokenizer, pairs: Dataset, max_length: int, batch_size: int = 64) -> float:
    """100 x Spearman's rank correlation of cosine and score."""
    from scipy.stats import spearmanr

    model.eval()

    def encode(texts: list[str]) -> torch.Tensor:
        found = []
        for start in range(0, len(texts), batch_size):
            chunk = texts[start : start + batch_size]
            batch = tokenizer(chunk, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
            batch = batch.to(model.device)
            found.append(embed(model(**batch).last_hidden_state, batch["attention_mask"]))
        return torch.cat(found)

    first, second, score = pair_columns(pairs)
    cosines = (encode(pairs[first][:]) * encode(pairs[second][:])).sum(-1)
    return 100 * float(spearmanr(cosines.cpu().numpy(), pairs[score][:]).statistic)


def save_sentence_transformer(folder: Path, max_length: int) -> None:
    """The same model as `SentenceTransformer` likes it: encoder, mean pooling, normalisation."""
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    except ImportError:
        print("sentence-transformers is not installed: only the transformers folder was written")
        return
    encoder = Transformer(str(folder), max_seq_length=max_length)
    width = encoder.get_embedding_dimension()
    SentenceTransformer(modules=[encoder, Pooling(width, "mean"), Normalize()]).save_pretrained(
        str(folder / "sentence-transformers")
    )


def main() -> None:
    parser = HfArgumentParser((EmbeddingArguments, ReductionArguments, RMTKDTrainingArguments))
    arguments, reduction, training = parser.parse_args_into_dataclasses()
    if Path(arguments.model).resolve() == Path(training.output_dir).resolve():
        parser.error(f"--output_dir {training.output_dir} is the model itself")

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModel.from_pretrained(arguments.model, dtype=torch.float32)
    pairs = read(arguments.pairs_file)
    before = spearman(model, tokenizer, pairs, arguments.max_length)
    parameters = count_parameters(model)
    trainer = RMTKDTrainer(
        model=model,
        args=training,
        rmtkd_config=reduction.config(training.seed),
        objectives=[HiddenStateLoss(1.0), CosineSimilarity(1.0)],  # no task loss: the data needs no labels
        train_dataset=training_texts(arguments.train_files, tokenizer, arguments.max_length),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    small = trainer.accelerator.unwrap_model(trainer.model)
    after = spearman(small, tokenizer, pairs, arguments.max_length)
    trainer.save_model()
    if trainer.is_world_process_zero():
        save_sentence_transformer(Path(training.output_dir), arguments.max_length)
        removed = 1 - count_parameters(small) / parameters
        print(f"removed {removed:.1%}, embedding width {small.config.hidden_size}")
        print(f"Spearman {before:.2f} -> {after:.2f} ({after - before:+.2f} points)")


if __name__ == "__main__":
    main()
