"""Fine-tune a model to find the answer to a question in a text (columns id, question, context, answers).

In the shape of transformers' run_qa.py: long texts become several features, those for evaluation have no labels, and a
subclass of Trainer turns logits into answers. Marked with (+) is what `--rmtkd` needs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import shared
from shared import ModelArguments, parse, train_and_evaluate
from trainer_qa import QuestionAnsweringTrainer
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    TrainingArguments,
)

from optimum_rmtkd import RMTKDMixin  # (+)


class RMTKDQuestionAnsweringTrainer(RMTKDMixin, QuestionAnsweringTrainer):  # (+)
    pass


@dataclass
class DataTrainingArguments(shared.DataTrainingArguments):
    doc_stride: int = field(default=8, metadata={"help": "How many tokens the features of a long text share."})
    n_best_size: int = field(default=8, metadata={"help": "How many starts and ends are tried."})
    max_answer_length: int = field(default=8, metadata={"help": "Of an answer, in tokens."})


def best_answer(text: str, features: list[tuple], most: int, longest: int) -> str:
    """The likeliest span of a text that lies within one feature: (starts, ends, offsets) each."""
    spans = [(float("-inf"), 0, 0)]
    for starts, ends, offsets in features:
        for start in starts.argsort()[::-1][:most]:
            for end in ends.argsort()[::-1][:most]:
                inside = max(start, end) < len(offsets) and offsets[start] is not None and offsets[end] is not None
                if inside and start <= end < start + longest:
                    spans.append((float(starts[start] + ends[end]), offsets[start][0], offsets[end][1]))
    _, first, last = max(spans)
    return text[first:last]


def overlap(ours: str, theirs: str) -> float:
    """F1 of the words of two answers."""
    common = sum((Counter(ours.split()) & Counter(theirs.split())).values())
    return 2 * common / max(len(ours.split()) + len(theirs.split()), 1)


def main():
    model_args, data_args, training_args = parse(ModelArguments, DataTrainingArguments, TrainingArguments)
    raw_datasets = data_args.load()
    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path)
    model = AutoModelForQuestionAnswering.from_pretrained(model_args.model_name_or_path, config=config)
    column_names = raw_datasets["train"].column_names

    def tokenize(examples):
        return tokenizer(
            [question.lstrip() for question in examples["question"]],
            examples["context"],
            truncation="only_second",
            max_length=data_args.max_seq_length,
            stride=data_args.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=data_args.padding,
        )

    def span_of(answers, offsets, sequence_ids) -> tuple[int, int]:
        """First and last token of the answer, or those of [CLS] where it lies outside of the feature."""
        if not answers["answer_start"]:
            return 0, 0
        first = answers["answer_start"][0]
        last = first + len(answers["text"][0])
        context = [i for i, sequence in enumerate(sequence_ids) if sequence == 1]
        starts = [i for i in context if offsets[i][0] <= first < offsets[i][1]]
        ends = [i for i in context if offsets[i][0] < last <= offsets[i][1]]
        return (starts[0], ends[0]) if starts and ends else (0, 0)

    def prepare_train_features(examples):
        tokenized = tokenize(examples)
        rows, offsets = tokenized.pop("overflow_to_sample_mapping"), tokenized.pop("offset_mapping")
        found = [
            span_of(examples["answers"][row], offsets[i], tokenized.sequence_ids(i)) for i, row in enumerate(rows)
        ]
        tokenized["start_positions"], tokenized["end_positions"] = [s for s, _ in found], [e for _, e in found]
        return tokenized

    def prepare_validation_features(examples):
        tokenized = tokenize(examples)
        tokenized["example_id"] = [examples["id"][row] for row in tokenized.pop("overflow_to_sample_mapping")]
        for i, offsets in enumerate(tokenized["offset_mapping"]):
            of_context = [sequence == 1 for sequence in tokenized.sequence_ids(i)]
            tokenized["offset_mapping"][i] = [o if its else None for o, its in zip(offsets, of_context, strict=True)]
        return tokenized

    train_examples = data_args.some(raw_datasets["train"], data_args.max_train_samples)
    eval_examples = data_args.some(raw_datasets["validation"], data_args.max_eval_samples)
    with training_args.main_process_first(desc="dataset map pre-processing"):
        train_dataset = train_examples.map(prepare_train_features, batched=True, remove_columns=column_names)
        eval_dataset = eval_examples.map(prepare_validation_features, batched=True, remove_columns=column_names)

    def post_processing_function(examples, features, predictions):
        """Answers and references, from the logits of the features."""
        parts = defaultdict(list)
        for starts, ends, feature in zip(*predictions, features, strict=True):
            parts[feature["example_id"]].append((starts, ends, feature["offset_mapping"]))
        most, longest = data_args.n_best_size, data_args.max_answer_length
        answers = [
            {"id": row["id"], "prediction_text": best_answer(row["context"], parts[row["id"]], most, longest)}
            for row in examples
        ]
        return EvalPrediction(
            predictions=answers, label_ids=[{"id": row["id"], "answers": row["answers"]} for row in examples]
        )

    def compute_metrics(p: EvalPrediction):
        pairs = [(a["prediction_text"], b["answers"]["text"]) for a, b in zip(p.predictions, p.label_ids, strict=True)]
        return {
            "exact_match": 100 * sum(ours in theirs for ours, theirs in pairs) / len(pairs),
            "f1": 100 * sum(max(overlap(ours, text) for text in theirs) for ours, theirs in pairs) / len(pairs),
        }

    trainer = (RMTKDQuestionAnsweringTrainer if model_args.reduction else QuestionAnsweringTrainer)(  # (+)
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        eval_examples=eval_examples if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        post_process_function=post_processing_function,
        compute_metrics=compute_metrics,
        **model_args.reduction,  # (+) rmtkd_config
    )
    train_and_evaluate(
        trainer,
        training_args,
        {"train": train_dataset, "validation": eval_dataset},
        finetuned_from=model_args.model_name_or_path,
        tasks="question-answering",
    )


if __name__ == "__main__":
    main()
