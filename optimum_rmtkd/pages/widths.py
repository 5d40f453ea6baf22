"""The map of widths: blocks of the network below each other, their sites beside each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


__all__ = ["width_map"]

MOST_COLUMNS = 4  # of a map; what has more kinds of sites in a block becomes a list
FILLED = 0.6  # of its fields, at least


def width_map(sites: Sequence[tuple[str, int, int]]) -> dict[str, Any]:
    """The map of (name, width before, width after) in the order of the network.

    Returns:
        {"columns": kinds of sites, in one block each; empty where the names follow no such order,
        "rows": [{"title", "cells": [{"name", "before", "after", "share"} or None]}], a cell a column. Rows with a
        single cell are sites outside the blocks.}
    """
    cells = {name: _cell(name, before, after) for name, before, after in sites}
    placed = {name: _place(name) for name in cells}
    blocks: dict[str, dict[str, str]] = {}
    for name, (block, kind) in placed.items():
        if block:
            blocks.setdefault(block, {})[kind] = name
    columns = list(dict.fromkeys(kind for kinds in blocks.values() for kind in kinds))
    fields = len(columns) * len(blocks)
    inside = sum(len(kinds) for kinds in blocks.values())
    if not 1 < len(columns) <= MOST_COLUMNS or inside < FILLED * fields:
        return {"columns": [], "rows": [{"title": name, "cells": [cell]} for name, cell in cells.items()]}
    rows, seen = [], set()
    for name, (block, _) in placed.items():
        if not block:
            rows.append({"title": name, "cells": [cells[name]]})
        elif block not in seen:
            seen.add(block)
            found = [blocks[block].get(kind) for kind in columns]
            rows.append({"title": block, "cells": [name and cells[name] for name in found]})
    return {"columns": columns, "rows": rows}


def _place(name: str) -> tuple[str, str]:
    """("layer 3", "intermediate") of layer.3.intermediate; ("", name) of what stands in no numbered block."""
    found = re.fullmatch(r"(.*\.\d+)\.(.+)", name, flags=re.DOTALL)
    return (re.sub(r"(?<!\d)\.(\d)", r" \1", found[1]), found[2]) if found else ("", name)


def _cell(name: str, before: int, after: int) -> dict[str, Any]:
    kept = after / before if before > 0 else 0.0  # records are files, which anybody may have written
    return {"name": name, "before": before, "after": after, "share": min(1.0, max(0.0, kept))}
