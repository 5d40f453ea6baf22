"""Distil a given teacher into a given smaller student whose weights are trained as matrix product operators (OPDF).

    python examples/opdf_student.py --teacher ./my-bert-sst2 --student org/bert-6-layers \\
        --train_file train.parquet --validation_file validation.parquet --output_dir out \\
        --num_train_epochs 3 --learning_rate 3e-5 --per_device_train_batch_size 32 --num_tensors 5

    ... --keep_layers 3                      # the student is made of 3 blocks of the teacher, evenly spaced
    ... --keep_layers 3 --alignment 1e3      # and its tensors stay near the teacher's (equal widths only)

Nothing is cut, and what is saved is a plain checkpoint of the student's own size. Tune the learning rate of a plain
student (--num_tensors 0) as well before you believe a difference. Lines that a plain Trainer script does not have are
marked with (+), lines that it has otherwise with (~).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import DatasetDict, load_dataset
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)

from optimum_rmtkd import (
    MatrixProductOperator,  # (+)
    RMTKDConfig,  # (+)
    RMTKDTrainer,  # (~) Trainer
    RMTKDTrainingArguments,  # (~) TrainingArguments
)
from optimum_rmtkd.objectives import KLDivergence, TaskLoss, TensorAlignment  # (+)


@dataclass
class Arguments:
    teacher: str = field(
        metadata={"help": "Hub name or folder of a fine-tuned sequence classifier; gives the tokenizer."}
    )
    student: str | None = field(
        default=None, metadata={"help": "Hub name or folder of a smaller model with the same vocabulary."}
    )
    keep_layers: int = field(
        default=0, metadata={"help": "Instead of --student: so many blocks of the teacher, evenly spaced."}
    )
    num_tensors: int = field(default=3, metadata={"help": "Tensors a weight; 0: train the plain student."})
    alignment: float = field(default=0.0, metadata={"help": "Weight of the tensor alignment; 0: none."})
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


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The repeated blocks of an encoder."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return next(blocks for blocks in lists if len(blocks) == model.config.num_hidden_layers)


def truncated(teacher: nn.Module, layers: int) -> nn.Module:
    """A copy of the teacher that keeps evenly spaced blocks, the last one among them."""
    student = copy.deepcopy(teacher)
    blocks = blocks_of(student)
    kept = [(number + 1) * len(blocks) // layers - 1 for number in range(layers)]
    for number in reversed(range(len(blocks))):
        if number not in kept:
            del blocks[number]
    student.config.num_hidden_layers = layers
    return student


def main() -> None:
    parser = HfArgumentParser((Arguments, DataArguments, RMTKDTrainingArguments))  # (~)
    arguments, data, training = parser.parse_args_into_dataclasses()
    if (arguments.student is None) == (arguments.keep_layers == 0):
        parser.error("give either --student or --keep_layers")
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    teacher = AutoModelForSequenceClassification.from_pretrained(arguments.teacher, dtype=torch.float32)
    with training.main_process_first(desc="reading and tokenizing"):
        rows = load_rows(data, teacher, tokenizer)
    if arguments.keep_layers:
        depth = len(blocks_of(teacher))
        if not 0 < arguments.keep_layers <= depth:
            parser.error(f"--keep_layers {arguments.keep_layers}: the teacher has {depth} blocks")
        student = truncated(teacher, arguments.keep_layers)
    else:
        names = ("num_labels", "id2label", "label2id", "problem_type")
        labels = {name: getattr(teacher.config, name) for name in names}
        student = AutoModelForSequenceClassification.from_pretrained(
            arguments.student, dtype=torch.float32, ignore_mismatched_sizes=True, **labels
        )
    objectives = [TaskLoss(weight=0.5), KLDivergence(weight=0.5, temperature=arguments.temperature)]  # (+)
    if arguments.alignment:
        objectives.append(TensorAlignment(weight=arguments.alignment))  # (+)
    trainer = RMTKDTrainer(  # (~)
        model=student,
        args=training,
        rmtkd_config=RMTKDConfig(schedule="none", seed=training.seed),  # (+) no cut
        teacher_model=teacher,  # (+)
        objectives=objectives,  # (+)
        reparameterization=MatrixProductOperator(arguments.num_tensors) if arguments.num_tensors else None,  # (+)
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
    )
    before = trainer.evaluate(metric_key_prefix="before")
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    after = trainer.evaluate(metric_key_prefix="after")
    trainer.save_model()  # plain weights under ordinary names
    trainer.save_metrics("all", {**before, **after})
    if trainer.is_world_process_zero():
        for name, value in {**before, **after}.items():
            print(f"{name:32} {value}")


if __name__ == "__main__":
    main()
