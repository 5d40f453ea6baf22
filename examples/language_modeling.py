"""Narrow a causal or masked language model on text, and distil it back, in the one `train()`.

    python examples/language_modeling.py --model ./stories260k_llama --train_file tinystories_sub_train.parquet \\
        --validation_file tinystories_sub_validation.parquet --target_reduction 0.2 \\
        --block_size 256 --max_train_samples 2000 --output_dir out --max_steps 300 --learning_rate 1e-3

    torchrun --nproc_per_node 2 examples/language_modeling.py ...        # several devices: nothing else changes

Texts: the lines of a .txt, or the column `text` of a csv, json, jsonl or parquet file. They are joined, with the ends
that the tokenizer gives a text, or its eos where it gives none, and cut into blocks. Whether the model guesses the
next word or hidden ones is read from its config; `--unlabelled`, of models that guess the next word, leaves the labels
out, so that the student learns from the teacher's answers alone. The teacher is the model itself before its cut, or
`--teacher`, which has the same words.
Every option of `transformers.TrainingArguments` is an option here. Lines that a plain Trainer script does not have are
marked with (+), lines that it has otherwise with (~).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from datasets import DatasetDict, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    default_data_collator,
    set_seed,
)

from optimum_rmtkd import RMTKDConfig, RMTKDTrainer, RMTKDTrainingArguments  # (~) Trainer, TrainingArguments


@dataclass
class ModelArguments:
    model: str = field(metadata={"help": "Hub name or local folder of a language model."})
    teacher: str | None = field(default=None, metadata={"help": "A larger one of the same words."})  # (+)


@dataclass
class DataArguments:
    train_file: str = field(metadata={"help": "txt, csv, json, jsonl or parquet of texts."})
    validation_file: str | None = field(
        default=None, metadata={"help": "The same; without it a twentieth of the rows."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the texts in a table."})
    block_size: int = field(default=256, metadata={"help": "Tokens of a sample."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the words that a masked model guesses."})
    unlabelled: bool = field(default=False, metadata={"help": "Learn from the teacher's answers alone."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training blocks."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation blocks."})


@dataclass
class ReductionArguments:  # (+)
    target_reduction: float | None = field(default=None, metadata={"help": "Share of the parameters to remove."})
    form: str | None = field(default=None, metadata={"help": "factored: for models whose family is not declared."})
    recipe: str | None = field(default=None, metadata={"help": "JSON file of fields of RMTKDConfig."})

    def config(self, seed: int) -> RMTKDConfig:
        config = RMTKDConfig.from_json_file(self.recipe) if self.recipe else RMTKDConfig()
        given = {"target_reduction": self.target_reduction, "form": self.form}
        return config.replace(seed=seed, **{name: value for name, value in given.items() if value is not None})


def load_texts(data: DataArguments, seed: int) -> DatasetDict:
    """The splits train and validation, of one column."""
    kind = Path(data.train_file).suffix.lstrip(".")
    files = {"train": data.train_file} | ({"validation": data.validation_file} if data.validation_file else {})
    rows = load_dataset({"txt": "text", "jsonl": "json"}.get(kind, kind), data_files=files)
    if "validation" not in rows:
        parts = rows["train"].train_test_split(0.05, seed=seed)
        rows = DatasetDict(train=parts["train"], validation=parts["test"])
    return rows


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, ReductionArguments, RMTKDTrainingArguments))  # (~)
    arguments, data, reduction, training = parser.parse_args_into_dataclasses()
    if Path(arguments.model).resolve() == Path(training.output_dir).resolve():
        parser.error(f"--output_dir {training.output_dir} is the model itself")
    set_seed(training.seed)

    rows = load_texts(data, training.seed)
    if data.text_column not in rows["train"].column_names:
        parser.error(f"no column {data.text_column!r} in the data; there are {', '.join(rows['train'].column_names)}")
    config = AutoConfig.from_pretrained(arguments.model)
    masked = any(name.endswith("ForMaskedLM") for name in config.architectures or ())
    if data.unlabelled and masked:
        parser.error("--unlabelled: the words that a masked model guesses are hidden together with their labels")
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ended = bool(tokenizer("")["input_ids"])  # with bos, for example
    if not ended and tokenizer.eos_token_id is None:
        parser.error("the tokenizer has no eos token, which stands between two texts")
    longest = getattr(config, "max_position_embeddings", None) or data.block_size
    if data.block_size > longest:
        parser.error(f"--block_size {data.block_size}: the model has positions for {longest} tokens")
    model = auto.from_pretrained(arguments.model, dtype=torch.float32)
    teacher = None if arguments.teacher is None else auto.from_pretrained(arguments.teacher)  # (+)

    def encode(batch):
        texts = [text for text in batch[data.text_column] if text and text.strip()]
        ids = tokenizer(texts, verbose=False)["input_ids"]
        return {"input_ids": ids if ended else [row + [tokenizer.eos_token_id] for row in ids]}

    def in_blocks(batch):
        joined, size = list(chain(*batch["input_ids"])), data.block_size
        blocks = [joined[start : start + size] for start in range(0, len(joined) // size * size, size)]
        labelled = {} if masked else {"labels": blocks}  # the collator of masked models makes their labels
        return {"input_ids": blocks, "attention_mask": [[1] * size for _ in blocks]} | labelled

    with training.main_process_first(desc="tokenizing"):
        rows = rows.map(encode, batched=True, remove_columns=rows["train"].column_names)
        rows = rows.map(in_blocks, batched=True)
    most = {"train": data.max_train_samples, "validation": data.max_eval_samples}
    for split, count in most.items():
        rows[split] = rows[split].select(range(min(count or len(rows[split]), len(rows[split]))))
        if not len(rows[split]):
            parser.error(f"the text for {split} is shorter than one block of {data.block_size} tokens")
    learnt_from = rows["train"]
    if data.unlabelled:
        learnt_from = learnt_from.remove_columns("labels")

    training.prediction_loss_only = True  # logits of whole batches are not gathered
    trainer = RMTKDTrainer(  # (~)
        model=model,
        args=training,
        rmtkd_config=reduction.config(training.seed),  # (+)
        teacher_model=teacher,  # (+)
        train_dataset=learnt_from,
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=data.mlm_probability)
        if masked
        else default_data_collator,
    )
    before = trainer.evaluate(metric_key_prefix="before")
    result = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    after = trainer.evaluate(metric_key_prefix="after")
    metrics = {**before, **result.metrics, **after}
    for moment in ("before", "after"):
        metrics[f"{moment}_perplexity"] = math.exp(min(metrics[f"{moment}_loss"], 700))
    trainer.save_model()
    trainer.save_metrics("all", metrics)
    if training.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        for name, value in metrics.items():
            print(f"{name:32} {value}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
