"""Texts of local files, one after the other; no file is held in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RMTKDError
from .streams import NAMED, PACKED, TEXT, columns_of, contents_of, opened, rows_of, suffix_of
from .tables import KINDS, check_contents, readable


__all__ = ["check_texts", "text_columns", "texts_of"]

PLAIN = ".txt"


def check_texts(files: Sequence[str]) -> None:
    """Tell a missing or unreadable file in the first moment.

    Raises:
        RMTKDError: a path that does not exist, is empty, or is of a kind that cannot be read.
    """
    for file in files:
        path = Path(file)
        if not path.is_file():
            raise RMTKDError(f"{file}: no such file; expected texts in {PLAIN}, {', '.join(KINDS)}.")
        packed = path.suffix.lower() in PACKED
        kinds = [PLAIN, *KINDS] if not packed else [PLAIN, *(kind for kind in KINDS if kind != ".parquet")]
        if suffix_of(path) not in kinds:
            raise RMTKDError(
                f"{file}: unknown kind of file '{suffix_of(path)}'; expected one of {', '.join(kinds)} ({PLAIN}: a "
                f"text a line){', packed' if packed else ', also packed as .gz, .bz2 or .xz'}."
            )
        contents_of(path) if packed else check_contents(path)


def texts_of(files: Sequence[str], columns: Mapping[str, Sequence[str]], blank_lines: bool = False) -> Iterator[Any]:
    """Every text of the files: the lines of a .txt, the cells of the text columns of a table, which may be nested
    (messages); what is empty passes by.

    Args:
        columns: as `text_columns` found them.
        blank_lines: those of a .txt count, too.

    Raises:
        RMTKDError: a file that cannot be read any more, when it is its turn.
    """
    for file in files:
        path = Path(file)
        yield from _lines(path, blank_lines) if suffix_of(path) == PLAIN else _cells(path, columns[file])


def text_columns(files: Sequence[str], columns: Sequence[str] | None = None) -> dict[str, list[str]]:
    """{table: its columns of texts}. Each is read to its end, so that what is wrong with it is said before any text is
    used.

    Args:
        columns: None for all that hold strings; those that are named may hold strings in nested values, or numbers in
            a csv.

    Raises:
        RMTKDError: a file that cannot be read, or has no such column.
    """
    return {file: _columns(Path(file), columns) for file in dict.fromkeys(files) if suffix_of(Path(file)) != PLAIN}


def _lines(path: Path, blank: bool) -> Iterator[str]:
    with readable(path), opened(path) as lines:
        yield from (text for line in lines if (text := line.rstrip("\n")) or blank)


def _columns(path: Path, wanted: Sequence[str] | None) -> list[str]:
    kinds = columns_of(path)
    if missing := [name for name in wanted or () if name not in kinds]:
        raise RMTKDError(f"{path} has no column '{missing[0]}'; it has {', '.join(kinds)}.")
    names = list(wanted) if wanted else [name for name, kind in kinds.items() if kind == TEXT]
    wrong = [name for name in names if kinds[name] < NAMED]
    if wrong or not names:
        found = f"column '{wrong[0]}' holds no texts" if wrong else "no column holds texts"
        raise RMTKDError(
            f"{path}: {found}; its columns are {', '.join(kinds)}. Name those that do with --text-column."
        )
    return names


def _cells(path: Path, names: Sequence[str]) -> Iterator[Any]:
    for row in rows_of(path, names):
        yield from (value for name in names if isinstance(value := row.get(name), (str, dict, list)) and value)
