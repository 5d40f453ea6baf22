"""Fine-tune a model on a task of one or two sentences a row (columns sentence, or sentence1 and sentence2, and label).

In the shape of transformers' run_glue.py. Marked with (+) is what `--rmtkd` needs.
"""

from __future__ import annotations

import numpy as np
from shared import DataTrainingArguments, ModelArguments, parse, train_and_evaluate
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from optimum_rmtkd import RMTKDTrainer  # (+)


def main():
    model_args, data_args, training_args = parse(ModelArguments, DataTrainingArguments, TrainingArguments)
    raw_datasets = data_args.load()

    is_regression = raw_datasets["train"].features["label"].dtype in ("float32", "float64")
    label_list = [] if is_regression else sorted(raw_datasets["train"].unique("label"))
    num_labels = 1 if is_regression else len(label_list)

    config = AutoConfig.from_pretrained(model_args.model_name_or_path, num_labels=num_labels)
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_args.model_name_or_path, config=config, ignore_mismatched_sizes=model_args.ignore_mismatched_sizes
    )
    label_to_id = {label: i for i, label in enumerate(label_list)}
    if not is_regression:
        model.config.label2id = {str(label): i for label, i in label_to_id.items()}
        model.config.id2label = {i: str(label) for label, i in label_to_id.items()}

    columns = raw_datasets["train"].column_names
    text_columns = ("sentence1", "sentence2") if "sentence2" in columns else ("sentence",)

    def preprocess_function(examples):
        texts = [examples[column] for column in text_columns]
        result = tokenizer(*texts, padding=data_args.padding, max_length=data_args.max_seq_length, truncation=True)
        if not is_regression:
            result["label"] = [label_to_id[label] for label in examples["label"]]
        return result

    with training_args.main_process_first(desc="dataset map pre-processing"):
        raw_datasets = raw_datasets.map(preprocess_function, batched=True, desc="Running tokenizer on dataset")
    train_dataset = data_args.some(raw_datasets["train"], data_args.max_train_samples)
    eval_dataset = data_args.some(raw_datasets["validation"], data_args.max_eval_samples)

    def compute_metrics(p: EvalPrediction):
        predictions = p.predictions[0] if isinstance(p.predictions, tuple) else p.predictions
        if is_regression:
            return {"mse": float(((np.squeeze(predictions) - p.label_ids) ** 2).mean())}
        return {"accuracy": float((predictions.argmax(axis=1) == p.label_ids).mean())}

    padded = data_args.pad_to_max_length
    trainer = (RMTKDTrainer if model_args.reduction else Trainer)(  # (+) RMTKDTrainer
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=default_data_collator if padded else DataCollatorWithPadding(tokenizer),
        **model_args.reduction,  # (+) rmtkd_config
    )
    train_and_evaluate(
        trainer,
        training_args,
        {"train": train_dataset, "validation": eval_dataset},
        finetuned_from=model_args.model_name_or_path,
        tasks="text-classification",
        language="en",
        dataset_tags="glue",
        dataset_args="toy",
        dataset="GLUE TOY",
    )


if __name__ == "__main__":
    main()
