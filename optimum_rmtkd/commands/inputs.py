"""Texts and images of the rows as the model takes them, checked before anything is trained."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..errors import RMTKDError
from ..hub import loading
from .tables import UNREADABLE, check_utf8


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel


__all__ = ["check_inputs", "check_tokens", "image_tools", "load_tokenizer", "text_tools"]

DEEP = ("I", "F")  # modes of more than 8 bits a channel
DRAFT = (64, 64)  # jpeg files are decoded this small to see that they can be: all bytes are read, most work is saved


def check_inputs(rows: Dataset, columns: list[str]) -> None:
    """Refuse rows without an input.

    Raises:
        RMTKDError: names the column and the first such row.
    """
    for column in columns:
        feature = rows.features[column]
        batches = rows.select_columns([column]).with_format("arrow").iter(1000)  # in arrow images stay where they are
        gaps = chain.from_iterable(batch[column].is_null().to_pylist() for batch in batches)
        empty = [row for row, gap in enumerate(gaps, 1) if gap]
        if empty:
            raise RMTKDError(
                f"Column '{column}' holds nothing in {len(empty)} of {len(rows)} rows, the first of them row "
                f"{empty[0]}: remove or fill such rows."
            )
        if type(feature).__name__ == "Image":
            continue
        if getattr(feature, "dtype", None) not in ("string", "large_string"):
            raise RMTKDError(
                f"Column '{column}' holds {getattr(feature, 'dtype', type(feature).__name__)}, where a text was "
                "expected: name the right one with --text-column."
            )
        check_utf8(rows, column)


# -- text -------------------------------------------------------------------------------------------------------------


def load_tokenizer(name: str, config: PreTrainedConfig, padded: bool = True) -> Any:
    """The tokenizer beside a model, which can pad unless that is not asked of it.

    Raises:
        RMTKDError: the model has no tokenizer, or one that is not its own.
    """
    tokenizer = loading.load_tokenizer(name)
    if padded and tokenizer.pad_token_id is None:
        raise RMTKDError(
            f"The tokenizer of '{name}', a {type(tokenizer).__name__} of {len(tokenizer)} tokens for a table of "
            f"{config.vocab_size} rows, has no padding token. If it belongs to another model, put the right one in "
            "its place; else set its pad_token and config.pad_token_id and save both."
        )
    if not isinstance(tokenizer.model_max_length, (int, float)):
        raise RMTKDError(
            f"The tokenizer of '{name}' has model_max_length={tokenizer.model_max_length!r}; expected a number of "
            "tokens. Correct its tokenizer_config.json."
        )
    return tokenizer


def text_tools(
    name: str, model: PreTrainedModel, tokenizer: Any, columns: list[str], max_length: int
) -> tuple[Callable, Callable]:
    """Collator, and a function (rows with `labels`, what they are) -> rows of model inputs.

    Raises:
        RMTKDError: called on rows, a tokenizer that is not the model's.
    """
    from transformers import DataCollatorWithPadding

    from ..batches.examples import longest_text

    config = model.config
    length = min(max_length, tokenizer.model_max_length, longest_text(model) or max_length)

    def encode(rows: Dataset, what: str) -> Dataset:
        def tokenize(batch: dict[str, list]) -> dict[str, list]:
            with loading.tokenizing(name):
                encoded = _truncated(tokenizer, [batch[column] for column in columns], length)
            check_tokens(encoded["input_ids"], config.vocab_size, name)
            return encoded

        encoded = rows.map(tokenize, batched=True, remove_columns=columns, desc="tokenizing")
        cut = sum(encoded[CUT])
        if cut:
            print(f"{cut} of {len(rows)} {what} texts are longer than {length} tokens and were cut to that length")
        return encoded.remove_columns(CUT)

    return DataCollatorWithPadding(tokenizer), encode


CUT = "_cut"


def _truncated(tokenizer: Any, texts: list[list[str]], length: int) -> dict[str, list]:
    """Model inputs of at most `length` tokens, and whether a text was cut."""
    found = dict(tokenizer(*texts, truncation=True, max_length=length + 1))
    found[CUT] = [len(ids) > length for ids in found["input_ids"]]
    long = [i for i, is_cut in enumerate(found[CUT]) if is_cut]
    if long:
        again = tokenizer(*[[column[i] for i in long] for column in texts], truncation=True, max_length=length)
        for key, values in again.items():
            for i, value in zip(long, values, strict=True):
                found[key][i] = value
    return found


def check_tokens(input_ids: list[list[int]], vocabulary: int, model: str) -> None:
    highest = max((max(row) for row in input_ids if row), default=0)
    if highest >= vocabulary:
        raise RMTKDError(
            f"The tokenizer of '{model}' gives token {highest}, its embedding table has {vocabulary} rows: this is "
            "not the tokenizer the model was trained with."
        )


# -- images -----------------------------------------------------------------------------------------------------------


def image_tools(model: str, config: PreTrainedConfig, column: str) -> tuple[Any, Callable, Callable]:
    """Image processor, collator, and a function (rows with `labels`, what they are) -> rows of model inputs.

    Raises:
        RMTKDError: the model has no image processor; called on rows, an image that cannot be read.
    """
    from transformers import default_data_collator

    processor = loading.load_image_processor(model)
    mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"

    def prepare(batch: dict[str, list]) -> dict[str, list]:
        pixels = processor([image.convert(mode) for image in batch[column]], return_tensors="np")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": batch["labels"]}

    size = getattr(processor, "size", None)
    shortest = size.get("shortest_edge") if hasattr(size, "get") else None

    def encode(rows: Dataset, what: str) -> Dataset:
        _check_images(rows, column, what, shortest)
        return rows.with_transform(prepare)

    return processor, default_data_collator, encode


def _check_images(rows: Dataset, column: str, what: str, shortest: int | None = None) -> None:
    """Decode every image once: one that cannot be read would end a training of hours.

    Args:
        shortest: pixels of the shorter side, where images are resized to that and keep their proportions.
    """
    from datasets import Image
    from tqdm.auto import tqdm

    stored = rows.select_columns([column]).cast_column(column, Image(decode=False))
    for row, cell in enumerate(tqdm(stored, desc="checking images", unit="image", leave=False, disable=None), 1):
        if told := _fault_of(cell[column], shortest):
            place = cell[column].get("path") or f"in row {row}"
            raise RMTKDError(f"The {what} image {place} cannot be read ({told}): replace or remove it.")


def _fault_of(stored: dict[str, Any], shortest: int | None = None) -> str | None:
    from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

    if stored.get("bytes") is None and not stored.get("path"):
        return "it holds nothing"
    source = io.BytesIO(stored["bytes"]) if stored.get("bytes") is not None else stored["path"]
    try:
        with Image.open(source) as image:
            if told := _too_long(image.size, shortest):
                return told
            image.draft("RGB", DRAFT)
            image.load()
            if image.getexif().get(ExifTags.Base.Orientation) is not None:  # as datasets does when it decodes
                ImageOps.exif_transpose(image)
            if image.mode.startswith(DEEP):
                return f"its mode is {image.mode}, which would be cut off at 255: save it with 8 bits a channel"
    except UnidentifiedImageError:
        return "it is no image that Pillow knows"
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _too_long(size: tuple[int, int], shortest: int | None) -> str | None:
    """A strip of pixels becomes a huge image where its shorter side is enlarged and its proportions are kept."""
    from PIL import Image

    if not isinstance(shortest, int) or Image.MAX_IMAGE_PIXELS is None:
        return None
    longest = shortest * max(size) // max(1, min(size))
    if shortest * longest <= Image.MAX_IMAGE_PIXELS:
        return None
    return f"its {size[0]} x {size[1]} pixels would be resized to {shortest} x {longest}"
