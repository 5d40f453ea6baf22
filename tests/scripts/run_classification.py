"""Fine-tune a model on rows of several text columns, joined, and a label, a list of labels, or a number.

In the shape of transformers' run_classification.py, with the class weights that its users ask for. Marked with (+) is
what `--rmtkd` needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import shared
import torch
from shared import ModelArguments, parse, train_and_evaluate
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)

from optimum_rmtkd import RMTKDMixin, RMTKDTrainer  # (+)


@dataclass
class DataTrainingArguments(shared.DataTrainingArguments):
    text_column_names: str = field(default="sentence", metadata={"help": "Columns to join, with commas between."})
    text_column_delimiter: str = field(default=" ", metadata={"help": "What joins them."})
    metric_name: str = field(default="accuracy", metadata={"help": "accuracy, f1, or mse (labels that are numbers)."})
    class_weights: bool = field(default=False, metadata={"help": "Weigh each class by its rarity."})


class WeightedTrainer(Trainer):
    """The loss of rare classes counts more."""

    class_weights: torch.Tensor | None = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weights = self.class_weights.to(outputs.logits)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, weight=weights)
        return (loss, outputs) if return_outputs else loss


class RMTKDWeightedTrainer(RMTKDMixin, WeightedTrainer):  # (+)
    pass


def f1_scores(hits: np.ndarray, predicted: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Micro: of all decisions; macro: the mean over classes. (samples, classes) of 0 and 1 each."""
    per_class = 2 * hits.sum(0) / np.maximum(predicted.sum(0) + real.sum(0), 1)
    return {
        "micro_f1": float(2 * hits.sum() / max(predicted.sum() + real.sum(), 1)),
        "macro_f1": float(per_class.mean()),
    }


def main():
    model_args, data_args, training_args = parse(ModelArguments, DataTrainingArguments, TrainingArguments)
    raw_datasets = data_args.load()
    is_regression = data_args.metric_name == "mse"
    is_multi_label = isinstance(raw_datasets["train"][0]["label"], list)
    labels = [label for row in raw_datasets["train"]["label"] for label in (row if is_multi_label else [row])]
    label_list = [] if is_regression else sorted({str(label) for label in labels})

    num_labels = 1 if is_regression else len(label_list)
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, num_labels=num_labels)
    config.problem_type = "multi_label_classification" if is_multi_label else "single_label_classification"
    if is_regression:
        config.problem_type = "regression"
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_args.model_name_or_path, config=config, ignore_mismatched_sizes=model_args.ignore_mismatched_sizes
    )
    label_to_id = {label: i for i, label in enumerate(label_list)}
    if not is_regression:
        model.config.label2id, model.config.id2label = label_to_id, dict(enumerate(label_list))

    def one_of_all(row: list[str]) -> list[float]:
        return [float(label in row) for label in label_list]

    def preprocess_function(examples):
        columns = [examples[name] for name in data_args.text_column_names.split(",")]
        texts = [data_args.text_column_delimiter.join(parts) for parts in zip(*columns, strict=True)]
        result = tokenizer(texts, padding=data_args.padding, max_length=data_args.max_seq_length, truncation=True)
        if is_regression:
            result["label"] = [float(label) for label in examples["label"]]
        elif is_multi_label:
            result["label"] = [one_of_all(row) for row in examples["label"]]
        else:
            result["label"] = [label_to_id[str(label)] for label in examples["label"]]
        return result

    with training_args.main_process_first(desc="dataset map pre-processing"):
        # the labels change their type: the old columns go
        raw_datasets = raw_datasets.map(
            preprocess_function, batched=True, remove_columns=raw_datasets["train"].column_names
        )
    train_dataset = data_args.some(raw_datasets["train"], data_args.max_train_samples)
    eval_dataset = data_args.some(raw_datasets["validation"], data_args.max_eval_samples)

    def compute_metrics(p: EvalPrediction):
        scores = p.predictions[0] if isinstance(p.predictions, tuple) else p.predictions
        if is_regression:
            return {"mse": float(((scores.squeeze() - p.label_ids) ** 2).mean())}
        if is_multi_label:
            predicted, real = scores > 0, p.label_ids > 0
            exact = (predicted == real).all(axis=1)
        else:
            known = np.eye(len(label_list), dtype=bool)
            predicted, real = known[scores.argmax(axis=1)], known[p.label_ids]
            exact = scores.argmax(axis=1) == p.label_ids
        if data_args.metric_name == "accuracy":
            return {"accuracy": float(exact.mean())}
        return f1_scores(predicted & real, predicted, real)

    plain, ours = (
        (WeightedTrainer, RMTKDWeightedTrainer) if data_args.class_weights else (Trainer, RMTKDTrainer)
    )  # (+) the second of each
    trainer = (ours if model_args.reduction else plain)(
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        **model_args.reduction,  # (+) rmtkd_config
    )
    if data_args.class_weights:
        counts = torch.bincount(torch.tensor(train_dataset["label"]), minlength=len(label_list))
        trainer.class_weights = counts.sum() / (len(label_list) * counts.clamp(min=1))
    train_and_evaluate(
        trainer,
        training_args,
        {"train": train_dataset, "validation": eval_dataset},
        finetuned_from=model_args.model_name_or_path,
        tasks="text-classification",
    )


if __name__ == "__main__":
    main()
