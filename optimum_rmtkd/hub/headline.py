"""The answers that a report begins with: how small, how fast, how good."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..pages.escaping import shell_word
from ..pages.html import bars, tile
from ..pages.rounding import duration, rounded, share, signed, size
from ..pages.spectra import size_tile
from .measures import is_number
from .run import Run


__all__ = ["headline_tiles"]

# Metrics that people read in percent; others (correlations, losses, perplexities) are shown as they are.
PERCENT = {"accuracy", "acc", "f1", "precision", "recall", "em", "exact", "exact_match", "iou", "map"}
NOT_MEASURED = "not measured"


def headline_tiles(run: Run) -> list[dict[str, Any]]:
    """Tiles of size, speed and quality; what is not known says how it would be measured."""
    tiles = []
    if run.parameters:
        on_disk = run.results.get("bytes") or (0, 0)
        notes = [f"{size(on_disk[0])} → {size(on_disk[1])} on disk"] if all(on_disk) else []
        tiles.append(size_tile("Size", run.parameters, notes))
    return [*tiles, _speed(run), _quality(run)]


def _speed(run: Run) -> dict[str, Any]:
    """Of the smallest batch that was timed, the others in a line."""
    timed = [_timed(value) for value in run.bench.get("values", [])]
    timed = sorted((found for found in timed if found), key=lambda found: found["batch"])
    if not timed:
        names = shell_word(run.name), shell_word(run.base_model or "BASE_MODEL")
        return tile("Speed", NOT_MEASURED, command=f"optimum-cli rmtkd bench {names[0]} --against {names[1]}")
    first, others = timed[0], timed[1:]
    notes = [f"one pass, {first['where']}", *(f"{_times(other)} at {other['where']}" for other in others)]
    if run.bench.get("setting"):
        notes.append(str(run.bench["setting"]).split(";")[0])
    seconds = first["before"], first["after"]
    return tile("Speed", _times(first), bars(*seconds, tuple(map(duration, seconds))), notes)


def _timed(value: Mapping[str, Any]) -> dict[str, Any] | None:
    """Seconds of a pass before and after, of one entry of a bench; None of what is no such time."""
    what, unit = str(value.get("what")), value.get("unit")
    found = re.fullmatch(r"(latency|throughput), (batch (\d{1,9})\b.*)", what, flags=re.DOTALL)
    numbers = [value.get(key) for key in ("before", "after")]
    if not found or not all(is_number(number) and number > 0 for number in numbers):
        return None
    if unit == "/s":
        numbers = [int(found[3]) / number for number in numbers]
    ratio = value.get("ratio")
    ratio = ratio if is_number(ratio) else numbers[0] / numbers[1]
    return {"batch": int(found[3]), "where": found[2], "before": numbers[0], "after": numbers[1], "ratio": ratio}


def _times(found: Mapping[str, Any]) -> str:
    return f"{found['ratio']:.1f}× as fast"


def _quality(run: Run) -> dict[str, Any]:
    """Of the metric that judged, else of the loss, or whatever was evaluated at both moments."""
    name, before, after = run.metric or ("", None, None)
    if not (is_number(before) and is_number(after)):
        moments = [run.metrics.get(moment) or {} for moment in ("before", "after")]
        both = [key for key in moments[0] if all(is_number(moment.get(key)) for moment in moments)]
        if not both:
            return tile("Quality", NOT_MEASURED, notes=["no metric of before and after is on record"])
        key = "eval_loss" if "eval_loss" in both else both[0]
        name, before, after = key.removeprefix("eval_"), moments[0][key], moments[1][key]
    scale = _percent(name, before, after)
    if scale:
        value, shown = f"{signed(scale * (after - before))} points", (share(scale * x / 100) for x in (before, after))
    else:
        change = after - before
        value = signed(change, 3) if abs(change) < 100 else rounded(change)
        shown = map(rounded, (before, after))
    data = run.results.get("dataset", {})
    words = [str(data[key]) for key in ("name", "config", "split") if data.get(key)]
    rows = f"{data['rows']:,} rows" if is_number(data.get("rows")) else ""
    notes = [note for note in [", ".join(filter(None, [*words, rows]))] if note]
    label = name.replace("_", " ")
    return tile(label[:1].upper() + label[1:], value, bars(before, after, tuple(shown)), notes)


def _percent(name: str, *values: float) -> float:
    """What makes percent of the values of a metric; 0 where nobody reads it so."""
    last = set(re.split(r"[^a-z0-9]+", name.lower()))
    if not (name.lower() in PERCENT or last & PERCENT) or min(values) < 0 or max(values) > 100:
        return 0.0
    return 100.0 if max(values) <= 1 else 1.0
