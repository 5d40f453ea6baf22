"""Texts of local files, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import RMTKDError
from .tables import KINDS, check_contents, read_table


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
        if path.suffix.lower() not in (PLAIN, *KINDS):
            raise RMTKDError(
                f"{file}: unknown kind of file '{path.suffix}'; expected one of {PLAIN} (a text a line), "
                f"{', '.join(KINDS)}."
            )
        check_contents(path)


def texts_of(files: Sequence[str], columns: Sequence[str] | None = None) -> Iterator[str]:
    """Every text of the files: the lines of a .txt, the cells of the text columns of a table; what is empty passes by.

    Args:
        columns: of the tables; None for all that hold strings.

    Raises:
        RMTKDError: a file that cannot be read, or has no such column, when it is its turn.
    """
    for file in files:
        path = Path(file)
        yield from _lines(path) if path.suffix.lower() == PLAIN else _cells(path, columns)


def text_columns(files: Sequence[str], columns: Sequence[str] | None) -> None:
    """Check the columns of all tables before any text is read.

    Raises:
        RMTKDError: as `texts_of`.
    """
    for file in files:
        if Path(file).suffix.lower() != PLAIN:
            _columns(Path(file), columns)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline=None) as lines:
            for line in lines:
                if text := line.rstrip("\n"):
                    yield text
    except (OSError, UnicodeDecodeError) as error:
        raise RMTKDError(f"Cannot read {path}: {error}. Expected UTF-8 text, one a line.") from error


def _columns(path: Path, columns: Sequence[str] | None):
    """(rows, names of their text columns)"""
    rows = read_table(path, columns or ())
    if missing := [name for name in columns or () if name not in rows.column_names]:
        raise RMTKDError(f"{path} has no column '{missing[0]}'; it has {', '.join(rows.column_names)}.")
    strings = [n for n, f in rows.features.items() if getattr(f, "dtype", None) in ("string", "large_string")]
    names = list(columns) if columns else strings
    if not names or (wrong := [name for name in names if name not in strings]):
        found = f"column '{wrong[0]}' holds no texts" if names else "no column holds texts"
        raise RMTKDError(
            f"{path}: {found}; its columns are {', '.join(rows.column_names)}. Name those that do with --text-column."
        )
    return rows, names


def _cells(path: Path, columns: Sequence[str] | None) -> Iterator[str]:
    rows, names = _columns(path, columns)
    for row in rows.select_columns(names):
        yield from (text for text in row.values() if text)
