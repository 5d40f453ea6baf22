"""Narrow and distil a fine-tuned text classifier (or regressor) with `RMTKDTrainer`.

    python examples/text_classification.py \\
        --model ./my-bert-sst2 --train_file train.parquet --validation_file validation.parquet \\
        --target-reduction 0.8 --output_dir out --num_train_epochs 1 --learning_rate 3e-4 \\
        --per_device_train_batch_size 32

    python examples/text_classification.py --model org/bert-mrpc --dataset glue --dataset_config mrpc \\
        --text_column sentence1 sentence2 --target-reduction 0.6 --output_dir out

    torchrun --nproc_per_node 2 examples/text_classification.py ...        # several devices: nothing else changes

Every option of `transformers.TrainingArguments` is an option here, and so is every field of `RMTKDConfig` (those with
hyphens). Lines that a plain Trainer script does not have are marked with (+), lines that it has otherwise with (~).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields

from transformers import HfArgumentParser

from optimum_rmtkd import RMTKDTrainer, RMTKDTrainingArguments  # (~) Trainer, TrainingArguments
from optimum_rmtkd.commands.data import DataArguments, read_by
from optimum_rmtkd.commands.options import add_recipe_options, recipe_from_options
from optimum_rmtkd.commands.output import check_place
from optimum_rmtkd.commands.task import load_task


@dataclass
class ModelArguments:
    model: str = field(metadata={"help": "Hub name or local folder of a fine-tuned sequence classifier."})


def parse() -> tuple:
    usage = "%(prog)s --model MODEL (--train_file FILE | --dataset NAME) --output_dir OUT [options]"
    parser = HfArgumentParser((ModelArguments, DataArguments, RMTKDTrainingArguments), usage=usage)  # (~)
    taken = {item.name for item in fields(RMTKDTrainingArguments)}
    add_recipe_options(parser, skip=taken)  # (+) --target-reduction, --schedule ...
    model, data, training, *rest = parser.parse_args_into_dataclasses()
    recipe = recipe_from_options(rest[0] if rest else argparse.Namespace())  # (+)
    return model, data, training, recipe.replace(seed=training.seed)


def main() -> None:
    arguments, data, training, recipe = parse()
    check_place(training.output_dir, read_by(arguments, data))  # never over the model or the data
    with training.main_process_first(desc="reading and tokenizing"):
        task = load_task(arguments.model, data, training.seed)
    trainer = RMTKDTrainer(  # (~)
        model=task.model,
        args=training,
        rmtkd_config=recipe,  # (+)
        train_dataset=task.train,
        eval_dataset=task.validation,
        processing_class=task.processor,
        data_collator=task.collator,
        compute_metrics=task.compute_metrics,
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


if __name__ == "__main__":
    main()
