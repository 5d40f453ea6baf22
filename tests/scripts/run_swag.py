"""Fine-tune a model to choose how a text ends (columns sent1, sent2, ending0 to ending3, label).

In the shape of transformers' run_swag.py. Marked with (+) is what `--rmtkd` needs.
"""

from __future__ import annotations

from itertools import chain

from shared import DataTrainingArguments, ModelArguments, parse, train_and_evaluate
from transformers import (
    AutoConfig,
    AutoModelForMultipleChoice,
    AutoTokenizer,
    DataCollatorForMultipleChoice,
    Trainer,
    TrainingArguments,
)

from optimum_rmtkd import RMTKDTrainer  # (+)


CHOICES = 4


def main():
    model_args, data_args, training_args = parse(ModelArguments, DataTrainingArguments, TrainingArguments)
    raw_datasets = data_args.load()
    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path)
    model = AutoModelForMultipleChoice.from_pretrained(model_args.model_name_or_path, config=config)

    def preprocess_function(examples):
        firsts = list(chain(*([context] * CHOICES for context in examples["sent1"])))
        endings = zip(*(examples[f"ending{i}"] for i in range(CHOICES)), strict=True)
        seconds = [f"{head} {ending}" for head, row in zip(examples["sent2"], endings, strict=True) for ending in row]
        tokenized = tokenizer(
            firsts, seconds, truncation=True, max_length=data_args.max_seq_length, padding=data_args.padding
        )
        return {k: [v[i : i + CHOICES] for i in range(0, len(v), CHOICES)] for k, v in tokenized.items()}

    with training_args.main_process_first(desc="dataset map pre-processing"):
        raw_datasets = raw_datasets.map(preprocess_function, batched=True)
    train_dataset = data_args.some(raw_datasets["train"], data_args.max_train_samples)
    eval_dataset = data_args.some(raw_datasets["validation"], data_args.max_eval_samples)

    def compute_metrics(eval_predictions):
        predictions, labels = eval_predictions
        return {"accuracy": float((predictions.argmax(axis=1) == labels).mean())}

    trainer = (RMTKDTrainer if model_args.reduction else Trainer)(  # (+) RMTKDTrainer
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForMultipleChoice(tokenizer=tokenizer),
        compute_metrics=compute_metrics,
        **model_args.reduction,  # (+) rmtkd_config
    )
    train_and_evaluate(
        trainer,
        training_args,
        {"train": train_dataset, "validation": eval_dataset},
        finetuned_from=model_args.model_name_or_path,
        tasks="multiple-choice",
        dataset_tags="swag",
        dataset_args="toy",
        dataset="SWAG",
        language="en",
    )


if __name__ == "__main__":
    main()
