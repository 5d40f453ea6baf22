"""Fine-tune a text classifier (or regressor) and make it small in the one `train()`, with `RMTKDTrainer`.

    python examples/text_classification.py \\
        --model org/bert --train_file train.parquet --validation_file validation.parquet \\
        --target_reduction 0.8 --output_dir out --num_train_epochs 3 --per_device_train_batch_size 32

    python examples/text_classification.py --model org/bert-mrpc --dataset glue --dataset_config mrpc \\
        --text_column sentence1 sentence2 --target_reduction 0.6 --output_dir out

    torchrun --nproc_per_node 2 examples/text_classification.py ...        # several devices: nothing else changes

The model may be fine-tuned on the task already, or come straight from pretraining: then it gets a new head and is
fine-tuned first. Data: csv, json or parquet, or a dataset of the Hub. Every option of `transformers.TrainingArguments`
is an option here; `--recipe FILE` reads any field of `RMTKDConfig` from JSON. Lines that a plain Trainer script does
not have are marked with (+), lines that it has otherwise with (~).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, DatasetDict, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)

from optimum_rmtkd import RMTKDConfig, RMTKDTrainer, RMTKDTrainingArguments  # (~) Trainer, TrainingArguments


@dataclass
class ModelArguments:
    model: str = field(metadata={"help": "Hub name or local folder of a model, fine-tuned or not."})


@dataclass
class DataArguments:
    train_file: str | None = field(default=None, metadata={"help": "csv, json, jsonl or parquet of the rows."})
    validation_file: str | None = field(default=None, metadata={"help": "The same; without it a tenth is held out."})
    dataset: str | None = field(default=None, metadata={"help": "Instead of files: a dataset of the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, for example sst2."})
    text_column: list[str] | None = field(default=None, metadata={"help": "One or two; else those that hold text."})
    label_column: str = field(default="label", metadata={"help": "Classes, as numbers or names; or what to predict."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation rows."})


@dataclass
class ReductionArguments:  # (+)
    target_reduction: float | None = field(default=None, metadata={"help": "Share of the parameters to remove."})
    recipe: str | None = field(default=None, metadata={"help": "JSON file of fields of RMTKDConfig."})

    def config(self, seed: int) -> RMTKDConfig:
        config = RMTKDConfig.from_json_file(self.recipe) if self.recipe else RMTKDConfig()
        changes = {} if self.target_reduction is None else {"target_reduction": self.target_reduction}
        return config.replace(seed=seed, **changes)


def load_rows(data: DataArguments, seed: int) -> DatasetDict:
    """The splits train and validation."""
    if data.dataset is not None:
        rows = load_dataset(data.dataset, data.dataset_config)
    else:
        files = {"train": data.train_file, "validation": data.validation_file}
        kind = Path(data.train_file).suffix.lstrip(".").replace("jsonl", "json")
        rows = load_dataset(kind, data_files={split: path for split, path in files.items() if path is not None})
    if "validation" not in rows:
        parts = rows["train"].train_test_split(0.1, seed=seed)
        rows = DatasetDict(train=parts["train"], validation=parts["test"])
    most = {"train": data.max_train_samples, "validation": data.max_eval_samples}
    for split, count in most.items():
        if count is not None and count < len(rows[split]):
            rows[split] = rows[split].shuffle(seed=seed).select(range(count))
    return rows


def class_numbers(rows: DatasetDict, column: str, config) -> dict | None:
    """Value in the column -> class of the model, in the order of a model that knows these names; None: regression."""
    feature, values = rows["train"].features[column], sorted(set(rows["train"][column]))
    if isinstance(values[0], float):
        return None
    if isinstance(values[0], int):
        count = feature.num_classes if isinstance(feature, ClassLabel) else values[-1] + 1
        return {value: value for value in range(count)}
    known = {str(name): number for name, number in (config.label2id or {}).items()}
    return known if set(known) == set(values) else {value: number for number, value in enumerate(values)}


def text_columns(rows: DatasetDict, data: DataArguments) -> list[str]:
    """One or two columns of text."""
    kinds = rows["train"].features
    found = [name for name in kinds if getattr(kinds[name], "dtype", "") in ("string", "large_string")]
    return data.text_column or [name for name in found if name != data.label_column][:2]


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, ReductionArguments, RMTKDTrainingArguments))  # (~)
    arguments, data, reduction, training = parser.parse_args_into_dataclasses()
    if (data.train_file is None) == (data.dataset is None):
        parser.error("give either --train_file or --dataset")
    if Path(arguments.model).resolve() == Path(training.output_dir).resolve():
        parser.error(f"--output_dir {training.output_dir} is the model itself")
    set_seed(training.seed)

    rows = load_rows(data, training.seed)
    for column in (data.label_column, *(data.text_column or ())):
        if column not in rows["train"].column_names:
            parser.error(f"no column {column!r} in the data; there are {', '.join(rows['train'].column_names)}")
    config = AutoConfig.from_pretrained(arguments.model)
    classes, texts = class_numbers(rows, data.label_column, config), text_columns(rows, data)
    outputs = 1 if classes is None else len(classes)
    if config.num_labels != outputs:  # a new head
        config.num_labels = outputs
    if classes is not None and isinstance(next(iter(classes)), str):
        config.label2id, config.id2label = classes, {number: name for name, number in classes.items()}
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
    )

    def encode(batch):
        encoded = tokenizer(*(batch[name] for name in texts), truncation=True, max_length=data.max_length)
        labels = batch[data.label_column]
        encoded["labels"] = [float(x) for x in labels] if classes is None else [classes[x] for x in labels]
        return encoded

    with training.main_process_first(desc="tokenizing"):
        rows = rows.map(encode, batched=True, remove_columns=rows["train"].column_names)

    def compute_metrics(prediction):
        if classes is None:
            return {"pearson": float(np.corrcoef(prediction.predictions.reshape(-1), prediction.label_ids)[0, 1])}
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = RMTKDTrainer(  # (~)
        model=model,
        args=training,
        rmtkd_config=reduction.config(training.seed),  # (+)
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
    )
    before = trainer.evaluate(metric_key_prefix="before")
    result = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    after = trainer.evaluate(metric_key_prefix="after")
    trainer.save_model()
    trainer.save_metrics("all", {**before, **result.metrics, **after})
    if training.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        for name, value in {**before, **result.metrics, **after}.items():
            print(f"{name:32} {value}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
