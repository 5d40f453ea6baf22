"""Rows of local tables one after the other, also of packed ones: corpora may be larger than memory. What a row is, and
what a cell holds, is as in `tables`."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..errors import RMTKDError
from .tables import MISSING, NUMBER, SEPARATORS, csv_rows, json_line, readable


__all__ = ["NAMED", "PACKED", "TEXT", "columns_of", "contents_of", "opened", "rows_of", "suffix_of"]

PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
CHUNK = 1 << 18  # characters
BLANK = re.compile(r"\s*")
COMMA = re.compile(r"\s*,?\s*")
OTHER, NAMED, TEXT = range(3)  # what a column holds: no texts, something that may be read as texts, texts
BATCH = 1000  # rows


def suffix_of(path: Path) -> str:
    """The ending that says what a file holds, in lower case: of `train.csv.gz` it is .csv."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in PACKED else path.suffix.lower()


def opened(path: Path) -> TextIO:
    """The file as UTF-8 text, unpacked."""
    unpack = PACKED.get(path.suffix.lower(), open)
    return unpack(path, "rt", encoding="utf-8-sig", newline="" if suffix_of(path) in SEPARATORS else None)


def contents_of(path: Path) -> str:
    """The first characters of a packed file.

    Raises:
        RMTKDError: it is not packed as its name says, is no UTF-8 text, or empty.
    """
    with readable(path), opened(path) as file:
        head = file.read(4096)
    if not head or "\0" in head:
        raise RMTKDError(f"{path} is empty." if not head else f"Cannot read {path}: it holds no text.")
    return head


def columns_of(path: Path) -> dict[str, int]:
    """{column: TEXT, NAMED or OTHER}; the whole file is read, row by row, but for a parquet file.

    A column where any value is a string holds texts, but for one of a csv or tsv with nothing but numbers: that may be
    meant as text, as nested values may (messages).

    Raises:
        RMTKDError: the file cannot be read to its end, or has no rows; the message names it, and the line where that
            is known.
    """
    if suffix_of(path) == ".parquet":
        with _parquet(path) as file:
            return {field.name: _kind_of_type(field.type) for field in file.schema_arrow}
    kind_of = _kind_of_cell if suffix_of(path) in SEPARATORS else _kind_of_value
    found: dict[str, int] = {}
    row = None
    for row in rows_of(path):
        for name, value in row.items():
            found[name] = max(found.get(name, OTHER), kind_of(value))
    if row is None:
        raise RMTKDError(f"Cannot read {path}: it holds no rows")
    return found


def rows_of(path: Path, names: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Each row as {column: value}; an empty cell of a csv is None.

    Args:
        names: columns that are wanted, None for all; others may be among them.

    Raises:
        RMTKDError: as `columns_of`, when it is the turn of the row.
    """
    suffix = suffix_of(path)
    if suffix == ".parquet":
        with _parquet(path) as file:
            for batch in file.iter_batches(BATCH, columns=None if names is None else list(names)):
                yield from batch.to_pylist()
        return
    with readable(path), opened(path) as file:
        if suffix in SEPARATORS:
            rows = csv_rows(path, SEPARATORS[suffix], file)
            header = next(rows)
            yield from (dict(zip(header, (cell or None for cell in row), strict=True)) for row in rows)
        else:
            yield from _json_rows(path, file)


def _kind_of_cell(cell: str | None) -> int:
    """Of a csv. Numbers, and words for gaps among numbers, make no column of texts."""
    if cell is None:
        return OTHER
    cell = cell.strip()
    number = NUMBER.fullmatch(cell) and not re.match(r"[+-]?0\d", cell)  # 007 is a name
    return NAMED if number or cell.casefold() in MISSING else TEXT


def _kind_of_value(value: Any) -> int:
    if isinstance(value, str):
        return TEXT
    return NAMED if isinstance(value, (dict, list)) else OTHER


def _kind_of_type(kind: Any) -> int:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return TEXT
    return NAMED if types.is_nested(kind) else OTHER


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with readable(path), ParquetFile(path) as file:
        if not file.metadata.num_rows:
            raise RMTKDError(f"Cannot read {path}: it holds no rows")
        yield file


# -- json -------------------------------------------------------------------------------------------------------------


def _json_rows(path: Path, file: TextIO) -> Iterator[dict[str, Any]]:
    """Objects of a list, or one a line; an object of lists, which is columns, is read whole."""
    head, number = file.read(1), 1
    while head.isspace():
        head, number = file.read(1), number + (head == "\n")
    # a list may be one line, a gigabyte long
    rows = _elements(path, head, file) if head == "[" else _lines(path, head + file.readline(), number, file)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise RMTKDError(f"Cannot read {path}: row {number} is a {type(row).__name__}; expected an object.")
        yield row


def _lines(path: Path, line: str, number: int, file: TextIO) -> Iterator[Any]:
    """
    Args:
        line: the first that is not blank, already read from the file, and its number.
    """
    try:
        first = json.loads(line)
    except json.JSONDecodeError:  # one object over several lines
        yield from _columns(path, json.loads(line + file.read()))
        return
    rest = ((number, line) for number, line in enumerate(file, number + 1) if line.strip())
    second = next(rest, None)
    if second is None:
        yield from _columns(path, first)
        return
    yield first
    yield json_line(second[1], second[0], path)
    yield from (json_line(line, number, path) for number, line in rest)


def _columns(path: Path, value: Any) -> Iterator[Any]:
    """The rows of an object of lists; any other object is a row."""
    if not isinstance(value, dict) or not value or not all(isinstance(cells, list) for cells in value.values()):
        yield value
        return
    if len({len(cells) for cells in value.values()}) != 1:
        raise RMTKDError(f"Cannot read {path}: its lists differ in length; expected one value a row in each.")
    yield from (dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True))


def _elements(path: Path, text: str, file: TextIO) -> Iterator[Any]:
    """The elements of a list.

    Args:
        text: its first bracket, already read from the file.
    """
    decoder, at, number = json.JSONDecoder(), len(text), 0
    while True:
        at = (COMMA if number else BLANK).match(text, at).end()
        if text.startswith("]", at):
            if text[at + 1 :].strip() or file.read(CHUNK).strip():
                raise RMTKDError(f"Cannot read {path}: something follows the end of its list.")
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:  # the element may go on behind what was read
            more = file.read(max(CHUNK, len(text) - at))
            if not more:
                raise RMTKDError(f"Cannot read {path}: row {number + 1} is no JSON ({error.msg}).") from error
            text, at = text[at:] + more, 0
            continue
        number += 1
        yield value
