"""A fine-tuned model together with the data it is measured and distilled on."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RMTKDError
from ..hub.loading import load_config
from .data import DataArguments, find_columns, has_images, label_values, load_rows
from .metrics import METRICS, REGRESSION, choose_metric


if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel


__all__ = ["Task", "evaluate", "load_task", "stored_dtype", "weights_folder"]

HEADS = {"text": "ForSequenceClassification", "image": "ForImageClassification"}


@dataclass(frozen=True)
class Task:
    """All that calibration, distillation and evaluation need.

    Attributes:
        model: the loaded model, float32.
        processor: its tokenizer or image processor.
        train, validation: rows of model inputs and `labels`.
        collator: makes a batch of such rows.
        metric: name in `commands.metrics.METRICS`; by default "accuracy", or "pearson" for a model with one output.
    """

    model: PreTrainedModel
    processor: Any
    train: Dataset
    validation: Dataset
    collator: Callable
    metric: str

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """`compute_metrics` of a Trainer: the one metric of the task."""
        import numpy as np

        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        predicted = logits.reshape(-1) if self.metric in REGRESSION else logits.argmax(-1)
        return {self.metric: METRICS[self.metric](predicted, np.asarray(prediction.label_ids).reshape(-1))}

    def calibration_loader(self, batch_size: int, seed: int) -> DataLoader:
        """Batches of training rows in a fixed random order: files are often sorted by class."""
        import torch
        from torch.utils.data import DataLoader

        generator = torch.Generator().manual_seed(seed)
        return DataLoader(self.train, batch_size, shuffle=True, generator=generator, collate_fn=self.collator)


def load_task(model: str, data: DataArguments, seed: int = 0, attn_implementation: str | None = None) -> Task:
    """Load the model and its data and check that they belong together.

    Args:
        model: Hub name or local folder of a model fine-tuned for sequence or image classification, or regression.
        attn_implementation: the attention kernel, as in `from_pretrained`; None: what transformers chooses.

    Raises:
        RMTKDError: anything missing, unreadable or not matching; nothing has been computed yet.
    """
    config = load_config(model)
    train, validation = load_rows(data, seed)
    kind = "image" if has_images(train) else "text"
    _check_head(config, kind, model)
    inputs, label = find_columns(train, data)
    for name in (*inputs, label):
        if name not in validation.column_names:
            raise RMTKDError(
                f"The validation data has no column '{name}'; it has {', '.join(validation.column_names)}."
            )
    _check_same_classes(train.features[label], validation.features[label])
    labels = [label_values(rows, label, config) for rows in (train, validation)]
    metric = choose_metric(data.metric, isinstance(labels[0][0], float), config.num_labels)
    if kind == "text":
        processor, collator, encode = _text_tools(model, config, inputs, data.max_length)
    else:
        processor, collator, encode = _image_tools(model, config, inputs[0])
    return Task(
        model=_load_model(model, kind, attn_implementation),
        processor=processor,
        train=encode(train, labels[0]),
        validation=encode(validation, labels[1]),
        collator=collator,
        metric=metric,
    )


def evaluate(task: Task, model: PreTrainedModel, batch_size: int = 64) -> float:
    """The task's metric of `model` on the validation rows."""
    import torch
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_eval_batch_size=batch_size,
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.accelerator.is_available(),
        )
        trainer = Trainer(model, args, data_collator=task.collator, compute_metrics=task.compute_metrics)
        return trainer.predict(task.validation).metrics[f"test_{task.metric}"]


def weights_folder(model: str) -> Path:
    """Folder of the files of `model`: itself if local, else its snapshot in the Hub cache."""
    from transformers.utils import cached_file

    return Path(model) if Path(model).is_dir() else Path(cached_file(model, "config.json")).parent


def stored_dtype(model: str) -> str:
    """Name of the number format in which `model` is stored: float16, bfloat16, else float32."""
    name = str(load_config(model).dtype).removeprefix("torch.")
    return name if name in ("float16", "bfloat16") else "float32"


def _load_model(model: str, kind: str, attn_implementation: str | None) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if kind == "text" else AutoModelForImageClassification
    try:
        # Checkpoints stored in half precision would otherwise be calibrated and trained in it.
        loaded = auto.from_pretrained(model, dtype=torch.float32)
    except OSError as error:
        raise RMTKDError(f"Cannot load the weights of '{model}': {error}") from error
    if attn_implementation is not None:
        try:
            loaded.set_attn_implementation(attn_implementation)
        except (ValueError, ImportError) as error:
            raise RMTKDError(f"attn_implementation '{attn_implementation}': {error}") from error
    return loaded


def _check_head(config: PreTrainedConfig, kind: str, model: str) -> None:
    names = config.architectures or []
    if not any(name.endswith(HEADS[kind]) for name in names):
        raise RMTKDError(
            f"'{model}' is a {', '.join(names) or 'model of unknown architecture'}, the data is for {kind} "
            f"classification: expected a fine-tuned ...{HEADS[kind]}. Fine-tune the model on this data first, then "
            "compress it."
        )


def _check_same_classes(train: Any, validation: Any) -> None:
    ours, theirs = getattr(train, "names", None), getattr(validation, "names", None)
    if ours is not None and theirs is not None and ours != theirs:
        raise RMTKDError(
            f"Training data has the classes {', '.join(ours[:5])}, validation data {', '.join(theirs[:5])}: expected "
            "the same classes in the same order."
        )


def _text_tools(model: str, config: PreTrainedConfig, columns: list[str], max_length: int) -> tuple:
    from transformers import AutoTokenizer, DataCollatorWithPadding

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise RMTKDError(f"'{model}' has no tokenizer: {error}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # Without any file transformers makes an empty tokenizer that turns every word into [UNK].
        raise RMTKDError(
            f"'{model}' has no tokenizer files: save the tokenizer the model was fine-tuned with beside it."
        )
    if tokenizer.pad_token_id is None:
        raise RMTKDError(
            f"The tokenizer of '{model}', a {type(tokenizer).__name__} of {len(tokenizer)} tokens for a table of "
            f"{config.vocab_size} rows, has no padding token. If it belongs to another model, put the right one in "
            "its place; else set its pad_token and config.pad_token_id and save both."
        )
    length = min(max_length, tokenizer.model_max_length)

    def encode(rows: Dataset, labels: list) -> Dataset:
        def tokenize(batch: dict[str, list]) -> dict[str, list]:
            texts = [batch[column] for column in columns]
            _check_texts(texts, columns)
            encoded = tokenizer(*texts, truncation=True, max_length=length)
            _check_tokens(encoded["input_ids"], config.vocab_size, model)
            return encoded

        encoded = rows.map(tokenize, batched=True, remove_columns=rows.column_names, desc="tokenizing")
        return encoded.add_column("labels", labels)

    return tokenizer, DataCollatorWithPadding(tokenizer), encode


def _check_texts(texts: list[list], columns: list[str]) -> None:
    for column, values in zip(columns, texts):
        wrong = next((value for value in values if not isinstance(value, str)), "")
        if not isinstance(wrong, str):
            raise RMTKDError(f"Column '{column}' holds {wrong!r} where a text was expected: remove or fill such rows.")


def _check_tokens(input_ids: list[list[int]], vocabulary: int, model: str) -> None:
    highest = max((max(row) for row in input_ids if row), default=0)
    if highest >= vocabulary:
        raise RMTKDError(
            f"The tokenizer of '{model}' gives token {highest}, its embedding table has {vocabulary} rows: this is "
            "not the tokenizer the model was trained with."
        )


def _image_tools(model: str, config: PreTrainedConfig, column: str) -> tuple:
    from transformers import AutoImageProcessor, default_data_collator

    try:
        processor = AutoImageProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise RMTKDError(f"'{model}' has no image processor: {error}") from error
    mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"

    def prepare(batch: dict[str, list]) -> dict[str, list]:
        pixels = processor([image.convert(mode) for image in batch[column]], return_tensors="np")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": batch["labels"]}

    def encode(rows: Dataset, labels: list) -> Dataset:
        return (
            rows.remove_columns([n for n in rows.column_names if n != column])
            .add_column("labels", labels)
            .with_transform(prepare)
        )

    return processor, default_data_collator, encode
