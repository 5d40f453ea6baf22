"""Fine-tune a model on words with a tag each (columns tokens and ner_tags), judged by whole names found.

In the shape of transformers' run_ner.py. Marked with (+) is what `--rmtkd` needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import shared
from shared import ModelArguments, parse, train_and_evaluate
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)

from optimum_rmtkd import RMTKDTrainer  # (+)


@dataclass
class DataTrainingArguments(shared.DataTrainingArguments):
    label_all_tokens: bool = field(default=False, metadata={"help": "Label all pieces of a word, not the first."})


def spans(tags: list[str]) -> set[tuple[int, int, str]]:
    """The names in a sentence: (first word, word after the last, kind)."""
    found, start = set(), None
    for i, tag in enumerate([*tags, "O"]):
        goes_on = tag.startswith("I-") and start is not None and tags[start][2:] == tag[2:]
        if start is not None and not goes_on:
            found.add((start, i, tags[start][2:]))
            start = None
        if tag != "O" and not goes_on:
            start = i
    return found


def span_scores(predicted: list[list[str]], real: list[list[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole names; accuracy of single tags."""
    ours = {(row, *span) for row, tags in enumerate(predicted) for span in spans(tags)}
    theirs = {(row, *span) for row, tags in enumerate(real) for span in spans(tags)}
    hits = len(ours & theirs)
    pairs = [pair for two in zip(predicted, real, strict=True) for pair in zip(*two, strict=True)]
    return {
        "precision": hits / max(len(ours), 1),
        "recall": hits / max(len(theirs), 1),
        "f1": 2 * hits / max(len(ours) + len(theirs), 1),
        "accuracy": sum(a == b for a, b in pairs) / len(pairs),
    }


def main():
    model_args, data_args, training_args = parse(ModelArguments, DataTrainingArguments, TrainingArguments)
    raw_datasets = data_args.load()
    label_list = sorted({tag for tags in raw_datasets["train"]["ner_tags"] for tag in tags})
    label_to_id = {label: i for i, label in enumerate(label_list)}

    config = AutoConfig.from_pretrained(model_args.model_name_or_path, num_labels=len(label_list))
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path)
    model = AutoModelForTokenClassification.from_pretrained(
        model_args.model_name_or_path, config=config, ignore_mismatched_sizes=model_args.ignore_mismatched_sizes
    )
    model.config.label2id, model.config.id2label = label_to_id, dict(enumerate(label_list))
    inside = {label: f"I-{label[2:]}" if label.startswith("B-") else label for label in label_list}

    def labels_of_pieces(tags: list[str], words: list[int | None]) -> list[int]:
        labels, before = [], None
        for word in words:
            if word is None:
                labels.append(-100)
            elif word != before:
                labels.append(label_to_id[tags[word]])
            else:
                labels.append(label_to_id[inside[tags[word]]] if data_args.label_all_tokens else -100)
            before = word
        return labels

    def tokenize_and_align_labels(examples):
        tokenized = tokenizer(
            examples["tokens"],
            padding=data_args.padding,
            truncation=True,
            max_length=data_args.max_seq_length,
            is_split_into_words=True,
        )
        rows = enumerate(examples["ner_tags"])
        tokenized["labels"] = [labels_of_pieces(tags, tokenized.word_ids(batch_index=i)) for i, tags in rows]
        return tokenized

    with training_args.main_process_first(desc="dataset map pre-processing"):
        raw_datasets = raw_datasets.map(tokenize_and_align_labels, batched=True)
    train_dataset = data_args.some(raw_datasets["train"], data_args.max_train_samples)
    eval_dataset = data_args.some(raw_datasets["validation"], data_args.max_eval_samples)

    def compute_metrics(p):
        predictions, labels = p
        pairs = [(row[seen != -100], seen[seen != -100]) for row, seen in zip(predictions.argmax(2), labels)]
        return span_scores(*([[label_list[i] for i in row] for row in side] for side in zip(*pairs)))

    trainer = (RMTKDTrainer if model_args.reduction else Trainer)(  # (+) RMTKDTrainer
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=compute_metrics,
        **model_args.reduction,  # (+) rmtkd_config
    )
    train_and_evaluate(
        trainer,
        training_args,
        {"train": train_dataset, "validation": eval_dataset},
        finetuned_from=model_args.model_name_or_path,
        tasks="token-classification",
    )


if __name__ == "__main__":
    main()
