"""Fine-tune a text classifier and make it small in a training loop of your own with Accelerate, with `RMTKDLoop`.

    python examples/text_classification_no_trainer.py \\
        --model org/bert --train_file train.parquet --validation_file validation.parquet \\
        --target_reduction 0.8 --output_dir out --num_train_epochs 3 --batch_size 32

    python examples/text_classification_no_trainer.py ... --checkpointing_steps 500
    python examples/text_classification_no_trainer.py ... --resume_from_checkpoint out/step_1000    # or: newest

    torchrun --nproc_per_node 2 examples/text_classification_no_trainer.py ...    # several devices

In the shape of transformers' run_glue_no_trainer.py. The model may be fine-tuned on the task already, or come straight
from pretraining: then it is fine-tuned first. Data: csv, json or parquet with one or two columns of text and a column
of labels. Lines that a plain script does not have are marked with (+), lines that it has otherwise with (~).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    get_scheduler,
)

from optimum_rmtkd import RMTKDConfig, RMTKDLoop, newest_checkpoint  # (+)


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Hub name or local folder of a model, fine-tuned or not."})
    train_file: str = field(metadata={"help": "csv, json, jsonl or parquet of the rows."})
    validation_file: str = field(metadata={"help": "The same."})
    output_dir: str = field(metadata={"help": "Where checkpoints and the model go."})
    target_reduction: float | None = field(default=None, metadata={"help": "Share of the parameters to remove."})
    text_column: list[str] | None = field(default=None, metadata={"help": "One or two; else those that hold text."})
    label_column: str = field(default="label", metadata={"help": "Classes, as numbers or names."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})
    batch_size: int = field(default=32, metadata={"help": "Rows a device and micro-batch."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak of the schedule."})
    weight_decay: float = field(default=0.0, metadata={"help": "Of all weights but biases and norms."})
    num_train_epochs: int = field(default=3, metadata={"help": "In the whole run."})
    max_train_steps: int | None = field(default=None, metadata={"help": "Optimizer steps, in place of epochs."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches an optimizer step."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "As transformers.get_scheduler names them."})
    num_warmup_steps: int = field(default=0, metadata={"help": "Of the schedule."})
    mixed_precision: str | None = field(default=None, metadata={"help": "no, bf16 or fp16."})
    checkpointing_steps: int | None = field(default=None, metadata={"help": "Optimizer steps between checkpoints."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "A folder step_N, or newest."})
    seed: int = field(default=0, metadata={"help": "Of everything that is random."})
    cpu: bool = field(default=False, metadata={"help": "Train on the CPU."})


def tokenized(args: Arguments, tokenizer, accelerator: Accelerator):
    """(rows of both splits, names of the classes)."""
    kind = Path(args.train_file).suffix.lstrip(".").replace("jsonl", "json")
    rows = load_dataset(kind, data_files={"train": args.train_file, "validation": args.validation_file})
    kinds = rows["train"].features
    for column in (args.label_column, *(args.text_column or ())):
        if column not in kinds:
            raise SystemExit(f"{args.train_file} has no column {column!r}; it has {', '.join(kinds)}.")
    found = [name for name in kinds if getattr(kinds[name], "dtype", "") in ("string", "large_string")]
    texts = args.text_column or [name for name in found if name != args.label_column][:2]
    classes = sorted(rows["train"].unique(args.label_column))

    def encode(batch):
        encoded = tokenizer(*(batch[name] for name in texts), truncation=True, max_length=args.max_length)
        encoded["labels"] = [classes.index(label) for label in batch[args.label_column]]
        return encoded

    with accelerator.main_process_first():
        return rows.map(encode, batched=True, remove_columns=rows["train"].column_names), [str(c) for c in classes]


def evaluate(model, dataloader, accelerator: Accelerator) -> dict[str, float]:
    """Share of right answers."""
    model.eval()
    hits = seen = 0
    for batch in dataloader:
        with torch.no_grad():
            predictions = model(**batch).logits.argmax(dim=-1)
        predictions, labels = accelerator.gather_for_metrics((predictions, batch["labels"]))
        hits, seen = hits + int((predictions == labels).sum()), seen + len(labels)
    return {"accuracy": hits / seen}


def make_optimizer(args: Arguments, model):
    """AdamW, without decay of biases and norms."""
    still = ("bias", "LayerNorm.weight")
    decayed = [p for name, p in model.named_parameters() if not any(part in name for part in still)]
    others = [p for name, p in model.named_parameters() if any(part in name for part in still)]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate)


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # the order of a resumed epoch
    )
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows, classes = tokenized(args, tokenizer, accelerator)
    config = AutoConfig.from_pretrained(args.model, num_labels=len(classes))
    if set(config.label2id) != set(classes):
        config.label2id, config.id2label = {c: i for i, c in enumerate(classes)}, dict(enumerate(classes))
    model = AutoModelForSequenceClassification.from_pretrained(args.model, config=config, dtype=torch.float32)
    collate = DataCollatorWithPadding(tokenizer)
    train_dataloader = DataLoader(rows["train"], shuffle=True, collate_fn=collate, batch_size=args.batch_size)
    eval_dataloader = DataLoader(rows["validation"], collate_fn=collate, batch_size=args.batch_size)
    optimizer = make_optimizer(args, model)
    model, optimizer, train_dataloader, eval_dataloader = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader
    )
    steps_an_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    max_steps = args.max_train_steps or args.num_train_epochs * steps_an_epoch
    processes = accelerator.num_processes  # a prepared scheduler advances so often in each step
    lr_scheduler = accelerator.prepare(
        get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps * processes, max_steps * processes)
    )
    # fmt: off
    loop = RMTKDLoop(accelerator, model, optimizer, train_dataloader, lr_scheduler, max_steps=max_steps,  # (+)
        rmtkd_config=RMTKDConfig(target_reduction=args.target_reduction), output_dir=args.output_dir,  # (+)
        evaluate=lambda: evaluate(model, eval_dataloader, accelerator), metric_for_best_model="accuracy")  # (+)
    # fmt: on

    done, checkpoint = 0, args.resume_from_checkpoint
    if checkpoint == "newest":
        checkpoint = newest_checkpoint(args.output_dir)  # (+)
    if checkpoint:
        accelerator.load_state(checkpoint)
        done = int(Path(checkpoint).name.removeprefix("step_"))
    first_epoch, skipped = divmod(done, steps_an_epoch)

    for epoch in range(first_epoch, math.ceil(max_steps / steps_an_epoch)):
        model.train()
        train_dataloader.set_epoch(epoch)
        batches = train_dataloader
        if epoch == first_epoch and skipped:
            batches = accelerator.skip_first_batches(batches, skipped * args.gradient_accumulation_steps)
        for batch in batches:
            with accelerator.accumulate(model):
                loss = loop.loss(batch)  # (~) model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                done += 1
                stop = loop.should_stop()  # (+) SIGTERM
                if stop or args.checkpointing_steps and done % args.checkpointing_steps == 0:
                    accelerator.save_state(str(Path(args.output_dir) / f"step_{done}"))
                if stop:
                    raise SystemExit(143)
            if done >= max_steps:
                break
        accelerator.print(f"epoch {epoch}: {evaluate(model, eval_dataloader, accelerator)}")
        # A script that keeps the best model so far, or stops early, begins with it where loop.cuts_to_come is False:
        # until its last cut the model is larger than it will be.
    results = loop.end()  # (+)

    results |= evaluate(model, eval_dataloader, accelerator)
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        args.output_dir, is_main_process=accelerator.is_main_process, save_function=accelerator.save
    )
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output_dir)
        (Path(args.output_dir) / "all_results.json").write_text(json.dumps(results, indent=2))
        for name, value in results.items():
            print(f"{name:32} {value}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
