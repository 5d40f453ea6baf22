"""Fine-tune a model on a task of one or two sentences a row, in a loop of its own with Accelerate.

In the shape of transformers' run_glue_no_trainer.py: accumulation, a schedule, checkpoints of the accelerator, and
resume. Marked with (+) is what `--rmtkd` needs.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import ProjectConfiguration, set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    SchedulerType,
    get_scheduler,
)

from optimum_rmtkd import RMTKDConfig, RMTKDLoop  # (+)


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--validation_file", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--per_device_train_batch_size", type=int, default=8)
    parser.add_argument("--per_device_eval_batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--weight_decay", type=float, default=0.0)
    parser.add_argument("--num_train_epochs", type=int, default=3)
    parser.add_argument("--max_train_steps", type=int, default=None)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--lr_scheduler_type", type=SchedulerType, default="linear")
    parser.add_argument("--num_warmup_steps", type=int, default=0)
    parser.add_argument("--mixed_precision", default=None)
    parser.add_argument("--gradient_checkpointing", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpointing_steps", type=int, default=None)
    parser.add_argument("--resume_from_checkpoint", default=None)
    parser.add_argument("--rmtkd", default=None)  # (+)
    return parser.parse_args()


def main():
    args = parse_args()
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        project_config=ProjectConfiguration(project_dir=args.output_dir),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # the order of a resumed epoch
    )
    set_seed(args.seed)
    extension = args.train_file.rsplit(".", 1)[-1]
    raw_datasets = load_dataset(extension, data_files={"train": args.train_file, "validation": args.validation_file})
    label_list = sorted(raw_datasets["train"].unique("label"))
    label_to_id = {label: i for i, label in enumerate(label_list)}

    config = AutoConfig.from_pretrained(args.model_name_or_path, num_labels=len(label_list))
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, config=config)
    model.config.label2id = {str(label): i for label, i in label_to_id.items()}
    model.config.id2label = {i: str(label) for label, i in label_to_id.items()}

    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    columns = raw_datasets["train"].column_names
    text_columns = ("sentence1", "sentence2") if "sentence2" in columns else ("sentence",)

    def preprocess_function(examples):
        result = tokenizer(*(examples[name] for name in text_columns), max_length=args.max_length, truncation=True)
        result["labels"] = [label_to_id[label] for label in examples["label"]]
        return result

    with accelerator.main_process_first():
        processed = raw_datasets.map(preprocess_function, batched=True, remove_columns=columns)
    collate = DataCollatorWithPadding(tokenizer)
    train_dataloader = DataLoader(
        processed["train"], shuffle=True, collate_fn=collate, batch_size=args.per_device_train_batch_size
    )
    eval_dataloader = DataLoader(
        processed["validation"], collate_fn=collate, batch_size=args.per_device_eval_batch_size
    )

    no_decay = ("bias", "LayerNorm.weight")
    decayed = [p for name, p in model.named_parameters() if not any(part in name for part in no_decay)]
    others = [p for name, p in model.named_parameters() if any(part in name for part in no_decay)]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)

    steps_an_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_an_epoch
    lr_scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps, max_train_steps)
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )
    steps_an_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_an_epoch

    loop = None
    if args.rmtkd is not None:
        loop = RMTKDLoop(  # (+)
            accelerator, model, optimizer, train_dataloader, lr_scheduler, max_steps=max_train_steps,  # (+)
            rmtkd_config=RMTKDConfig(**json.loads(args.rmtkd)), output_dir=args.output_dir,  # (+)
            evaluate=lambda: {"accuracy": evaluate()}, metric_for_best_model="accuracy",  # (+)
        )  # (+)  # fmt: skip

    completed_steps = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        completed_steps = int(Path(args.resume_from_checkpoint).name.replace("step_", ""))
    first_epoch, skipped = divmod(completed_steps, steps_an_epoch)

    def evaluate() -> float:
        model.eval()
        hits = seen = 0
        for batch in eval_dataloader:
            with torch.no_grad():
                predictions = model(**batch).logits.argmax(dim=-1)
            predictions, labels = accelerator.gather_for_metrics((predictions, batch["labels"]))
            hits, seen = hits + int((predictions == labels).sum()), seen + len(labels)
        return hits / seen

    for epoch in range(first_epoch, math.ceil(max_train_steps / steps_an_epoch)):
        model.train()
        train_dataloader.set_epoch(epoch)
        batches = train_dataloader
        if epoch == first_epoch and skipped:
            batches = accelerator.skip_first_batches(batches, skipped * args.gradient_accumulation_steps)
        for batch in batches:
            with accelerator.accumulate(model):
                loss = loop.loss(batch) if loop else model(**batch).loss  # (+) loop.loss(batch)
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                completed_steps += 1
                if args.checkpointing_steps and completed_steps % args.checkpointing_steps == 0:
                    accelerator.save_state(str(Path(args.output_dir) / f"step_{completed_steps}"))
            if completed_steps >= max_train_steps:
                break
        accelerator.print(f"epoch {epoch}: accuracy {evaluate():.4f}")
    if loop:
        loop.end()  # (+)

    accuracy = evaluate()
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        args.output_dir, is_main_process=accelerator.is_main_process, save_function=accelerator.save
    )
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output_dir)
        (Path(args.output_dir) / "eval_results.json").write_text(json.dumps({"accuracy": accuracy}))
    accelerator.end_training()


if __name__ == "__main__":
    main()
