"""Distil a given teacher into a given smaller student in a low-dimensional subspace of its features (RdimKD).

    python examples/rdimkd_student.py --teacher ./my-bert-sst2 --student org/tiny-bert \\
        --train_file train.parquet --validation_file validation.parquet --output_dir out \\
        --num_train_epochs 3 --learning_rate 1e-4 --per_device_train_batch_size 32

    ... --projection pca --layers uniform          # pca, random, autoencoder, marchenko_pastur; last or uniform

Nothing is cut. The student is any sequence classifier that reads the teacher's tokens and has its labels; its width
and depth may differ. Where widths differ one linear map is trained beside it, and left behind when it is saved. Lines
that a plain Trainer script does not have are marked with (+), lines that it has otherwise with (~).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import DatasetDict, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)

from optimum_rmtkd import RMTKDConfig, RMTKDTrainer, RMTKDTrainingArguments  # (~) Trainer, TrainingArguments
from optimum_rmtkd.objectives import KLDivergence, ProjectedFeatureLoss, TaskLoss  # (+)


@dataclass
class Arguments:
    teacher: str = field(
        metadata={"help": "Hub name or folder of a fine-tuned sequence classifier; gives the tokenizer."}
    )
    student: str = field(metadata={"help": "Hub name or folder of a smaller model with the same vocabulary."})
    projection: str = field(
        default="marchenko_pastur",
        metadata={"help": "marchenko_pastur, pca, random or autoencoder; none: full features."},
    )
    layers: str = field(default="last", metadata={"help": "last, or uniform: every block of the student."})
    feature_weight: float = field(default=1.0, metadata={"help": "Weight of the feature loss."})
    temperature: float = field(default=2.0, metadata={"help": "Temperature of the KL divergence."})


@dataclass
class DataArguments:
    train_file: str = field(metadata={"help": "csv, json, jsonl or parquet of texts and labels."})
    validation_file: str = field(metadata={"help": "The same, to measure on."})
    text_column: list[str] | None = field(default=None, metadata={"help": "One or two; else those that hold text."})
    label_column: str = field(default="label", metadata={"help": "Classes, as the teacher numbers or names them."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})


def load_rows(data: DataArguments, teacher, tokenizer) -> DatasetDict:
    """The splits train and validation, tokenized, with the labels of the teacher."""
    files = {"train": data.train_file, "validation": data.validation_file}
    rows = load_dataset(Path(data.train_file).suffix.lstrip(".").replace("jsonl", "json"), data_files=files)
    kinds = rows["train"].features
    for column in (data.label_column, *(data.text_column or ())):
        if column not in kinds:
            raise SystemExit(f"{data.train_file} has no column {column!r}; it has {', '.join(kinds)}.")
    found = [name for name in kinds if getattr(kinds[name], "dtype", "") in ("string", "large_string")]
    texts = data.text_column or [name for name in found if name != data.label_column][:2]

    def encode(batch):
        encoded = tokenizer(*(batch[name] for name in texts), truncation=True, max_length=data.max_length)
        encoded["labels"] = [teacher.config.label2id.get(label, label) for label in batch[data.label_column]]
        return encoded

    return rows.map(encode, batched=True, remove_columns=rows["train"].column_names)


def compute_metrics(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    parser = HfArgumentParser((Arguments, DataArguments, RMTKDTrainingArguments))  # (~)
    arguments, data, training = parser.parse_args_into_dataclasses()
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    teacher = AutoModelForSequenceClassification.from_pretrained(arguments.teacher, dtype=torch.float32)
    with training.main_process_first(desc="reading and tokenizing"):
        rows = load_rows(data, teacher, tokenizer)
    labels = {name: getattr(teacher.config, name) for name in ("num_labels", "id2label", "label2id", "problem_type")}
    student = AutoModelForSequenceClassification.from_pretrained(
        arguments.student, dtype=torch.float32, ignore_mismatched_sizes=True, **labels
    )
    projection = None if arguments.projection == "none" else arguments.projection
    trainer = RMTKDTrainer(  # (~)
        model=student,
        args=training,
        rmtkd_config=RMTKDConfig(schedule="none", seed=training.seed),  # (+) no cut
        teacher_model=teacher,  # (+)
        objectives=[  # (+)
            TaskLoss(weight=0.5),
            KLDivergence(weight=0.5, temperature=arguments.temperature),
            ProjectedFeatureLoss(projection, layers=arguments.layers, weight=arguments.feature_weight),
        ],
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
    )
    before = trainer.evaluate(metric_key_prefix="before")
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    after = trainer.evaluate(metric_key_prefix="after")
    trainer.save_model()  # a plain checkpoint: no teacher, no adapter
    trainer.save_metrics("all", {**before, **after})
    if trainer.is_world_process_zero():
        for name, value in {**before, **after}.items():
            print(f"{name:32} {value}")


if __name__ == "__main__":
    main()
