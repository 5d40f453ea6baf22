"""Folders that carry a record of the files written into them, so that a later run replaces those and no others.

The record, `rmtkd_files.json`, holds name and sha256 of each file. A file that is not in it is somebody else's; so
is one that was changed since, for whoever changed it wants it so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .errors import RMTKDError
from .files import read_text, write_text
from .leftovers import KEPT, abandoned, remove, remove_abandoned
from .locks import held, hold, let_go


__all__ = [
    "RECORD",
    "Contents",
    "add_to_record",
    "files_of",
    "listed",
    "new_folder",
    "put",
    "recorded",
    "recover",
    "remove_recorded",
    "survey",
    "write_record",
    "writing_into",
]

RECORD = "rmtkd_files.json"
MOVING = "rmtkd_moving.json"  # beside what is complete, and on its way into its place: the names of all of it
SHOWN = 5  # names in a message
SHARD = re.compile(r"(pytorch_)?model(-\d+-of-\d+\.(safetensors|bin)|\.(safetensors|bin)\.index\.json)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contents:
    """What lies in a folder: names relative to it, with slashes, in order.

    Attributes:
        own: in the record, and as they were written.
        changed: in the record, but changed since.
        foreign: not in the record; links to folders are files here.
        missing: in the record, but gone.
    """

    own: tuple[str, ...]
    changed: tuple[str, ...]
    foreign: tuple[str, ...]
    missing: tuple[str, ...] = ()


def files_of(folder: Path) -> list[str]:
    """Names of all files below `folder`, its record excepted; a link is a file, whatever it points to."""
    found = []
    for place, folders, files in os.walk(folder):
        here = Path(place)
        links = [name for name in folders if (here / name).is_symlink()]
        found += [(here / name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(name for name in found if name != RECORD)


def write_record(folder: Path) -> None:
    """Record all files below `folder`, which nobody else has written into."""
    _write(folder, _digests(folder, files_of(folder)))


def add_to_record(folder: Path, names: Iterable[str]) -> None:
    """Record that `names` were written just now; nothing where `folder` has no record."""
    known = _read(folder)
    if known is not None:
        _write(folder, known | _digests(folder, names))


def recorded(folder: Path) -> list[str]:
    """Names in the record; none where there is no record, or a damaged one."""
    try:
        return list(_read(folder) or ())
    except RMTKDError:
        return []


def survey(folder: Path) -> Contents | None:
    """What lies in `folder`; None where it has no record.

    Raises:
        RMTKDError: the record is damaged.
    """
    known = _read(folder)
    if known is None:
        return None
    there = files_of(folder)
    own = [name for name in there if name in known and _is_own(folder, name, known[name])]
    changed = [name for name in there if name in known and name not in own]
    foreign = (name for name in there if name not in known)
    return Contents(tuple(own), tuple(changed), tuple(foreign), tuple(sorted(set(known) - set(there))))


def put(beside: Path, target: Path) -> Contents:
    """Move the files of `beside`, a folder with a record, into `target` in the place of those of its own record.

    Nothing is deleted before everything is in place: our old files step aside, the new ones follow, and a failure puts
    both back. Whenever it is killed, the old files lie in `target` or in `.NAME.*.old` beside it, the new ones in
    `beside` or in `target`, and the record is that of the files in `target`.

    Returns:
        What was there; `own` has been replaced.

    Raises:
        RMTKDError: a new file would take the place of somebody else's, or the record is missing or damaged.
        OSError: a file cannot be moved.
    """
    was = survey(target)
    if was is None:
        raise RMTKDError(f"{target} holds no {RECORD}.")
    new = files_of(beside)
    if taken := [name for name in new if _in_the_way(target, name, was.own)]:
        raise RMTKDError(f"{listed(taken)} in {target} would be replaced, which no earlier run wrote or left so.")
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name[:KEPT]}.", suffix=".old", dir=target.parent))
    with held(aside):
        _put(beside, target, aside, was, new)
    return was


def _put(beside: Path, target: Path, aside: Path, was: Contents, new: list[str]) -> None:
    moved: list[tuple[Path, Path]] = []
    try:
        for name in (*was.own, RECORD):
            _move(target, aside, name, moved)
        _remove_empty(target, was.own)
        # config.json comes last: without it the folder is no model yet, so no reader meets half of one
        for name in (RECORD, *sorted(new, key=lambda name: (name == "config.json", name))):
            _move(beside, target, name, moved)
    except BaseException:
        for source, place in reversed(moved):
            source.parent.mkdir(parents=True, exist_ok=True)
            place.rename(source)
        _remove_empty(target, new)
        _remove_empty(aside, was.own)
        aside.rmdir()
        raise
    for name in (*was.own, RECORD):
        (aside / name).unlink()
    _remove_empty(aside, was.own)
    aside.rmdir()


def recover(target: Path) -> None:
    """Clear up after runs that were killed while they wrote `target`: files that they had moved aside come back,
    unless all new ones were in place, and what they had begun is removed. A line says so. Runs that are alive are left
    alone.

    Raises:
        RMTKDError: the record of the files in `target` is damaged.
    """
    for aside in abandoned(target.parent, target.name, "old"):
        _put_back(aside, target)
    remove_abandoned(target.parent, target.name)


def _put_back(aside: Path, target: Path) -> None:
    old, found = files_of(aside), survey(target) if target.is_dir() else None
    began = (aside / RECORD).is_file()  # it is moved aside last: from then on what lies in `target` is new
    if found is not None and not found.missing and (began or not old):
        shutil.rmtree(aside)
        logger.warning("%s is complete: the run that replaced it was killed after that. Removed %s.", target, aside)
        return
    if began and found is not None:
        for name in (*found.own, RECORD):
            (target / name).unlink()
    for name in (*old, *([RECORD] if began else [])):
        _move(aside, target, name, [])
    shutil.rmtree(aside)
    logger.warning("%s is as it was: a run was killed while it replaced the files there.", target)


@contextmanager
def new_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield an empty folder for what is to become `name`, beside it, and remove it in the end, if it is still there;
    until then it is locked, so that nobody takes it for abandoned."""
    while True:
        beside = Path(tempfile.mkdtemp(prefix=f".{name[:KEPT]}.", suffix=".partial", dir=parent))
        try:
            lock = hold(beside)
            break
        except FileNotFoundError:
            continue
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        let_go(lock)


@contextmanager
def writing_into(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder. If the block succeeds, what lies in it takes the places of files of the same names in
    `folder`, config.json last, and shards of earlier weights go; else it is removed, and `folder` is as it was. What a
    run was killed while it moved, the next one moves to the end."""
    folder = Path(os.path.realpath(folder))
    parent = folder if folder.is_dir() else folder.parent  # on the same disk; it need not be ours to write beside
    parent.mkdir(parents=True, exist_ok=True)
    for place in {parent, folder.parent}:
        for left in abandoned(place, folder.name, "partial"):
            _move_on(left, folder)
    with new_folder(parent, folder.name) as beside:
        yield beside
        names = files_of(beside)
        write_text(beside / MOVING, json.dumps(names))
        _move_all(beside, folder, names)


def _move_on(left: Path, folder: Path) -> None:
    """What a run was killed while it wrote is removed; what it was killed while it moved belongs to `folder`, whose
    own config.json may be gone by now."""
    names = _moving(left)
    if names is None:
        remove(left)
        return
    _move_all(left, folder, names)
    shutil.rmtree(left, ignore_errors=True)
    logger.warning("%s is complete: a run was killed while it moved files there, and the others followed.", folder)


def _moving(left: Path) -> list[str] | None:
    try:
        names = json.loads((left / MOVING).read_text(encoding="utf8"))
        return names if all(_is_inside(name) for name in names) else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _move_all(beside: Path, folder: Path, names: list[str]) -> None:
    """
    Args:
        names: of all files; those that are no longer in `beside` have been moved.
    """
    folder.mkdir(exist_ok=True)
    for place, folders, _ in os.walk(beside):
        for name in folders:
            (folder / Path(place).relative_to(beside) / name).mkdir(exist_ok=True)
    stale = [path for path in folder.iterdir() if SHARD.fullmatch(path.name) and path.name not in names]
    left = [name for name in names if os.path.lexists(beside / name)]
    if "config.json" in left:  # without it the folder is no model: no reader meets new weights under an old one
        (folder / "config.json").unlink(missing_ok=True)
    for name in sorted(left, key=lambda name: (name == "config.json", name)):
        (beside / name).replace(folder / name)
    if any(name.endswith((".safetensors", ".bin")) for name in names):
        for path in stale:
            path.unlink()


def remove_recorded(folder: Path) -> None:
    """Delete the files of the record, and the folder if nothing else is left in it; without a record nothing."""
    was = survey(folder)
    if was is None:
        return
    for name in (*was.own, RECORD):
        (folder / name).unlink()
    _remove_empty(folder, was.own)
    if not any(folder.iterdir()):
        folder.rmdir()


def listed(names: Collection[str]) -> str:
    """The first names, and how many there are."""
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _read(folder: Path) -> dict[str, str] | None:
    path = folder / RECORD
    if path.is_symlink() or not path.is_file():
        return None
    text = read_text(path)
    try:
        files = json.loads(text)["files"]
        sound = all(_is_inside(name) and isinstance(digest, str) for name, digest in files.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise RMTKDError(f"{path} is no record of files: it was cut short or edited. Choose another output folder.")
    return files


def _write(folder: Path, files: dict[str, str]) -> None:
    write_text(folder / RECORD, json.dumps({"version": 1, "files": dict(sorted(files.items()))}, indent=1) + "\n")


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and name != RECORD


def _is_plain(folder: Path, name: str) -> bool:
    """Whether no part of the name is a link: what lies behind one is not in the folder."""
    path = PurePosixPath(name)
    return not any((folder / part).is_symlink() for part in (path, *list(path.parents)[:-1]))


def _is_own(folder: Path, name: str, digest: str) -> bool:
    path = folder / name
    return _is_plain(folder, name) and path.is_file() and _digest(path) == digest


def _digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    there = [name for name in names if (folder / name).is_file() and _is_plain(folder, name)]
    return {name: _digest(folder / name) for name in there}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _in_the_way(target: Path, name: str, own: Collection[str]) -> bool:
    """Whether `target / name` is, or lies behind, something that is not ours to replace."""
    path = PurePosixPath(name)
    for parent in list(path.parents)[:-1]:
        place = target / parent
        if os.path.lexists(place) and (place.is_symlink() or not place.is_dir()) and str(parent) not in own:
            return True
    if (target / name).is_dir() and not (target / name).is_symlink():
        return not all(f"{name}/{below}" in own for below in files_of(target / name))
    return os.path.lexists(target / name) and name not in own


def _move(source: Path, target: Path, name: str, moved: list[tuple[Path, Path]]) -> None:
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).rename(target / name)
    moved.append((source / name, target / name))


def _remove_empty(folder: Path, names: Iterable[str]) -> None:
    """Remove the folders of `names` in which nothing is left."""
    parents = {parent for name in names for parent in list(PurePosixPath(name).parents)[:-1]}
    for parent in sorted(parents, key=lambda parent: -len(parent.parts)):
        place = folder / parent
        if place.is_dir() and not place.is_symlink() and not any(place.iterdir()):
            place.rmdir()
