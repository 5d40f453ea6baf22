"""Fine-tune a language model with TRL's SFTTrainer, narrow it on the way, and distil it back.

    python examples/sft.py --model ./stories260k --train_file tinystories_train.parquet \\
        --validation_file tinystories_validation.parquet --target_reduction 0.2 --output_dir out --max_steps 300 \\
        --learning_rate 1e-3 --per_device_train_batch_size 16 --max_length 256

The tables (csv, json, jsonl or parquet) have what `SFTTrainer` takes: a column `text`, `prompt` and `completion`, or
`messages`. Every option of `trl.SFTConfig` is an option here, with its own defaults: activation checkpointing is on,
and so is bfloat16. A decoder whose family is not declared takes `--form factored`: two thin linear layers in the place
of each one. The teacher is the model itself, as it is before the cut; so the first steps (`--fit_share`) fine-tune it
on the data, or it would be taught what it knew before. With `--teacher` nothing is cut: the model learns from that
larger one of the same tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from optimum_rmtkd import RMTKDConfig, RMTKDMixin


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "Hub name or local folder of a causal language model."})
    train_file: str = field(metadata={"help": "Table of the training data."})
    validation_file: str | None = field(default=None, metadata={"help": "Table that the stages are judged on."})
    target_reduction: float = field(default=0.2, metadata={"help": "Share of the parameters to remove."})
    form: str = field(
        default=RMTKDConfig.form, metadata={"help": "factored: for models whose family is not declared."}
    )
    fit_share: float = field(
        default=0.4,
        metadata={"help": "Share of the steps that fine-tune the model before its cut; 0: it has learnt such data."},
    )
    teacher: str | None = field(default=None, metadata={"help": "A larger model to learn from; nothing is cut then."})


class NarrowingSFTTrainer(RMTKDMixin, SFTTrainer):
    """SFTTrainer, which narrows its model while it trains it."""


def read(path: str):
    kind = path.rsplit(".", 1)[-1]
    return load_dataset({"jsonl": "json"}.get(kind, kind), data_files=path, split="train")


def main() -> None:
    script, training = HfArgumentParser((ScriptArguments, SFTConfig)).parse_args_into_dataclasses()
    recipe = RMTKDConfig(
        form=script.form, target_reduction=script.target_reduction, fit_share=script.fit_share, seed=training.seed
    )
    teacher = None
    if script.teacher is not None:
        recipe = RMTKDConfig(schedule="none", seed=training.seed)
        teacher = AutoModelForCausalLM.from_pretrained(script.teacher, dtype=torch.float32)
    trainer = NarrowingSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(script.model, dtype=torch.float32),
        args=training,
        rmtkd_config=recipe,
        teacher_model=teacher,
        train_dataset=read(script.train_file),
        eval_dataset=None if script.validation_file is None else read(script.validation_file),
        processing_class=AutoTokenizer.from_pretrained(script.model),
    )
    metrics = trainer.train().metrics
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"removed {metrics['reduction']:.1%} of {metrics['parameters_before']:,} parameters")
        if trainer.eval_dataset is not None:
            print({name: round(value, 4) for name, value in trainer.evaluate().items() if name.startswith("eval_")})


if __name__ == "__main__":
    main()
