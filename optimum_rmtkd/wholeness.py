"""Whether a checkpoint is whole.

One with a manifest, `rmtkd_checkpoint.json`, is whole if every file of it has its size. Checkpoints without one (of
earlier versions) are whole if what such a checkpoint consists of is there and can be read. Neither reads whole files,
and neither trusts what it reads: a fault in the newest checkpoint must not hide an intact one beside it.
"""

from __future__ import annotations

import json
import re
import zipfile
from fnmatch import fnmatch
from pathlib import Path

from .folders import files_of, listed


__all__ = ["LAST", "MANIFEST", "STATE", "TENSORS", "fault_of", "is_checkpoint", "manifest_of", "step_of"]

MANIFEST = "rmtkd_checkpoint.json"
STATE, TENSORS = "rmtkd_state.json", "rmtkd_state.safetensors"
LAST = "trainer_state.json"  # that transformers writes into a checkpoint
PATTERNS_TRAINER = (LAST, "optimizer.pt", "scheduler.pt", "rng_state*.pth")
PATTERNS_LOOP = ("optimizer*.bin", "random_states_*.pkl", "custom_checkpoint_*.pkl")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
ARCHIVES = (".pt", ".pth", ".bin", ".pkl")  # torch.save's zip files
OF_TORCH = (*PATTERNS_TRAINER[1:], *PATTERNS_LOOP[:2])  # written by torch.save, whoever trains
UNSOUND = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)  # at any bytes


def fault_of(folder: str | Path) -> str | None:
    """Why no run can be continued from this checkpoint, in words; None where one can."""
    try:
        return _fault_of(Path(folder))
    except UNSOUND as error:  # a name that no file can have, for example
        return f"it cannot be read ({_words(error)})"


def _fault_of(folder: Path) -> str | None:
    if not folder.is_dir():
        return "no such folder"
    if not (folder / STATE).is_file():
        return f"holds no {STATE}: saved with save_only_model=True, by save_model(), by another trainer, or cut short"
    written = manifest_of(folder)
    if isinstance(written, str):
        return written
    if written is not None and STATE not in written:
        return f"{MANIFEST} lists no {STATE}"
    missing = _lacking(folder) if written is None else [name for name in written if not (folder / name).is_file()]
    if missing:
        return f"{listed(missing)} missing"
    for name in files_of(folder) if written is None else written:
        file = folder / name
        if fault := _unreadable(file, by_manifest=written is not None):
            return f"{name} cannot be read ({fault})"
        size = file.stat().st_size
        if written is not None and size != written[name]:
            return f"{name} has {size} bytes, {written[name]} were written"
        if _is_archive(file, by_manifest=written is not None) and not zipfile.is_zipfile(file):
            return f"{name} cannot be read (its end is missing)"
    return None


def manifest_of(folder: Path) -> dict[str, int] | str | None:
    """Sizes by name; None where there is none; words where it cannot be read."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf8"))["files"]
        return {str(name): int(size) for name, size in files.items()}
    except FileNotFoundError:
        return None
    except UNSOUND as error:
        return f"{MANIFEST} cannot be read ({_words(error)})"


def _lacking(folder: Path) -> list[str]:
    """What a checkpoint without a manifest should have."""
    of_loop = any(folder.glob("custom_checkpoint_*.pkl")) or any(folder.glob("random_states_*.pkl"))
    patterns = (TENSORS, *(PATTERNS_LOOP if of_loop else PATTERNS_TRAINER))
    lacking = [pattern for pattern in patterns if not any(folder.glob(pattern))]
    weights = [path for pattern in WEIGHTS for path in folder.rglob(pattern) if not path.name.startswith("rmtkd_")]
    return lacking if weights else [*lacking, "model.safetensors"]


def _unreadable(file: Path, by_manifest: bool) -> str | None:
    try:
        if file.suffix == ".json":
            values = json.loads(file.read_text(encoding="utf8"))
            if file.name == STATE and not (isinstance(values, dict) and (by_manifest or "version" in values)):
                return "it holds no state of a run"
        elif file.suffix == ".safetensors":
            return _cut_short(file)
    except UNSOUND as error:
        return _words(error)
    return None


def _is_archive(file: Path, by_manifest: bool) -> bool:
    """Whether it has to be one of torch's, by its name; where its size is known, only by a name that is transformers'
    or Accelerate's: a subclass may write others."""
    if by_manifest:
        return any(fnmatch(file.name, pattern) for pattern in OF_TORCH)
    return file.suffix in ARCHIVES


def _words(error: BaseException) -> str:
    """A foreign error on one line; those of lookups and types say little without their kind."""
    words = " ".join(str(error).split())[:200]
    return words if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {words}"


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


def is_checkpoint(path: Path) -> bool:
    """Whether a manifest or a state says so."""
    return (path / STATE).is_file() or (path / MANIFEST).is_file()


def step_of(path: str | Path) -> int:
    """Optimizer steps that were done, as the manifest says, or the number in the name; -1 without either."""
    path = Path(path)
    try:
        return int(json.loads((path / MANIFEST).read_text(encoding="utf8"))["step"])
    except UNSOUND:
        number = re.search(r"(\d+)$", path.name)
        return int(number[1]) if number else -1
