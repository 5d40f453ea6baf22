"""A fine-tuned model together with the data it is measured and distilled on."""

from __future__ import annotations

import contextlib
import io
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import RMTKDError
from ..hub.loading import check_plain, load_config, refusals_named
from ..hub.measures import of_quality
from .data import DataArguments, divide, find_columns, has_images, read_rows
from .heads import with_new_head
from .inputs import check_inputs, image_tools, load_tokenizer, text_tools
from .labels import check_label_map, class_names, is_regression, label_values, parse_label_map, shown
from .language import LanguageTask, is_plain_text, kind_of, load_language_task
from .metrics import METRICS, REGRESSION, choose_metric


if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel

    from ..vocabulary import VocabularyReport


__all__ = ["Task", "evaluate", "load_task", "measure", "stored_dtype", "weights_folder"]

HEADS = {"text": "ForSequenceClassification", "image": "ForImageClassification"}
AUTO = HEADS | {"causal": "ForCausalLM", "masked": "ForMaskedLM"}


@dataclass(frozen=True)
class Task:
    """All that calibration, distillation and evaluation need.

    Attributes:
        model: the loaded model, float32.
        processor: its tokenizer or image processor.
        train, validation: rows of model inputs and `labels`.
        collator: makes a batch of such rows.
        metric: name in `commands.metrics.METRICS`; by default "accuracy", or "pearson" for a model with one output.
        new_head: the head was made for these data, and knows nothing of them yet.
        vocabulary: what a trimming of the vocabulary kept; None without one.
        untrimmed: the task with the model and tokenizer as they were before it, without training rows; None likewise.
    """

    model: PreTrainedModel
    processor: Any
    train: Dataset
    validation: Dataset
    collator: Callable
    metric: str
    new_head: bool = False
    vocabulary: VocabularyReport | None = None
    untrimmed: Task | None = None

    greater_is_better: ClassVar[bool] = True

    @property
    def judged_by(self) -> str:
        """Name of the metric among those of `measure`."""
        return f"eval_{self.metric}"

    @property
    def trained_by(self) -> str:
        """Name of the metric by which a Trainer judges."""
        return self.metric

    def measure(self, model: PreTrainedModel, batch_size: int) -> dict[str, float]:
        return measure(self, model, batch_size)

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


def _check_columns(validation: Dataset, names: tuple[str, ...]) -> None:
    for name in names:
        if name not in validation.column_names:
            raise RMTKDError(
                f"The validation data has no column '{name}'; it has {', '.join(validation.column_names)}."
            )


def load_task(
    model: str,
    data: DataArguments,
    seed: int = 0,
    attn_implementation: str | None = None,
    head: Literal["required", "made"] = "required",
    trim: bool = False,
    calibration: int | None = None,
) -> Task | LanguageTask:
    """Load the model and its data and check that they belong together.

    Args:
        model: Hub name or local folder of a model fine-tuned for sequence or image classification, or regression.
        attn_implementation: the attention kernel, as in `from_pretrained`; None: what transformers chooses.
        head: "made": a model without a head that fits the labels gets a new one; a line says so.
        trim: drop the tokens that the training texts do not use. Where no validation rows are given, those held out
            do not count.
        calibration: rows of it that were asked for; None: as many as there are.

    Raises:
        RMTKDError: anything missing, unreadable or not matching; nothing has been computed yet.
    """
    config = load_config(model)
    check_plain(model, config)
    if kind_of(config) is not None and is_plain_text(data, fit=head == "made"):

        def load(name: str, kind: str) -> PreTrainedModel:
            return _load_model(name, None, kind, attn_implementation, seed)

        return load_language_task(model, config, data, load, trim, calibration)
    train, validation = read_rows(data)
    kind = "image" if has_images(train) else "text"
    if kind == "image" and trim:
        raise RMTKDError("--trim-vocabulary is for texts; these data are images. Leave it out.")
    if head == "required":
        _check_head(config, kind, model)
    inputs, label = find_columns(train, data)
    if validation is not None:
        _check_columns(validation, (*inputs, label))
    new = head == "made" and (why := _unfit(config, kind, train, label, data))
    if new:
        config = with_new_head(config, train, label, data.metric, parse_label_map(data.label_map))
    metric = choose_metric(data.metric, is_regression(config), config.num_labels)
    # before any row is drawn or held out: errors name the rows of the files
    train, validation = _labelled(train, validation, inputs, label, config, data)
    counted = train if validation is not None else None
    train, validation = divide(train, validation, data, seed)
    if kind == "image":  # each is decoded once: before the model is loaded
        processor, collator, encode = image_tools(model, config, inputs[0])
        train, validation = encode(train, "training"), encode(validation, "validation")
    loaded = _load_model(model, config if new else None, kind, attn_implementation, seed)
    if new:
        gives = (
            "one number" if is_regression(config) else f"{config.num_labels} classes ({shown(class_names(config))})"
        )
        print(f"{why}: it gets a new head for {gives}, and is fine-tuned first")
    if kind == "image":
        return Task(loaded, processor, train, validation, collator, metric, bool(new))

    def made(loaded: PreTrainedModel, tokenizer: Any, train: Dataset) -> Task:
        collator, encode = text_tools(model, loaded, tokenizer, inputs, data.max_length)
        rows = encode(train, "training"), encode(validation, "validation")
        return Task(loaded, tokenizer, *rows, collator, metric, bool(new))

    tokenizer = load_tokenizer(model, loaded.config)
    if not trim:
        return made(loaded, tokenizer, train)
    small, tokens, report = _trimmed(loaded, tokenizer, inputs, train if counted is None else counted, validation)
    return replace(
        made(small, tokens, train), vocabulary=report, untrimmed=made(loaded, tokenizer, train.select(range(1)))
    )


def _trimmed(
    model: PreTrainedModel, tokenizer: Any, columns: list[str], train: Dataset, validation: Dataset
) -> tuple[PreTrainedModel, Any, VocabularyReport]:
    from ..vocabulary import trim_vocabulary

    texts, held_out = (rows.select_columns(columns) for rows in (train, validation))
    return trim_vocabulary(model, tokenizer, texts, validation_texts=held_out)


def _unfit(config: PreTrainedConfig, kind: str, train: Dataset, column: str, data: DataArguments) -> str | None:
    """Why a model's head does not fit the labels; None where it does."""
    names = config.architectures or []
    if not any(name.endswith(HEADS[kind]) for name in names):
        return f"{', '.join(names) or 'the model'} has no head for {kind} classification"
    try:
        choose_metric(data.metric, is_regression(config), config.num_labels)
        with contextlib.redirect_stdout(io.StringIO()):  # what it has to say is said when the labels are taken
            label_values(train, column, config, parse_label_map(data.label_map))
    except RMTKDError as error:
        return f"the head of {names[0]} does not fit the data ({str(error).rstrip('.')})"
    return None


def _labelled(
    train: Dataset,
    validation: Dataset | None,
    inputs: list[str],
    column: str,
    config: PreTrainedConfig,
    data: DataArguments,
) -> tuple[Dataset, Dataset | None]:
    """The rows with nothing but their inputs and `labels` as the model counts them."""
    label_map = parse_label_map(data.label_map)
    given = [rows for rows in (train, validation) if rows is not None]
    if label_map:
        check_label_map(label_map, given, column)
    found = []
    for rows in given:
        check_inputs(rows, inputs)
        labels = label_values(rows, column, config, label_map, like=train)
        kept = rows.select_columns(inputs)
        if "labels" in inputs:
            raise RMTKDError("An input column cannot be called 'labels': rename it.")
        found.append(kept.add_column("labels", labels))
    return found[0], found[1] if validation is not None else None


def evaluate(task: Task, model: PreTrainedModel, batch_size: int = 64) -> float:
    """The task's metric of `model` on the validation rows."""
    return measure(task, model, batch_size)[task.judged_by]


def measure(task: Task, model: PreTrainedModel, batch_size: int = 64) -> dict[str, float]:
    """All metrics of `model` on the validation rows, named as by `Trainer.evaluate`: eval_loss and the task's own."""
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
        return of_quality(trainer.predict(task.validation, metric_key_prefix="eval").metrics)


def weights_folder(model: str) -> Path:
    """Folder of the files of `model`: itself if local, else its snapshot in the Hub cache."""
    from transformers.utils import cached_file

    return Path(model) if Path(model).is_dir() else Path(cached_file(model, "config.json")).parent


def stored_dtype(model: str) -> str:
    """Name of the number format in which `model` is stored: float16, bfloat16, else float32."""
    name = str(load_config(model).dtype).removeprefix("torch.")
    return name if name in ("float16", "bfloat16") else "float32"


def _load_model(
    model: str, config: PreTrainedConfig | None, kind: str, attn_implementation: str | None, seed: int
) -> PreTrainedModel:
    """In float32, the number format in which it is calibrated and trained, whatever it is stored in.

    Args:
        config: of a model that gets a new head, drawn with `seed`; None: its own.
    """
    import torch
    import transformers

    auto = getattr(transformers, f"AutoModel{AUTO[kind]}")
    options = {} if config is None else {"config": config, "ignore_mismatched_sizes": True}
    with refusals_named(f"Cannot load the weights of '{model}'"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a run that goes on from a checkpoint needs the same head
        loaded, found = auto.from_pretrained(
            model, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, **options
        )
    missing = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    if config is not None:
        missing = {name for name in missing if _in_backbone(loaded, name)}
    if missing := sorted(missing):  # transformers makes them up, with a warning
        raise RMTKDError(
            f"The weights of '{model}' lack {len(missing)} tensor(s) that its config.json describes, the first is "
            f"{missing[0]}: expected a whole {'fine-tuned ' if config is None else ''}checkpoint. Save config and "
            "weights together again."
        )
    if attn_implementation is not None:
        try:
            loaded.set_attn_implementation(attn_implementation)
        except (ValueError, ImportError) as error:
            raise RMTKDError(f"attn_implementation '{attn_implementation}': {error}") from error
    return loaded


def _in_backbone(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor belongs to what pretraining made: a pooler, which masked models leave out, does not."""
    return name.startswith(f"{model.base_model_prefix}.") and "pooler" not in name.split(".")


def _check_head(config: PreTrainedConfig, kind: str, model: str) -> None:
    names, language = config.architectures or [], kind_of(config) is not None
    if not any(name.endswith(HEADS[kind]) for name in names):
        raise RMTKDError(
            f"'{model}' is a {', '.join(names) or 'model of unknown architecture'}, the data is for {kind} "
            f"classification: expected a fine-tuned ...{HEADS[kind]}. Fine-tune the model on this data first, or "
            "let compress do so (--fit)."
            + (" For the language model itself, give text in files and name its --text-column." if language else "")
        )
