"""Fine-tune a model on images, a folder for each class.

In the shape of transformers' run_image_classification.py: images are read and changed at random when a batch is made.
Marked with (+) is what `--rmtkd` needs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from PIL import ImageOps
from shared import ModelArguments, parse, train_and_evaluate
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
)

from optimum_rmtkd import RMTKDTrainer  # (+)


@dataclass
class DataTrainingArguments:
    train_dir: str = field(metadata={"help": "A folder for each class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same for the evaluation."})
    train_val_split: float = field(default=0.15, metadata={"help": "Share of train_dir kept for it otherwise."})

    def load(self):
        folders = {"train": self.train_dir, "validation": self.validation_dir}
        files = {split: str(Path(folder) / "**") for split, folder in folders.items() if folder is not None}
        images = load_dataset("imagefolder", data_files=files)
        if "validation" not in images:
            parts = images["train"].train_test_split(self.train_val_split, seed=0)
            images["train"], images["validation"] = parts["train"], parts["test"]
        return images


def main():
    model_args, data_args, training_args = parse(ModelArguments, DataTrainingArguments, TrainingArguments)
    images = data_args.load()
    labels = images["train"].features["label"].names

    def collate_fn(examples):
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}

    def compute_metrics(p):
        return {"accuracy": float((p.predictions.argmax(axis=1) == p.label_ids).mean())}

    config = AutoConfig.from_pretrained(
        model_args.model_name_or_path,
        num_labels=len(labels),
        label2id={label: i for i, label in enumerate(labels)},
        id2label=dict(enumerate(labels)),
    )
    model = AutoModelForImageClassification.from_pretrained(
        model_args.model_name_or_path, config=config, ignore_mismatched_sizes=model_args.ignore_mismatched_sizes
    )
    image_processor = AutoImageProcessor.from_pretrained(model_args.model_name_or_path)

    def pixels(batch, change):
        pictures = [change(image.convert("RGB")) for image in batch["image"]]
        batch["pixel_values"] = list(image_processor(pictures, return_tensors="pt")["pixel_values"])
        return batch

    def train_transforms(batch):
        return pixels(batch, lambda image: ImageOps.mirror(image) if random.random() < 0.5 else image)

    def val_transforms(batch):
        return pixels(batch, lambda image: image)

    images["train"].set_transform(train_transforms)
    images["validation"].set_transform(val_transforms)
    trainer = (RMTKDTrainer if model_args.reduction else Trainer)(  # (+) RMTKDTrainer
        model=model,
        args=training_args,
        train_dataset=images["train"] if training_args.do_train else None,
        eval_dataset=images["validation"] if training_args.do_eval else None,
        compute_metrics=compute_metrics,
        processing_class=image_processor,
        data_collator=collate_fn,
        **model_args.reduction,  # (+) rmtkd_config
    )
    train_and_evaluate(
        trainer,
        training_args,
        images,
        finetuned_from=model_args.model_name_or_path,
        tasks="image-classification",
        tags=["image-classification", "vision"],
    )


if __name__ == "__main__":
    main()
