"""Output folders that appear whole or not at all, and the tables the commands print."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import RMTKDError


__all__ = ["check_target", "comparison", "format_table", "weight_bytes", "writing_beside"]


def check_target(path: str | Path) -> None:
    """Refuse a file that cannot be written to, before the work that it is meant for.

    Raises:
        RMTKDError: `path` is a folder, or its own folder is missing or cannot be written to.
    """
    path = Path(path).absolute()
    if path.is_dir():
        raise RMTKDError(f"Cannot write {path}: it is a folder; expected the name of a file.")
    if not path.parent.is_dir():
        raise RMTKDError(f"Cannot write {path}: its folder does not exist.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise RMTKDError(f"Cannot write {path}: its folder cannot be written to.")


@contextmanager
def writing_beside(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`; rename it to `target` if the block succeeds, delete it otherwise.

    The folder is created on entry, so a parent that cannot be written to is refused before any work is done.

    Raises:
        RMTKDError: `target` holds something and `overwrite` is not set, is no folder, or its parent cannot be written
            to.
    """
    target = Path(target).absolute()
    _check_free(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise RMTKDError(
            f"Cannot write to {target.parent} ({error.strerror}): choose an output folder whose parent can be written "
            "to."
        ) from error
    try:
        yield beside
        _check_free(target, overwrite)
        _swap(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _check_free(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise RMTKDError(f"{target} exists and is not a folder: choose another output folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise RMTKDError(f"{target} exists and is not empty: choose another output folder, or pass --overwrite.")


def _swap(beside: Path, target: Path) -> None:
    # mkdtemp makes folders that only their owner may enter, safetensors files that only their owner may read; a model
    # should be as open as any other new folder.
    umask_probe = beside / ".mode"
    umask_probe.mkdir()
    mode = umask_probe.stat().st_mode
    beside.chmod(mode)
    umask_probe.rmdir()
    for path in beside.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | mode & 0o666)
    if not target.exists():
        beside.rename(target)
        return
    # rename() cannot replace a folder that holds something: the old one steps aside first and goes last.
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent)) / "content"
    target.rename(old)
    beside.rename(target)
    shutil.rmtree(old.parent)


def weight_bytes(folder: str | Path) -> int:
    """Bytes of the weight files in `folder`: its safetensors files, else its .bin files."""
    for pattern in ("*.safetensors", "*.bin"):
        sizes = [path.stat().st_size for path in Path(folder).glob(pattern)]
        if sizes:
            return sum(sizes)
    return 0


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text: first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:])]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def comparison(
    parameters: tuple[int, int], size: tuple[int, int], metric: str, values: tuple[float | None, float | None]
) -> list[tuple[str, str, str, str]]:
    """Rows (what, before, after, change) of a reduction; a metric that was not measured gives no row.

    Args:
        parameters: number of parameters before and after.
        size: bytes of the weight files before and after; 0 where unknown.
        metric: "accuracy" (values in [0, 1], shown in percent) or the name of a correlation.
        values: the metric before and after.
    """
    rows = [("parameters", f"{parameters[0]:,}", f"{parameters[1]:,}", _relative(*parameters))]
    rows.append(("bytes on disk", f"{size[0]:,}", f"{size[1]:,}", _relative(*size)))
    before, after = values
    if before is not None and after is not None:
        if metric == "accuracy":
            change = f"{100 * (after - before):+.2f} points"
            rows.append((metric, f"{100 * before:.2f} %", f"{100 * after:.2f} %", change))
        else:
            rows.append((metric, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"))
    return rows


def _relative(before: int, after: int) -> str:
    return f"{100 * (after / before - 1):+.1f} %" if before else "-"
