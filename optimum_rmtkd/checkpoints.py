"""Folders of checkpoints: whether one is whole, the newest whole one, and what it takes to make one appear whole.

A checkpoint is written in `.NAME.partial/NAME` beside its place, and renamed into it when all is there. Its manifest
is written last and holds the size of each file.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import IncompleteCheckpointError, RMTKDError
from .files import write_text
from .folders import files_of, recorded
from .leftovers import KEPT, remove
from .locks import held, hold, let_go, take_if_abandoned
from .wholeness import LAST, MANIFEST, STATE, TENSORS, fault_of, is_checkpoint, manifest_of, step_of


__all__ = [
    "LAST",
    "MANIFEST",
    "STATE",
    "TENSORS",
    "Found",
    "begin",
    "check_whole",
    "checkpoints_in",
    "checkpoints_of_loop",
    "discard",
    "fault_of",
    "first_whole",
    "newest_checkpoint",
    "newest_whole",
    "pending_place",
    "put_in_place",
    "settle",
    "step_of",
    "tell_passed",
    "tidy",
]

logger = logging.getLogger(__name__)

SETTLES = 5.0  # seconds that two renames take at the very most
_PENDING = re.compile(r"\.(.+)\.partial")
_ASIDE = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.old")


# -- the newest -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What lies in a folder of checkpoints.

    Attributes:
        newest: whole one; None without any.
        passed: newer ones that are not whole, with the reason, newest first.
    """

    newest: Path | None
    passed: tuple[tuple[Path, str], ...]


def newest_whole(folder: str | Path, like: str = "checkpoint-0") -> Found:
    """The newest checkpoint that a run can be continued from.

    Args:
        like: a name of the same kind; what is before its number, the others have, too.
    """
    return first_whole(reversed(checkpoints_in(folder, re.split(r"\d+$", like)[0])))


def first_whole(paths: Iterable[Path], fault_in: Callable[[Path], str | None] = fault_of) -> Found:
    """The first of several checkpoints that a run can be continued from.

    Args:
        paths: newest first.
        fault_in: as `fault_of`.
    """
    passed = []
    for path in paths:
        fault = fault_in(path)
        if fault is None:
            return Found(path, tuple(passed))
        passed.append((path, fault))
    return Found(None, tuple(passed))


def tell_passed(found: Found) -> None:
    """A line for each newer checkpoint that is not whole. It stays: another trainer's, or an earlier version's, may be
    of use to somebody."""
    for path, fault in found.passed:
        instead = "" if found.newest is None else f"; the run continues from {found.newest.name}"
        instead += "; it stays until one of its name is written, or you delete it"
        logger.warning("%s is passed over (%s)%s.", path, fault, instead)


def check_whole(folder: str | Path) -> None:
    """Refuse a checkpoint that no run can be continued from.

    Raises:
        IncompleteCheckpointError: what is missing, and which intact one lies beside it.
    """
    folder = Path(folder)
    if (fault := fault_of(folder)) is None:
        return
    found = newest_whole(folder.parent, like=folder.name).newest if folder.parent.is_dir() else None
    way_out = (
        f"Resume from {found}, the newest intact one beside it."
        if found is not None
        else "No intact one lies beside it: resume from a checkpoint of an RMTKDTrainer or RMTKDLoop, with "
        "save_only_model=False, or start a new run."
    )
    raise IncompleteCheckpointError(f"{folder} cannot be continued from: {fault}. {way_out}")


def newest_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint of an `RMTKDLoop` or a trainer among the folders in `folder`, for
    `accelerator.load_state`: the one of the highest step. None where there is none. A line says which newer ones were
    passed over, and why.

    Which step one is of stands in its manifest; that of a checkpoint of an earlier version is the number in its name.
    One that a run was killed while it replaced gets its name back first.
    """
    settle(folder)
    found = first_whole(checkpoints_of_loop(folder))
    tell_passed(found)
    return None if found.newest is None else str(found.newest)


def checkpoints_of_loop(folder: str | Path) -> list[Path]:
    """Folders whose manifest or state says that they are checkpoints, newest first; also what lies aside and cannot be
    put back, where the file system knows no locks."""
    places = [path for path in (*_folders(folder), *_nameless(Path(folder))) if is_checkpoint(path)]
    return sorted(places, key=lambda path: (step_of(path), path.stat().st_mtime), reverse=True)


def checkpoints_in(folder: str | Path, kind: str = "checkpoint-") -> list[Path]:
    """Folders `kind`N, by N."""
    named = re.compile(re.escape(kind) + r"(\d+)")
    found = [(int(match[1]), path) for path in _folders(folder) if (match := named.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _folders(folder: str | Path) -> list[Path]:
    place = Path(folder)
    return [p for p in place.iterdir() if p.is_dir() and not p.name.startswith(".")] if place.is_dir() else []


# -- made whole -------------------------------------------------------------------------------------------------------


def pending_place(target: Path) -> Path:
    """Where the checkpoint `target` is written: the same on all processes."""
    return target.parent / f".{target.name}.partial" / target.name


def begin(target: Path) -> int | None:
    """Make the empty folder in which `target` will be written; its lock.

    Raises:
        RMTKDError: another run is writing it.
    """
    place = pending_place(target).parent
    place.parent.mkdir(parents=True, exist_ok=True)
    while True:
        place.mkdir(exist_ok=True)
        try:
            lock = hold(place)
            break
        except FileNotFoundError:
            continue
        except BlockingIOError as error:
            raise RMTKDError(
                f"{place} is being written by another run: two runs write their checkpoints into {place.parent}. Give "
                "each a folder of its own."
            ) from error
    for left in place.iterdir():
        remove(left)
    pending_place(target).mkdir()
    return lock


def put_in_place(target: Path, step: int, sealed: Callable[[Path], None] | None = None) -> None:
    """All is written: the manifest, and the name. What was called so before is replaced, but for files that no
    checkpoint has, which stay.

    Args:
        sealed: called on the folder when its manifest is there, before it gets its name.
    """
    pending = pending_place(target)
    sizes = {name: (pending / name).stat().st_size for name in files_of(pending) if name != MANIFEST}
    _to_disk(pending)
    text = json.dumps({"version": 1, "step": step, "files": dict(sorted(sizes.items()))}, indent=1)
    write_text(pending / MANIFEST, text + "\n")
    _sync(pending / MANIFEST)
    if sealed is not None:
        sealed(pending)
    _sync(pending)
    if target.is_dir():
        _replace(pending, target)
    else:
        pending.rename(target)
    _sync(target.parent)
    pending.parent.rmdir()


def _replace(pending: Path, target: Path) -> None:
    old = Path(tempfile.mkdtemp(prefix=f".{target.name[:KEPT]}.", suffix=".old", dir=target.parent))
    with held(old):
        target.rename(old / target.name)
        pending.rename(target)
        _keep_foreign(old / target.name, target)
        shutil.rmtree(old)


def discard(path: Path) -> None:
    """Remove a checkpoint; a kill leaves no half of it under its name."""
    place = pending_place(path)
    if place.parent.exists():
        remove(place.parent)
    place.parent.mkdir(exist_ok=True)
    path.rename(place)
    shutil.rmtree(place.parent, ignore_errors=True)


def tidy(folder: str | Path) -> None:
    """Remove what runs that were killed left in a folder of checkpoints, with a line for each; what they were killed
    while they replaced gets its name: the new one if it is whole, else the old one."""
    folder = Path(folder)
    if not folder.is_dir():
        return
    for entry in sorted(folder.glob(".*")):
        match = _PENDING.fullmatch(entry.name)
        inside = _names_in(entry) if match else None
        if inside is None or inside not in ([], [match[1]]):
            continue  # none of ours
        if (lock := take_if_abandoned(entry)) is not None:
            if not _finish(entry / match[1], folder / match[1]):
                remove(entry)
            let_go(lock)
    for aside, name in _moved_aside(folder):
        if (lock := take_if_abandoned(aside)) is not None:
            _put_back(aside, folder / name)
            let_go(lock)


def settle(folder: str | Path) -> None:
    """`tidy`, by whichever process comes first; the others wait until a checkpoint has its name that has none between
    two renames."""
    tidy(folder)
    end = time.monotonic() + SETTLES
    while _nameless(Path(folder)) and time.monotonic() < end:
        time.sleep(0.05)


def _nameless(folder: Path) -> list[Path]:
    """Checkpoints that were moved aside, and of which no other one has the name yet."""
    moved = [(aside / name, folder / name) for aside, name in _moved_aside(folder)]
    return [old for old, target in moved if is_checkpoint(old) and not target.exists()]


def _moved_aside(folder: Path) -> list[tuple[Path, str]]:
    """What `_replace` made and has not removed, with the name of the checkpoint; told by what is in it."""
    found = []
    for aside in sorted(folder.glob(".*.old")):
        match = _ASIDE.fullmatch(aside.name)
        inside = _names_in(aside) if match else None
        if inside is None or len(inside) > 1:
            continue
        name = inside[0] if inside else match[1]
        ours = is_checkpoint(folder / name) or is_checkpoint(aside / name)
        if name[:KEPT] == match[1] and ours:
            found.append((aside, name))
    return found


def _names_in(folder: Path) -> list[str] | None:
    """None where it is no folder, or has gone meanwhile: another machine tidies as well."""
    try:
        return None if folder.is_symlink() else [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return None


def _finish(pending: Path, target: Path) -> bool:
    """The second rename of `_replace`, where a run was killed before it. Nothing else in a place of writing gets a
    name: it may be a checkpoint that was being discarded."""
    replaced = [old for old in _nameless(target.parent) if old.name == target.name]
    if not replaced or not (pending / MANIFEST).is_file() or fault_of(pending) is not None:
        return False
    pending.rename(target)
    _sync(target.parent)
    pending.parent.rmdir()
    logger.warning("%s is in its place: a run was killed while it replaced the one before.", target)
    return True


def _put_back(aside: Path, target: Path) -> None:
    kept = aside / target.name
    if kept.is_dir() and not target.exists():
        kept.rename(target)
        aside.rmdir()
        logger.warning("%s is back in its place: a run was killed while it replaced it.", target)
        return
    if kept.is_dir():
        _keep_foreign(kept, target)
    remove(aside)


def _keep_foreign(old: Path, new: Path) -> None:
    """Carry over what is in the way of nothing, and no checkpoint of ours has."""
    known = manifest_of(old)
    ours = set(known if isinstance(known, dict) else ()) | set(recorded(old))
    for name in files_of(old):
        if name not in ours and not Path(name).name.startswith(("rmtkd_", "rng_state")) and not (new / name).exists():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (old / name).rename(new / name)


def _to_disk(folder: Path) -> None:
    """A rename may reach the disk before what it names does."""
    for place, _, names in os.walk(folder):
        for name in names:
            _sync(Path(place) / name)
        _sync(Path(place))


def _sync(path: Path) -> None:
    try:
        opened = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder, on Windows
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if path.is_dir():  # some file systems do not sync folders
            logger.debug("%s is not synced (%s).", path, error)
        else:
            raise
    finally:
        os.close(opened)
