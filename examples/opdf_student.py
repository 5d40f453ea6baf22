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

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, HfArgumentParser

from optimum_rmtkd import RMTKDConfig, RMTKDTrainer, RMTKDTrainingArguments  # (~) Trainer, TrainingArguments
from optimum_rmtkd.commands.data import DataArguments, read_by
from optimum_rmtkd.commands.output import check_place
from optimum_rmtkd.commands.task import load_task
from optimum_rmtkd.distillation.layers import uniform_map
from optimum_rmtkd.objectives import KLDivergence, TaskLoss, TensorAlignment  # (+)
from optimum_rmtkd.reparameterization import MatrixProductOperator, block_list  # (+)


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


def truncated(teacher: nn.Module, layers: int) -> nn.Module:
    """A copy of the teacher that keeps evenly spaced blocks, the last one among them: those it is compared with."""
    student = copy.deepcopy(teacher)
    blocks = student.get_submodule(block_list(student)[0].rpartition(".")[0])
    kept = uniform_map(layers, len(blocks))
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
    models = [("the model", arguments.teacher), ("the model", arguments.student)]
    check_place(training.output_dir, [*models, *read_by(arguments, data)])  # never over a model or the data
    with training.main_process_first(desc="reading and tokenizing"):
        task = load_task(arguments.teacher, data, training.seed)
    if arguments.keep_layers:
        depth = len(block_list(task.model))
        if not 0 < arguments.keep_layers <= depth:
            parser.error(f"--keep_layers {arguments.keep_layers}: the teacher has {depth} blocks")
        student = truncated(task.model, arguments.keep_layers)
    else:
        names = ("num_labels", "id2label", "label2id", "problem_type")
        labels = {name: getattr(task.model.config, name) for name in names}
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
        teacher_model=task.model,  # (+)
        objectives=objectives,  # (+)
        reparameterization=MatrixProductOperator(arguments.num_tensors) if arguments.num_tensors else None,  # (+)
        train_dataset=task.train,
        eval_dataset=task.validation,
        processing_class=task.processor,
        data_collator=task.collator,
        compute_metrics=task.compute_metrics,
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
