"""Folders of checkpoints: whether one is whole, the newest whole one, and what it takes to make one appear whole.

A checkpoint is written in `.NAME.partial/NAME` beside its place, and renamed into it when all is there. Its manifest,
`rmtkd_checkpoint.json`, is written last and holds the size of each file. Checkpoints without a manifest (of earlier
versions) are whole if what such a checkpoint consists of is there and can be read. Neither reads whole files.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import IncompleteCheckpointError, RMTKDError
from .files import write_text
from .folders import files_of, listed, recorded
from .leftovers import KEPT, abandoned, remove
from .locks import held, hold, let_go, take_if_abandoned


__all__ = [
    "LAST",
    "MANIFEST",
    "STATE",
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
    "step_of",
    "tell_passed",
    "tidy",
]

logger = logging.getLogger(__name__)

MANIFEST = "rmtkd_checkpoint.json"
STATE, TENSORS = "rmtkd_state.json", "rmtkd_state.safetensors"
LAST = "trainer_state.json"  # that transformers writes into a checkpoint
PATTERNS_TRAINER = (LAST, "optimizer.pt", "scheduler.pt", "rng_state*.pth")
PATTERNS_LOOP = ("optimizer*.bin", "random_states_*.pkl", "custom_checkpoint_*.pkl")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
ARCHIVES = (".pt", ".pth", ".bin", ".pkl")  # torch.save's zip files
_TRAINER = re.compile(r"checkpoint-(\d+)")
_NUMBERED = re.compile(r".*?(\d+)")
_PENDING = re.compile(r"\.(.+)\.partial")


# -- whole or not -----------------------------------------------------------------------------------------------------


def fault_of(folder: str | Path) -> str | None:
    """Why no run can be continued from this checkpoint, in words; None where one can."""
    folder = Path(folder)
    if not folder.is_dir():
        return "no such folder"
    if not (folder / STATE).is_file():
        return f"holds no {STATE}: saved with save_only_model=True, by save_model(), by another trainer, or cut short"
    written = _manifest(folder)
    if isinstance(written, str):
        return written
    missing = _lacking(folder) if written is None else [name for name in written if not (folder / name).is_file()]
    if missing:
        return f"{listed(missing)} missing"
    for name in files_of(folder) if written is None else written:
        if fault := _unreadable(folder / name, archives=written is None):
            return f"{name} cannot be read ({fault})"
        size = (folder / name).stat().st_size
        if written is not None and size != written[name]:
            return f"{name} has {size} bytes, {written[name]} were written"
    return None


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


def _manifest(folder: Path) -> dict[str, int] | str | None:
    """Sizes by name; None where there is none; words where it cannot be read."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf8"))["files"]
        return {str(name): int(size) for name, size in files.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"


def _lacking(folder: Path) -> list[str]:
    """What a checkpoint without a manifest should have."""
    of_loop = any(folder.glob("custom_checkpoint_*.pkl")) or any(folder.glob("random_states_*.pkl"))
    patterns = (TENSORS, *(PATTERNS_LOOP if of_loop else PATTERNS_TRAINER))
    lacking = [pattern for pattern in patterns if not any(folder.glob(pattern))]
    weights = [path for pattern in WEIGHTS for path in folder.rglob(pattern) if not path.name.startswith("rmtkd_")]
    return lacking if weights else [*lacking, "model.safetensors"]


def _unreadable(file: Path, archives: bool) -> str | None:
    """
    Args:
        archives: what is named like one of torch's has to be one. A subclass may write others, of a known size.
    """
    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf8"))
        elif file.suffix == ".safetensors":
            return _cut_short(file)
        elif archives and file.suffix in ARCHIVES and not zipfile.is_zipfile(file):
            return "its end is missing"
    except (OSError, ValueError, RecursionError) as error:
        return " ".join(str(error).split())
    return None


def _cut_short(file: Path) -> str | None:
    """A safetensors file is eight bytes, the length of its header; the header; and the tensors that it lists."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 1 < length <= file.stat().st_size - 8:
            return "its header is cut short"
        header = json.loads(opened.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    size = file.stat().st_size
    return None if size == expected else f"{size} of {expected} bytes"


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


def newest_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint of an `RMTKDLoop` or a trainer among the folders in `folder`, for
    `accelerator.load_state`: the one of the highest step. None where there is none. A line says which newer ones were
    passed over, and why.

    Which step one is of stands in its manifest; that of a checkpoint of an earlier version is the number in its name.
    """
    found = first_whole(checkpoints_of_loop(folder))
    tell_passed(found)
    return None if found.newest is None else str(found.newest)


def checkpoints_of_loop(folder: str | Path) -> list[Path]:
    """Folders whose manifest or state says that they are checkpoints, newest first."""
    places = [path for path in _folders(folder) if (path / STATE).is_file() or (path / MANIFEST).is_file()]
    return sorted(places, key=lambda path: (step_of(path), path.stat().st_mtime), reverse=True)


def checkpoints_in(folder: str | Path, kind: str = "checkpoint-") -> list[Path]:
    """Folders `kind`N, by N."""
    named = re.compile(re.escape(kind) + r"(\d+)")
    found = [(int(match[1]), path) for path in _folders(folder) if (match := named.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _folders(folder: str | Path) -> list[Path]:
    place = Path(folder)
    return [p for p in place.iterdir() if p.is_dir() and not p.name.startswith(".")] if place.is_dir() else []


def step_of(path: str | Path) -> int:
    """Optimizer steps that were done, as the manifest says, or the number in the name; -1 without either."""
    path = Path(path)
    try:
        return int(json.loads((path / MANIFEST).read_text(encoding="utf8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        number = re.search(r"(\d+)$", path.name)
        return int(number[1]) if number else -1


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
    """Remove what runs that were killed left in a folder of checkpoints, with a line for each; put back what they had
    moved aside."""
    folder = Path(folder)
    if not folder.is_dir():
        return
    for entry in sorted(folder.glob(".*")):
        match = _PENDING.fullmatch(entry.name)
        held = _names_in(entry) if match and entry.is_dir() and not entry.is_symlink() else None
        if held is None or held not in ([], [match[1]]):
            continue  # none of ours
        if (lock := take_if_abandoned(entry)) is not None:
            remove(entry)
            let_go(lock)
    for name in {m[1] for e in folder.glob(".*.old") if (m := re.fullmatch(r"\.(.+)\.[a-z0-9_]{8}\.old", e.name))}:
        for aside in abandoned(folder, name, "old"):
            if _NUMBERED.fullmatch(name):
                _put_back(aside, folder / name)


def _names_in(folder: Path) -> list[str] | None:
    """None where the folder has gone meanwhile: another machine tidies as well."""
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return None


def _put_back(aside: Path, target: Path) -> None:
    kept = aside / target.name
    if kept.is_dir() and not target.exists():
        kept.rename(target)
        aside.rmdir()
        logger.warning("%s is back in its place: a run was killed while it replaced it.", target)
    elif kept.is_dir():
        _keep_foreign(kept, target)
        remove(aside)


def _keep_foreign(old: Path, new: Path) -> None:
    """Carry over what is in the way of nothing, and no checkpoint of ours has."""
    known = _manifest(old)
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
