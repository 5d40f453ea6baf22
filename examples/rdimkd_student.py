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

import torch
from transformers import AutoModelForSequenceClassification, HfArgumentParser

from optimum_rmtkd import RMTKDConfig, RMTKDTrainer, RMTKDTrainingArguments  # (~) Trainer, TrainingArguments
from optimum_rmtkd.commands.data import DataArguments, read_by
from optimum_rmtkd.commands.output import check_place
from optimum_rmtkd.commands.task import load_task
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


def main() -> None:
    parser = HfArgumentParser((Arguments, DataArguments, RMTKDTrainingArguments))  # (~)
    arguments, data, training = parser.parse_args_into_dataclasses()
    models = [("the model", arguments.teacher), ("the model", arguments.student)]
    check_place(training.output_dir, [*models, *read_by(arguments, data)])  # never over a model or the data
    with training.main_process_first(desc="reading and tokenizing"):
        task = load_task(arguments.teacher, data, training.seed)
    labels = {
        name: getattr(task.model.config, name) for name in ("num_labels", "id2label", "label2id", "problem_type")
    }
    student = AutoModelForSequenceClassification.from_pretrained(
        arguments.student, dtype=torch.float32, ignore_mismatched_sizes=True, **labels
    )
    projection = None if arguments.projection == "none" else arguments.projection
    trainer = RMTKDTrainer(  # (~)
        model=student,
        args=training,
        rmtkd_config=RMTKDConfig(schedule="none", seed=training.seed),  # (+) no cut
        teacher_model=task.model,  # (+)
        objectives=[  # (+)
            TaskLoss(weight=0.5),
            KLDivergence(weight=0.5, temperature=arguments.temperature),
            ProjectedFeatureLoss(projection, layers=arguments.layers, weight=arguments.feature_weight),
        ],
        train_dataset=task.train,
        eval_dataset=task.validation,
        processing_class=task.processor,
        data_collator=task.collator,
        compute_metrics=task.compute_metrics,
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
