"""Times of layers on disk, in the usual cache folder: one JSON file for each device, number of threads and dtype."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import RMTKDError
from ..files import write_text
from ..recipe import parse_json


__all__ = ["cache_file", "read_times", "write_times"]

logger = logging.getLogger(__name__)

VERSION = 1
Times = dict[str, dict[str, float]]


def cache_folder() -> Path:
    """Below that of Hugging Face (HF_HOME)."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "optimum_rmtkd" / "latency"


def cache_file(device: str, threads: int | None, dtype: torch.dtype) -> tuple[Path, dict[str, Any]]:
    """(file, what it is about). Another release of torch has other kernels.

    Args:
        threads: None on a GPU.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    about = {"device": device, "name": name, "threads": threads, "dtype": str(dtype).removeprefix("torch.")}
    about["torch"] = torch.__version__
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / f"{device}-{about['dtype']}-{digest}.json", about


def _processor() -> str:
    """The model of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def read_times(file: Path, about: Mapping[str, Any]) -> Times:
    """What is known; nothing where there is no file. One that is damaged, or somebody else's, is passed over with a
    line."""
    if not file.is_file():
        return {}
    try:
        values = parse_json(file.read_text(encoding="utf8"), str(file), "expected times of layers")
        return _checked(values, about)
    except (OSError, UnicodeDecodeError, RMTKDError) as error:
        logger.warning("The times of layers in %s are passed over (%s): they are measured anew.", file, error)
        return {}


def _checked(values: Any, about: Mapping[str, Any]) -> Times:
    """
    Raises:
        RMTKDError: not what `write_times` writes.
    """
    if not isinstance(values, dict) or values.get("version") != VERSION or values.get("about") != dict(about):
        raise RMTKDError("it is of another device, or another version")
    times = values.get("times")
    if not isinstance(times, dict) or not all(isinstance(kind, dict) for kind in times.values()):
        raise RMTKDError("it holds no times")
    for kind in times.values():
        for widths, seconds in kind.items():
            sound = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
            if not sound or not math.isfinite(seconds) or seconds <= 0:
                raise RMTKDError(f"{widths} takes {seconds!r} seconds there")
    return times


def write_times(file: Path, about: Mapping[str, Any], times: Times) -> None:
    """Keep them, beside what another process has measured meanwhile. Where that cannot be, a line says so."""
    known = read_times(file, about)
    merged = {key: known.get(key, {}) | times.get(key, {}) for key in sorted({*known, *times})}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"version": VERSION, "about": about, "times": merged}, indent=1) + "\n")
    except (OSError, RMTKDError) as error:
        logger.warning("The times of layers are not kept for the next run: %s", error)
