"""What the scripts of this folder have in common: their arguments, their files, and the way from a trainer to its
results. All but `reduction` is what a plain script has."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers
from datasets import DatasetDict, load_dataset
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from optimum_rmtkd import RMTKDConfig


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Hub name or folder of the model, its tokenizer beside it."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Another tokenizer than that of the model."})
    ignore_mismatched_sizes: bool = field(default=False, metadata={"help": "A head of another size is made anew."})
    rmtkd: str | None = field(
        default=None, metadata={"help": "A recipe in JSON. Without it the script is what it was: a plain Trainer."}
    )

    @property
    def reduction(self) -> dict[str, Any]:
        """What is given to the trainer beside its usual arguments; nothing for a plain one."""
        return {} if self.rmtkd is None else {"rmtkd_config": RMTKDConfig(**json.loads(self.rmtkd))}


@dataclass
class DataTrainingArguments:
    train_file: str | None = field(default=None, metadata={"help": "csv or json of the training rows."})
    validation_file: str | None = field(default=None, metadata={"help": "csv or json of the rows to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "csv or json of the rows to predict."})
    max_seq_length: int = field(default=64, metadata={"help": "Longer texts are cut."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad every text, not only to its batch."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use that many training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use that many rows for evaluation."})

    def load(self) -> DatasetDict:
        """The splits whose files were given; their names end alike."""
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        files = {split: path for split, path in files.items() if path is not None}
        return load_dataset(next(iter(files.values())).rsplit(".", 1)[-1], data_files=files)

    def some(self, rows, most: int | None):
        """The first `most` rows."""
        return rows if most is None else rows.select(range(min(most, len(rows))))

    @property
    def padding(self) -> str | bool:
        return "max_length" if self.pad_to_max_length else False


def parse(*classes: type) -> tuple:
    """The arguments, one object a class; the last holds those of the training."""
    parsed = HfArgumentParser(classes).parse_args_into_dataclasses()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s", level=logging.INFO)
    transformers.utils.logging.set_verbosity(parsed[-1].get_process_log_level())
    set_seed(parsed[-1].seed)
    return parsed


def train_and_evaluate(
    trainer: Trainer, args: TrainingArguments, rows: dict[str, Any], derive: Callable = dict, **card: Any
) -> None:
    """What every script does with its trainer: train, save, evaluate, and write the card.

    Args:
        rows: by the name of the split, to count them.
        derive: adds to the metrics of the evaluation what is computed from them.
        **card: as `Trainer.create_model_card`.
    """
    if args.do_train:
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()  # with the tokenizer
        metrics = result.metrics | {"train_samples": len(rows["train"])}
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if args.do_eval:
        metrics = derive(trainer.evaluate()) | {"eval_samples": len(rows["validation"])}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
