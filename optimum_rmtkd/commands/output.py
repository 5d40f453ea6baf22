"""Output folders that appear whole or not at all and replace nobody's files but our own, and the tables that the
commands print."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..disks import full_disk_named
from ..errors import RMTKDError
from ..files import check_replaceable, check_writable
from ..folders import RECORD, listed, new_folder, put, recover, survey, write_record


__all__ = ["OVERWRITE", "check_place", "check_target", "comparison", "format_table", "weight_bytes", "writing_beside"]

OVERWRITE = "Replace, file by file, what an earlier run wrote into the folder; all other files in it stay."
Inputs = Sequence[tuple[str, "str | Path | None"]]
"""(what it is, path) of what a command reads, or keeps beside its output; None and names of the Hub do not count."""


def check_target(path: str | Path) -> None:
    """Refuse a file that cannot be written to, or is somebody else's, before the work that it is meant for.

    Raises:
        RMTKDError: `path` is a folder or a file that we did not write, or its own folder is missing or cannot be
            written to.
    """
    path = Path(os.path.realpath(path))
    check_replaceable(path)
    if not path.parent.is_dir():
        raise RMTKDError(f"Cannot write {path}: its folder does not exist.")
    check_writable(path.parent)


def check_place(target: str | Path, inputs: Inputs = (), role: str = "output") -> Path:
    """The folder that `target` names, links followed.

    Args:
        role: what is to be written there, for the message.

    Raises:
        RMTKDError: it is or contains the working directory, the home folder or the root; or it is, contains or lies in
            one of the `inputs`; or it is a file; or begins with a ~ that no shell has replaced.
    """
    if str(target).startswith("~"):
        raise RMTKDError(
            f"{target} begins with ~, which no shell has replaced, and a folder of that name invites an 'rm -r ~'. "
            "Write the path out, or ./~ if it is meant so."
        )
    place = _resolved(target)
    for what, path in (("the working directory", Path.cwd()), ("the home folder", _home())):
        if path is not None and _contains(place, path):
            raise RMTKDError(f"{target} is or contains {what}, {path}: choose a folder of its own for the {role}.")
    for what, path in inputs:
        if path is None or not (os.path.lexists(path) or what == "--checkpoints"):
            continue
        other = _resolved(path)
        if _contains(place, other) or (not other.is_file() and _contains(other, place)):
            raise RMTKDError(
                f"The {role} {target} is, contains or lies in {what} {path}: choose a folder apart from what is read "
                "and kept."
            )
    if place.exists() and not place.is_dir():
        raise RMTKDError(f"{target} exists and is not a folder: choose another folder for the {role}.")
    return place


def _resolved(path: str | Path) -> Path:
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError) as error:
        raise RMTKDError(f"{path} leads nowhere ({error}): expected a path of links that end.") from error


def _home() -> Path | None:
    try:
        return Path.home().resolve()
    except RuntimeError:
        return None


def _contains(outer: Path, inner: Path) -> bool:
    """Whether `inner` is `outer` or lies below it, whatever the case of letters and the mounts call them."""
    return any(_is_same(outer, place) for place in (inner, *inner.parents))


def _is_same(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and one.samefile(other))


@contextmanager
def writing_beside(target: str | Path, overwrite: bool = False, inputs: Inputs = ()) -> Iterator[Path]:
    """Yield an empty folder beside `target`; if the block succeeds it gets a record of its files and becomes `target`,
    else it is deleted.

    With `overwrite`, a `target` that carries a record of ours is replaced file by file of that record; what is not in
    it stays and is named. The folder is created on entry, so a parent that cannot be written to is refused before any
    work is done.

    Args:
        inputs: what `target` must be apart from, see `check_place`.

    Raises:
        RMTKDError: `target` holds something and `overwrite` is not set; or it holds something and has no record, or
            files of it were changed; or `check_place` refuses it, or its parent cannot be written to. If that turns
            out only in the end, the new folder is kept, and the message says where.
    """
    place = check_place(target, inputs)
    recover(place)
    _check_free(place, overwrite)
    check_writable(place.parent)
    place.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(place.parent, place.name) as beside, full_disk_named(place.parent, f"The output {target}"):
        yield beside
        _open_up(beside)
        write_record(beside)
        _settle(beside, place, overwrite)


def _check_free(place: Path, overwrite: bool) -> None:
    """Refuse a folder that is not ours to replace, or cannot be replaced; say what would be replaced."""
    if place.is_mount():
        raise RMTKDError(f"{place} is a mount point, which nothing can be renamed to: choose a folder in it.")
    if not place.is_dir() or not any(place.iterdir()):
        return
    if not overwrite:
        raise RMTKDError(f"{place} exists and is not empty: choose another output folder, or pass --overwrite.")
    found = survey(place)
    if found is None:
        names = [path.name for path in place.iterdir()]
        raise RMTKDError(
            f"{place} holds {listed(names)}, and no {RECORD} that says what an earlier run wrote: it is not replaced. "
            "Choose another output folder, or move it away."
        )
    if found.changed:
        raise RMTKDError(
            f"{listed(found.changed)} in {place} changed since an earlier run wrote it: nothing is replaced. Choose "
            "another output folder, or move it away."
        )
    check_writable(place)
    kept = f"; {listed(found.foreign)} stays, which no run wrote" if found.foreign else ""
    print(f"--overwrite: {len(found.own)} files that an earlier run wrote into {place} will be replaced{kept}")


def _settle(beside: Path, place: Path, overwrite: bool) -> None:
    """Make `beside` what lies at `place`, or keep it under a name that is free."""
    try:
        if place.is_dir() and any(place.iterdir()):
            if not overwrite:
                raise RMTKDError(f"{place} is not empty any more.")
            put(beside, place)
        else:
            beside.rename(place)
    except (OSError, RMTKDError) as error:
        kept = next(
            path for i in range(1, 1000) if not os.path.lexists(path := place.with_name(f"{place.name}.new{i}"))
        )
        beside.rename(kept)
        raise RMTKDError(f"{error} What was made is kept in {kept}.") from error


def _open_up(folder: Path) -> None:
    """As open as any other new folder: mkdtemp makes folders that only their owner may enter, safetensors files that
    only their owner may read."""
    umask_probe = folder / ".mode"
    umask_probe.mkdir()
    mode = umask_probe.stat().st_mode
    folder.chmod(mode)
    umask_probe.rmdir()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | mode & 0o666)


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
