"""Rows of local files: what a cell holds is what the file says.

Words such as NA, None, null or nan are words; only an empty cell of a csv, and a null of a json, is missing.
"""

from __future__ import annotations

import contextlib
import csv
import json
import lzma
import math
import re
import struct
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import RMTKDError


if TYPE_CHECKING:
    from datasets import Dataset


__all__ = [
    "KINDS",
    "MISSING",
    "NUMBER",
    "SEPARATORS",
    "UNREADABLE",
    "check_contents",
    "check_utf8",
    "csv_rows",
    "json_line",
    "read_dataset",
    "read_table",
    "readable",
]

KINDS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
ARCHIVES = {
    b"PK\x03\x04": "zip archive (or spreadsheet)",
    b"\x1f\x8b": "gzip file",
    b"BZh": "bzip2 file",
    b"\xfd7zXZ": "xz file",
    b"7z\xbc\xaf": "7z archive",
    b"\x28\xb5\x2f\xfd": "zstd file",
    b"PAR1": "parquet file",
    b"%PDF": "PDF",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
WHOLE = re.compile(r"[+-]?(0|[1-9]\d{0,17})")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
MISSING = {"", "na", "n/a", "nan", "null", "none", "-", "?"}  # beside numbers these are no numbers either
QUOTED = re.compile(r'"([^"]|"")*"')  # a cell of a table
FIELD_LIMIT = 2**31 - 1  # characters of a cell; csv's own limit is 131,072
# what parsers and decoders raise where the bytes are not what they expect
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, RuntimeError, ArithmeticError)
UNREADABLE += (EOFError, MemoryError, struct.error, zlib.error)
MANY_CELLS, FEWEST_FILLED = 10**7, 0.01
DEEPEST = 32  # levels of a nested value: no table has more


def check_contents(path: Path) -> None:
    """Refuse, by the first bytes of a file, what its name promises wrongly.

    Raises:
        RMTKDError: it is empty, unreadable, an archive, or a parquet file that is none.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise RMTKDError(f"Cannot read {path}: {error.strerror}.") from error
    if not head:
        raise RMTKDError(f"{path} is empty.")
    if path.suffix.lower() == ".parquet":
        if not head.startswith(b"PAR1"):
            raise RMTKDError(f"Cannot read {path}: its name says parquet, its first bytes do not.")
        return
    kind = next((kind for magic, kind in ARCHIVES.items() if head.startswith(magic)), None)
    if kind is None and b"\0" in head:
        kind = "binary file"
    if kind is not None:
        raise RMTKDError(
            f"Cannot read {path}: it is a {kind}; expected UTF-8 text ({path.suffix}). Unpack or export it first."
        )


def read_table(path: Path, texts: Collection[str] = (), label: Collection[str] = ()) -> Dataset:
    """Rows of a csv, tsv, json, jsonl or parquet file.

    Columns of a csv or tsv that hold nothing but numbers become int64 or float64, those of `texts` excepted; the
    columns of `label` only if every cell is a number, the others may have gaps (null, or words such as NA).

    Args:
        texts: columns that are text, whatever they look like.
        label: names that the column of labels may have.

    Raises:
        RMTKDError: the file cannot be read; the message names it, and the line where that is known.
    """
    from datasets import Dataset

    suffix = path.suffix.lower()
    if suffix == ".parquet":
        _check_parquet(path)
        return read_dataset(str(path), "parquet", data_files=str(path), split="train")
    with readable(path):
        if suffix in SEPARATORS:
            cells = _csv_columns(path, SEPARATORS[suffix])
            columns = {name: _typed(values, name in texts, name in label) for name, values in cells.items()}
        else:
            columns = _json_columns(path)
            for name, values in columns.items():
                if _deeper(values, DEEPEST):
                    raise RMTKDError(
                        f"Cannot read {path}: column '{name}' is nested too deeply (more than {DEEPEST} levels); "
                        "expected one object a row."
                    )
        return Dataset.from_dict({name: _array(name, values) for name, values in columns.items()})


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """What goes wrong inside is said of the file.

    Raises:
        RMTKDError: in place of what parsers and decoders raise.
    """
    import pyarrow as pa

    try:
        yield
    except RecursionError as error:
        raise RMTKDError(
            f"Cannot read {path}: its values are nested too deeply; expected one object a row."
        ) from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise RMTKDError(f"Cannot read {path}: it is no UTF-8 text (byte {byte:#04x}). Save it as UTF-8.") from error
    except (*UNREADABLE, csv.Error, lzma.LZMAError, pa.ArrowException) as error:
        if isinstance(error, RMTKDError):
            raise
        raise RMTKDError(f"Cannot read {path}: {type(error).__name__}: {error}") from error


def check_utf8(rows: Dataset, column: str) -> None:
    """Refuse texts that are none: a parquet file holds bytes, and nobody looks at them before they are used.

    Raises:
        RMTKDError: names the column and the first such row.
    """
    import pyarrow as pa

    start = 0
    for batch in rows.select_columns([column]).with_format("arrow").iter(1000):
        cells = batch[column]
        try:
            cells.validate(full=True)
        except pa.ArrowInvalid as error:
            row = start + 1 + next((i for i, cell in enumerate(cells) if not _is_text(cell)), 0)
            raise RMTKDError(
                f"Column '{column}' holds bytes in row {row} that are no UTF-8 text. Write the file anew, with texts "
                "in UTF-8."
            ) from error
        start += len(cells)


def _is_text(cell: Any) -> bool:
    try:
        cell.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _array(name: str, values: list):
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        kinds = sorted({type(value).__name__ for value in values if value is not None})
        raise ValueError(f"column '{name}' mixes {', '.join(kinds)} ({error})") from error


def _check_parquet(path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        rows = parquet.read_metadata(path).num_rows
    except (OSError, pa.ArrowException) as error:
        raise RMTKDError(f"Cannot read {path}: {type(error).__name__}: {error}") from error
    if not rows:
        raise RMTKDError(f"Cannot read {path}: it holds no rows")


def read_dataset(what: str, *args: Any, **kwargs: Any):
    """`datasets.load_dataset` with its many ways to fail turned into one."""
    import pyarrow as pa
    from datasets import load_dataset, load_dataset_builder
    from datasets.exceptions import DatasetsError
    from datasets.packaged_modules.csv.csv import CsvConfig

    try:
        if isinstance(
            load_dataset_builder(*args, **{k: v for k, v in kwargs.items() if k != "split"}).config, CsvConfig
        ):
            kwargs |= {"keep_default_na": False, "na_values": [""]}  # only an empty cell is missing
        return load_dataset(*args, **kwargs)
    except (*UNREADABLE, DatasetsError, pa.ArrowException) as error:
        # The useful sentence is the innermost one: datasets wraps the parser's error twice.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        told = "it holds no rows" if "corresponds to no data" in str(cause) else f"{type(cause).__name__}: {cause}"
        raise RMTKDError(f"Cannot read {what}: {told}") from error


# -- csv --------------------------------------------------------------------------------------------------------------


def _csv_columns(path: Path, separator: str) -> dict[str, list[str | None]]:
    """Cells by column, in the order of the header; an empty cell is None."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv_rows(path, separator, file)
        header = next(rows)
        columns: list[list[str | None]] = [[] for _ in header]
        for row in rows:
            for column, cell in zip(columns, row, strict=True):
                column.append(cell or None)
    if not columns[0]:
        raise RMTKDError(f"Cannot read {path}: it holds no rows")
    return dict(zip(header, columns, strict=True))


def csv_rows(path: Path, separator: str, file: TextIO) -> Iterator[list[str]]:
    """The header, and then each row that is not empty, with as many cells.

    Args:
        path: name of the file, for messages.
        file: the file, opened with newline="".

    Raises:
        RMTKDError: a row of another length, with a NUL byte, or not quoted as a table is.
    """
    csv.field_size_limit(FIELD_LIMIT)
    plain = separator == "\t" and _quotes_are_text(path, file)
    file.seek(0)
    # strict: a quote that closes in the middle of a cell has swallowed the rows before it
    reader = csv.reader(file, delimiter=separator, strict=True, **({"quoting": csv.QUOTE_NONE} if plain else {}))
    try:
        header = _header(next(_filled(reader), None), path)
        yield header
        for row in _filled(reader):
            if len(row) != len(header):
                raise RMTKDError(
                    f"Cannot read {path}: line {reader.line_num} ends a row of {len(row)} fields; the header has "
                    f"{len(header)} ({', '.join(header[:5])}). Quote texts with separators or line breaks in them."
                )
            if any("\0" in cell for cell in row):  # blocks that a full disk or a broken copy left
                raise RMTKDError(f"Cannot read {path}: line {reader.line_num} holds a NUL byte; expected text.")
            yield row
    except csv.Error as error:
        raise RMTKDError(
            f"Cannot read {path}: the cell that ends in line {reader.line_num} is not quoted as a table has it "
            f"({error}). Quote texts with quotes in them, and double those."
        ) from error


def _quotes_are_text(path: Path, file: TextIO) -> bool:
    """Whether a tsv is written without quoting, as those of GLUE are: every line is a row by itself, and some cell has
    a quote at one end alone.

    Raises:
        RMTKDError: it can be read with quoting as well, with other rows.
    """
    counts, loose = set(), False
    for row in _filled(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)):
        counts.add(len(row))
        loose = loose or any(cell.startswith('"') and not QUOTED.fullmatch(cell) for cell in row)
    if not loose or len(counts) != 1:
        return False
    file.seek(0)
    try:
        quoted = {len(row) for row in _filled(csv.reader(file, delimiter="\t", strict=True))}
    except csv.Error:
        return True
    if quoted == counts:
        raise RMTKDError(
            f"Cannot read {path}: its quotes may be text, or hold cells of several lines together; both readings "
            "fit. Quote every text and double the quotes in it, or save it as jsonl."
        )
    return True


def _filled(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    return (row for row in reader if row)


def _header(row: list[str] | None, path: Path) -> list[str]:
    if row is None:
        raise RMTKDError(f"{path} is empty: expected a line of column names.")
    names = [name.strip() or f"column {i + 1}" for i, name in enumerate(row)]  # pandas leaves its index unnamed
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise RMTKDError(f"{path} has more than one column '{twice[0]}': rename one of them.")
    return names


def _typed(cells: list[str | None], text: bool, label: bool) -> list:
    """The cells as numbers where they are meant so."""
    if text or all(cell is None for cell in cells):
        return cells
    gaps = [cell is None or (not label and cell.strip().casefold() in MISSING) for cell in cells]
    kept = [cell.strip() for cell, gap in zip(cells, gaps, strict=True) if not gap]
    if not kept:
        return cells
    kind = next((kind for kind, form in ((int, WHOLE), (float, NUMBER)) if all(map(form.fullmatch, kept))), None)
    # 007 is a name, not the number 7
    if kind is None or (kind is float and any(re.match(r"[+-]?0\d", cell) for cell in kept)):
        return cells
    values = [None if gap else kind(cell.strip()) for cell, gap in zip(cells, gaps, strict=True)]
    return cells if kind is float and any(v is not None and math.isinf(v) for v in values) else values


# -- json -------------------------------------------------------------------------------------------------------------


def _json_columns(path: Path) -> dict[str, list]:
    """Values by column: of a list of objects, of one object a line, or of one object of lists."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if "Extra data" not in error.msg:
            raise
        rows = [json_line(line, number, path) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if isinstance(rows, dict):
        if not rows or not all(isinstance(values, list) for values in rows.values()):
            rows = [rows]  # one line of json lines
        elif len({len(values) for values in rows.values()}) != 1:
            raise RMTKDError(f"Cannot read {path}: its lists differ in length; expected one value a row in each.")
        else:
            return rows
    if not isinstance(rows, list):
        raise RMTKDError(f"Cannot read {path}: it holds a {type(rows).__name__}; expected a list of objects.")
    wrong = next(((i, row) for i, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise RMTKDError(f"Cannot read {path}: row {wrong[0]} is a {type(wrong[1]).__name__}; expected an object.")
    if not rows:
        raise RMTKDError(f"Cannot read {path}: it holds no rows")
    names = dict.fromkeys(name for row in rows for name in row)
    cells, filled = len(names) * len(rows), sum(map(len, rows))
    if cells > MANY_CELLS and filled < FEWEST_FILLED * cells:  # a small file that would become a huge table
        raise RMTKDError(
            f"Cannot read {path}: its {len(rows)} rows have {len(names)} different keys, {filled / len(rows):.3g} in "
            "each; expected the same keys in every row."
        )
    return {name: [row.get(name) for row in rows] for name in names}


def _deeper(values: list | dict, levels: int) -> bool:
    """Whether lists and mappings lie in each other more than so many levels."""
    inside = values.values() if isinstance(values, dict) else values
    return levels < 0 or any(isinstance(value, (list, dict)) and _deeper(value, levels - 1) for value in inside)


def json_line(line: str, number: int, path: Path) -> Any:
    """
    Raises:
        RMTKDError: it is no JSON.
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise RMTKDError(f"Cannot read {path}: line {number} is no JSON ({error.msg}).") from error
