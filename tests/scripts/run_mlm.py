"""Train a model to guess masked words of a text (one file of lines, or a column text).

In the shape of transformers' run_mlm.py. Marked with (+) is what `--rmtkd` needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import chain

import shared
from datasets import load_dataset
from shared import ModelArguments, parse, train_and_evaluate
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from optimum_rmtkd import RMTKDTrainer  # (+)


@dataclass
class DataTrainingArguments(shared.DataTrainingArguments):
    line_by_line: bool = field(default=False, metadata={"help": "A line is a sample; otherwise lines are joined."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens to mask."})

    def load(self):
        return load_dataset("text", data_files={"train": self.train_file, "validation": self.validation_file})


def main():
    model_args, data_args, training_args = parse(ModelArguments, DataTrainingArguments, TrainingArguments)
    raw_datasets = data_args.load()
    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path)
    model = AutoModelForMaskedLM.from_pretrained(model_args.model_name_or_path, config=config)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))

    def tokenize_function(examples):
        options = {"truncation": True, "max_length": data_args.max_seq_length} if data_args.line_by_line else {}
        lines = [line for line in examples["text"] if line.strip()]
        return tokenizer(lines, return_special_tokens_mask=True, **options)

    def group_texts(examples):
        joined = {name: list(chain(*rows)) for name, rows in examples.items()}
        size = data_args.max_seq_length
        whole = len(joined["input_ids"]) // size * size
        return {name: [row[i : i + size] for i in range(0, whole, size)] for name, row in joined.items()}

    with training_args.main_process_first(desc="dataset map tokenization"):
        tokenized_datasets = raw_datasets.map(tokenize_function, batched=True, remove_columns=["text"])
        if not data_args.line_by_line:
            tokenized_datasets = tokenized_datasets.map(group_texts, batched=True)
    train_dataset = data_args.some(tokenized_datasets["train"], data_args.max_train_samples)
    eval_dataset = data_args.some(tokenized_datasets["validation"], data_args.max_eval_samples)

    def preprocess_logits_for_metrics(logits, labels):
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)

    def compute_metrics(eval_preds):
        predictions, labels = (values.reshape(-1) for values in eval_preds)
        masked = labels != -100
        return {"accuracy": float((predictions[masked] == labels[masked]).mean())}

    trainer = (RMTKDTrainer if model_args.reduction else Trainer)(  # (+) RMTKDTrainer
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=data_args.mlm_probability),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        **model_args.reduction,  # (+) rmtkd_config
    )
    train_and_evaluate(
        trainer,
        training_args,
        {"train": train_dataset, "validation": eval_dataset},
        finetuned_from=model_args.model_name_or_path,
        derive=lambda metrics: metrics | {"perplexity": math.exp(min(metrics["eval_loss"], 700))},
        tasks="fill-mask",
    )


if __name__ == "__main__":
    main()
