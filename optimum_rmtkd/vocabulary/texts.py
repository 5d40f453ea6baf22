"""Texts, read once and in batches, and how often each token occurs in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm.auto import tqdm

from ..errors import RMTKDError


__all__ = ["Texts", "count_tokens", "encoded", "in_batches"]

Texts = Iterable[Any]
"""Strings; sequences of strings (pairs, lists of words); or mappings (rows of a data set, messages of a chat), of
which every string is a text and everything else passes by."""
BATCH, CHARACTERS = 1000, 1_000_000  # a batch has at most so many texts, and ends with the text that brings so many


def in_batches(texts: Texts, what: str = "texts") -> Iterator[list[str]]:
    """Lists of at most `BATCH` strings, and not many more than `CHARACTERS` characters: a text is never divided.

    Args:
        what: name of the argument, for messages and the progress bar.

    Raises:
        RMTKDError: no iterable of texts, an item that is no text and holds none, or no text at all.
    """
    columns = hasattr(texts, "iterrows")  # a DataFrame gives the names of its columns
    if isinstance(texts, (str, bytes, Mapping)) or columns or not isinstance(texts, Iterable):
        cure = "Pass one of its columns, frame['text']." if columns else "Put a single text into a list."
        raise RMTKDError(
            f"{what} is a {type(texts).__name__}; expected an iterable of texts: strings, pairs of them, or rows of a "
            f"data set. {cure}"
        )
    batch: list[str] = []
    row = length = read = 0
    bar = tqdm(texts, desc=f"reading {what}", unit="", unit_scale=True, leave=False, disable=None)
    for row, item in enumerate(bar, 1):
        if not isinstance(item, (str, Mapping)) and not (isinstance(item, Sequence) and not isinstance(item, bytes)):
            raise RMTKDError(
                f"Item {row} of {what} is a {type(item).__name__}; expected a string, a sequence of strings, or a row "
                "(a mapping) that holds some. Remove or convert it."
            )
        for text in _strings(item):
            batch.append(text)
            length, read = length + len(text), read + 1
            if len(batch) >= BATCH or length >= CHARACTERS:
                yield batch
                batch, length = [], 0
    if batch:
        yield batch
    if not read:
        found = f"{row:,} items without a string" if row else "nothing; an iterator that was read before is empty"
        raise RMTKDError(f"{what} holds no text: expected at least one string, got {found}.")


def _strings(item: Any) -> Iterator[str]:
    if isinstance(item, str):
        yield item
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from _strings(value)
    elif isinstance(item, Sequence) and not isinstance(item, bytes):
        for value in item:
            yield from _strings(value)


def encoded(backend: Tokenizer, batch: list[str] | list[tuple[str, str]], special: bool = False) -> list[list[int]]:
    """Ids of each text, or pair of texts, neither cut nor padded.

    Args:
        backend: without truncation and padding.
        special: with the special tokens that it puts around them.

    Raises:
        RMTKDError: a text that is no Unicode.
    """
    try:
        return [found.ids for found in backend.encode_batch_fast(batch, add_special_tokens=special)]
    except UnicodeEncodeError as error:
        raise RMTKDError(
            f"A text holds half a character ({error}), which is no Unicode: decode the file it comes from anew, for "
            "example with errors='replace'."
        ) from error


def count_tokens(
    backend: Tokenizer, texts: Texts, size: int, what: str = "texts"
) -> tuple[np.ndarray, int, list[str]]:
    """How often each id occurs.

    Args:
        size: highest id + 1.

    Returns:
        Counts, int64 (size,); the number of texts; and the first of them.

    Raises:
        RMTKDError: there is no text, or nothing in any.
    """
    counts, read, first = np.zeros(size, np.int64), 0, []
    for batch in in_batches(texts, what):
        ids = [i for row in encoded(backend, batch) for i in row]
        counts += np.bincount(np.asarray(ids, np.int64), minlength=size)
        first = first or batch
        read += len(batch)
    if not counts.any():
        raise RMTKDError(f"{what} holds no token: expected texts, got {read:,} strings that are empty or blank.")
    return counts, read, first
