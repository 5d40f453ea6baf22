"""Fine-tune an encoder-decoder to write a summary of a text (columns document and summary).

In the shape of transformers' run_summarization.py. Marked with (+) is what `--rmtkd` needs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import shared
from shared import parse, train_and_evaluate
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from optimum_rmtkd import RMTKDSeq2SeqTrainer  # (+)


@dataclass
class ModelArguments(shared.ModelArguments):
    teacher_name_or_path: str | None = field(default=None, metadata={"help": "A larger model to learn from."})


@dataclass
class DataTrainingArguments(shared.DataTrainingArguments):
    source_prefix: str = field(default="", metadata={"help": "Put in front of every document."})
    max_target_length: int = field(default=8, metadata={"help": "Longer summaries are cut."})
    num_beams: int | None = field(default=None, metadata={"help": "For the summaries of the evaluation."})


def overlap(ours: str, theirs: str) -> float:
    """F1 of the words of two texts."""
    common = sum((Counter(ours.split()) & Counter(theirs.split())).values())
    return 2 * common / max(len(ours.split()) + len(theirs.split()), 1)


def main():
    model_args, data_args, training_args = parse(ModelArguments, DataTrainingArguments, Seq2SeqTrainingArguments)
    raw_datasets = data_args.load()
    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(model_args.model_name_or_path, config=config)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))

    def preprocess_function(examples):
        documents = [data_args.source_prefix + text for text in examples["document"]]
        inputs = tokenizer(documents, max_length=data_args.max_seq_length, padding=data_args.padding, truncation=True)
        targets = tokenizer(text_target=examples["summary"], max_length=data_args.max_target_length, truncation=True)
        inputs["labels"] = targets["input_ids"]
        return inputs

    with training_args.main_process_first(desc="dataset map pre-processing"):
        raw_datasets = raw_datasets.map(
            preprocess_function, batched=True, remove_columns=raw_datasets["train"].column_names
        )
    train_dataset = data_args.some(raw_datasets["train"], data_args.max_train_samples)
    eval_dataset = data_args.some(raw_datasets["validation"], data_args.max_eval_samples)

    def texts(ids) -> list[str]:
        ids = np.where(ids != -100, ids, tokenizer.pad_token_id)
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def compute_metrics(eval_preds):
        predictions, labels = eval_preds
        predictions = predictions[0] if isinstance(predictions, tuple) else predictions
        ours, theirs = texts(predictions), texts(labels)
        return {
            "rouge1": 100 * float(np.mean([overlap(a, b) for a, b in zip(ours, theirs, strict=True)])),
            "gen_len": float(np.mean([np.count_nonzero(row != tokenizer.pad_token_id) for row in predictions])),
        }

    training_args.generation_max_length = training_args.generation_max_length or data_args.max_target_length
    training_args.generation_num_beams = data_args.num_beams or training_args.generation_num_beams

    teacher = {}  # (+)
    if model_args.teacher_name_or_path is not None:  # (+)
        teacher["teacher_model"] = AutoModelForSeq2SeqLM.from_pretrained(model_args.teacher_name_or_path)  # (+)
    trainer = (RMTKDSeq2SeqTrainer if model_args.reduction else Seq2SeqTrainer)(  # (+) RMTKDSeq2SeqTrainer
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=-100),
        compute_metrics=compute_metrics if training_args.predict_with_generate else None,
        **model_args.reduction,  # (+) rmtkd_config
        **teacher,  # (+)
    )
    train_and_evaluate(
        trainer,
        training_args,
        {"train": train_dataset, "validation": eval_dataset},
        finetuned_from=model_args.model_name_or_path,
        tasks="summarization",
    )


if __name__ == "__main__":
    main()
