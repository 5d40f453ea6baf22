"""A language model together with plain text that it is measured and distilled on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import RMTKDError
from ..hub.loading import tokenizing
from ..validation.wording import shown
from .corpora import check_texts, text_columns, texts_of
from .data import HELD_OUT, DataArguments
from .inputs import check_tokens, load_tokenizer
from .streams import TEXT, columns_of, suffix_of


if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from torch.utils.data import DataLoader
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["LanguageTask", "is_plain_text", "check_separator", "kind_of", "load_language_task", "token_stream"]

PLAIN = ".txt"
MASKED_SHARE = 0.15
AT_ONCE = 1000  # texts that are tokenized together


@dataclass(frozen=True)
class LanguageTask:
    """All that calibration, distillation and evaluation need.

    Attributes:
        model: the loaded model, float32.
        processor: its tokenizer.
        train, validation: rows of blocks: `input_ids`, `attention_mask`, `labels`, all of one length.
        kind: "causal" or "masked".
        running: (n,) the validation text as one; None for masked models.
        window: tokens that the model sees at once.
        untrimmed: of a `Task`; the vocabulary stays.
    """

    model: PreTrainedModel
    processor: Any
    train: Dataset
    validation: Dataset
    kind: str
    running: Tensor | None
    window: int
    untrimmed: None = None

    metric: ClassVar[str] = "perplexity"
    judged_by: ClassVar[str] = "eval_perplexity"
    greater_is_better: ClassVar[bool] = False
    trained_by: ClassVar[str] = "loss"  # what a Trainer measures of these rows
    compute_metrics: ClassVar[None] = None  # no logits are gathered
    new_head: ClassVar[bool] = False
    vocabulary: ClassVar[None] = None

    def collator(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        from transformers import default_data_collator

        return default_data_collator(rows)

    def calibration_loader(self, batch_size: int, seed: int) -> DataLoader:
        """Batches of blocks in a fixed random order."""
        import torch
        from torch.utils.data import DataLoader

        generator = torch.Generator().manual_seed(seed)
        return DataLoader(self.train, batch_size, shuffle=True, generator=generator, collate_fn=self.collator)

    def measure(self, model: PreTrainedModel, batch_size: int) -> dict[str, float]:
        """Perplexity of the validation text and its logarithm, named as by `Trainer.evaluate`. As by a
        Trainer, the model is moved to the accelerator, where there is one."""
        import torch
        from torch.utils.data import DataLoader

        from ..distillation.perplexity import masked_perplexity, perplexity

        if torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
        if self.kind == "masked":
            found = masked_perplexity(model, DataLoader(self.validation, batch_size, collate_fn=self.collator))
        else:
            found = perplexity(model, self.running, self.window, batch_size=batch_size)
        return {"eval_perplexity": found.value, "eval_loss": found.loss}


def kind_of(config: PreTrainedConfig) -> str | None:
    """Whether a config is of a "causal" or a "masked" language model, reduced or not; None for others,
    encoders with a decoder among them."""
    from transformers.models.auto import modeling_auto

    from ..modeling_rmtkd import PREFIX

    if getattr(config, "is_encoder_decoder", False):  # transformers counts BART among the masked ones
        return None
    name = (config.architectures or [""])[0].removeprefix(PREFIX)
    if name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "causal"
    return "masked" if name in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() else None


def is_plain_text(data: DataArguments, fit: bool) -> bool:
    """Whether the data of a language model are texts for it as it is. A table is for a classifier, unless its texts
    are named or its only column; with `fit`, which makes a new head of any other model, unless no column is left for
    labels."""
    if data.label_column is not None or data.train_file is None or Path(data.train_file).is_dir():
        return False
    path = Path(data.train_file)
    if suffix_of(path) == PLAIN:
        return True
    if data.text_column is not None and not fit:
        return True
    columns = columns_of(path)
    return set(columns) == set(data.text_column or ()) or list(columns.values()) == [TEXT]


def load_language_task(
    name: str, config: PreTrainedConfig, data: DataArguments, load: Any, trim: bool, asked: int | None
) -> LanguageTask:
    """Load a language model and its text, and check that they belong together.

    Args:
        load: (name, kind) -> the model in float32.
        asked: rows of calibration that were asked for; None: as many as there are.

    Raises:
        RMTKDError: options that are for classifiers, a text that is missing or too short, blocks
            longer than the model takes; nothing has been computed yet.
    """
    _check_options(name, config, data, trim)
    files = [file for file in (data.train_file, data.validation_file) if file is not None]
    check_texts(files)
    kind, columns = kind_of(config), text_columns(files, data.text_column)
    named = f"the texts in {', '.join(columns[data.train_file])} of" if data.train_file in columns else "the lines of"
    print(f"'{name}' stays a {kind} language model: cut, distilled and measured on {named} {data.train_file}")
    tokenizer = load_tokenizer(name, config, padded=kind == "masked")
    length = _length(name, config, tokenizer, data.max_length)
    _check_ends(name, tokenizer, kind, files)
    train, validation = _streams(files, columns, tokenizer, kind, length, data)
    model = load(name, kind)
    from ..batches.examples import longest_text

    longest = longest_text(model)
    if longest is not None and length > longest:
        raise _too_long(name, length, longest)
    for ids in (train, validation):
        check_tokens([ids], model.config.get_text_config().vocab_size, name)
    blocks = _blocks(train, length, tokenizer, kind, "training", data.max_train_samples)
    held = _blocks(validation, length, tokenizer, kind, "validation", None, data.max_eval_samples)
    if asked is not None and len(blocks) < asked:
        raise RMTKDError(
            f"--calibration-samples {asked}: the training text has {len(blocks)} blocks of {length} tokens. Give more "
            "text, shorter blocks (--max-length), or ask for fewer."
        )
    import torch

    running = torch.tensor(validation) if kind == "causal" else None
    if running is not None and data.max_eval_samples is not None:
        running = running[: data.max_eval_samples * length]
    return LanguageTask(model, tokenizer, blocks, held, kind, running, length)


def _check_options(name: str, config: PreTrainedConfig, data: DataArguments, trim: bool) -> None:
    """What is for classifiers, and what cannot be narrowed."""
    given = [option for option in ("label_map", "metric") if getattr(data, option) is not None]
    if given:
        raise RMTKDError(
            f"--{given[0].replace('_', '-')}: '{name}' is a {config.architectures[0]}, which is measured by its "
            "perplexity on plain text. Leave the option out, or give a fine-tuned classifier (--fit makes one)."
        )
    if trim:
        raise RMTKDError(
            f"--trim-vocabulary: '{name}' is a language model, whose perplexities before and after would be over "
            "different words. Trim it first (optimum-cli rmtkd trim), and compress the result."
        )


def _length(name: str, config: PreTrainedConfig, tokenizer: Any, asked: int) -> int:
    """Tokens of a block: what is asked for; the default gives way to what the model takes."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    default = DataArguments.max_length
    if asked < 8:
        raise RMTKDError(f"--max-length {asked}: expected blocks of at least 8 tokens.")
    if not isinstance(longest, int) or longest < 1 or asked <= longest:
        return asked
    if asked == default:
        return longest
    raise _too_long(name, asked, longest)


def _too_long(name: str, length: int, longest: int) -> RMTKDError:
    return RMTKDError(
        f"--max-length {length}: '{name}' has positions for {longest} tokens. Give at most {longest}; it is also the "
        "window of the perplexity."
    )


def _check_ends(name: str, tokenizer: Any, kind: str, files: Sequence[str]) -> None:
    if kind == "masked" and tokenizer.mask_token_id is None:
        raise RMTKDError(f"The tokenizer of '{name}' has no mask token: it is not that of a masked language model.")
    check_separator(name, tokenizer, files)


def marks_ends(tokenizer: Any) -> bool:
    """Whether a tokenizer sets tokens of its own before or behind a text: bos, for example."""
    return bool(tokenizer("")["input_ids"])


def check_separator(name: str, tokenizer: Any, files: Sequence[str]) -> None:
    """Something has to stand between two texts of a table.

    Raises:
        RMTKDError: the tokenizer sets no ends, and has no eos.
    """
    tables = [file for file in files if suffix_of(Path(file)) != PLAIN]
    if tables and not marks_ends(tokenizer) and tokenizer.eos_token_id is None:
        raise RMTKDError(
            f"The tokenizer of '{name}' has no eos token, which stands between the texts of {tables[0]}: set its "
            "eos_token and save it, or give running text in a .txt file."
        )


def token_stream(
    files: Sequence[str], columns: dict[str, list[str]], tokenizer: Any, kind: str = "causal"
) -> Iterator[list[int]]:
    """The ids of each text of the files, one after the other. Lines of a .txt are one running text, and keep their
    line breaks; cells of a table are texts of their own, with the ends that the tokenizer gives them, or eos behind
    each where it gives none."""
    ended = marks_ends(tokenizer)
    for file in files:
        running = suffix_of(Path(file)) == PLAIN and kind == "causal"
        texts = (_as_text(text, file) for text in texts_of([file], columns, blank_lines=running))
        while part := list(islice(texts, AT_ONCE)):
            whole, specials = ("\n".join(part) + "\n", {"add_special_tokens": False}) if running else (part, {})
            with tokenizing(getattr(tokenizer, "name_or_path", "the model")):
                ids = tokenizer(whole, verbose=False, **specials)["input_ids"]
            if running:
                yield ids
            else:
                yield from ids if ended else (row + [tokenizer.eos_token_id] for row in ids)


def _as_text(value: Any, file: str) -> str:
    if not isinstance(value, str):
        raise RMTKDError(
            f"{file}: a text column holds a {type(value).__name__} where a text was expected. Write conversations out "
            "with tokenizer.apply_chat_template(..., tokenize=False), and name that column with --text-column."
        )
    try:
        value.encode("utf8")
    except UnicodeEncodeError as error:
        raise RMTKDError(
            f"{file}: a text holds half a character ({shown(value[error.start])}, behind "
            f"{shown(value[: error.start][-20:])}), which is no Unicode. Remove it, or write the file anew."
        ) from error
    return value


def _streams(
    files: Sequence[str], columns: dict, tokenizer: Any, kind: str, length: int, data: DataArguments
) -> tuple[list[int], list[int]]:
    """Ids of the training and of the validation text; where there is none of its own, the last tenth is held out."""

    def read(file: str, most: int | None) -> list[int]:
        found: list[int] = []
        for ids in token_stream([file], columns, tokenizer, kind):
            found += ids
            if most is not None and len(found) >= most * length:
                break
        return found

    if data.validation_file is not None:
        return read(data.train_file, data.max_train_samples), read(data.validation_file, data.max_eval_samples)
    whole = read(data.train_file, None)
    held = max(length, round(HELD_OUT * len(whole)))
    if len(whole) < 2 * length:
        raise _too_short("training", len(whole), 2 * length, "one block for training, one for validation")
    print(f"no validation data given: the last {held:,} of {len(whole):,} tokens are held out")
    return whole[:-held], whole[-held:]


def _too_short(what: str, tokens: int, needed: int, why: str) -> RMTKDError:
    return RMTKDError(
        f"The {what} text has {tokens} tokens; expected at least {needed} ({why}). Give more text, or shorter blocks "
        "(--max-length)."
    )


def _blocks(
    ids: list[int], length: int, tokenizer: Any, kind: str, what: str, asked: int | None, most: int | None = None
) -> Dataset:
    """Rows of one length; what is left over at the end is dropped.

    Args:
        asked: blocks that there have to be.
        most: that are taken.
    """
    import torch
    from datasets import Dataset

    wanted = asked or 1
    if len(ids) < wanted * length:
        why = f"--max-train-samples {asked} blocks of {length}" if asked else f"one block of {length}"
        raise _too_short(what, len(ids), wanted * length, why)
    count = min(len(ids) // length, asked or most or len(ids))
    rows = torch.tensor(ids[: count * length]).view(count, length)
    inputs, labels = (rows, rows) if kind == "causal" else _masked(rows, tokenizer)
    columns = {"input_ids": inputs, "attention_mask": torch.ones_like(rows), "labels": labels}
    return Dataset.from_dict({name: list(value.numpy()) for name, value in columns.items()})


def _masked(rows: Tensor, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Inputs and labels; masks are drawn once, so that every pass and every model sees the same."""
    import torch
    from transformers import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED_SHARE)
    special = torch.isin(rows, torch.tensor(tokenizer.all_special_ids))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs, labels = collator.torch_mask_tokens(rows.clone(), special_tokens_mask=special)
    return inputs, labels
