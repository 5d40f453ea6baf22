"""Parts of one self-contained HTML page: no network, no script but its own few lines."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import UNSIGNED, sign
from .figures import PALETTE
from .rounding import rounded


if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["bars", "picture", "render", "table", "tile"]

TEMPLATES = Path(__file__).parent / "templates"
NUMBER = re.compile(r"[+\-−]?[\d,]*\.?\d+(?:[eE][+-]?\d+)?")
SECTION = {
    "side": False,  # stands beside the one before it, where there is room
    "paragraphs": (),
    "legend": (),
    "map": None,
    "figures": (),
    "rows": (),
    "stacked": False,
    "remarks": (),
    "details": (),
    "folded": "",
}


def tile(
    label: str, value: str, drawn: Sequence[Mapping[str, Any]] = (), notes: Sequence[str] = (), command: str = ""
) -> dict[str, Any]:
    """One answer of the head of the page.

    Args:
        label: what it is about. value: the answer, in a few words.
        drawn: `bars` of it. notes: small lines below. command: that would measure it.
    """
    return {"label": label, "value": value, "bars": drawn, "notes": notes, "command": command}


def bars(before: float, after: float, texts: tuple[str, str]) -> tuple[dict[str, Any], ...]:
    """Two bars of a tile, of lengths in proportion; none for values that have none."""
    longest = max(before, after)
    if min(before, after) < 0 or longest <= 0:
        return ()
    lengths = before / longest, after / longest
    return tuple(
        {"name": name, "length": length, "text": text}
        for name, length, text in zip(("before", "after"), lengths, texts, strict=True)
    )


def table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[Any]], notes: Sequence[str] = (), **others: Any
) -> dict[str, Any]:
    """A section with a table that can be sorted.

    Args:
        notes: what each column means. others: further fields of the section, see `SECTION`.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [any(cell["number"] for cell in column) for column in zip(*cells, strict=True)] or [False] * len(head)
    names = [
        {"name": name, "note": note, "number": number}
        for name, note, number in zip(head, notes or [""] * len(head), numeric, strict=True)
    ]
    return {"title": title, "head": names, "rows": cells, **others}


def _cell(value: Any) -> dict[str, Any]:
    """Text of a cell, and the number it is sorted by where it is or starts with one."""
    if value is None or value == "-":
        return {"text": "–", "key": "", "number": True}
    if isinstance(value, (int, float)):
        return {"text": rounded(value), "key": value, "number": True}
    found = NUMBER.match(value)
    if not found:
        return {"text": value, "key": value, "number": False}
    key = float(found[0].replace(",", "").replace("−", "-"))
    text = rounded(key) if "e" in found[0].lower() and found[0] == value else value
    return {"text": text, "key": key, "number": True}


def picture(figure: Figure, key: str, text: str) -> dict[str, str]:
    """A figure of a section: its drawing, and what it shows."""
    return {"svg": _to_svg(figure, key, text), "text": text}


def _to_svg(figure: Figure, key: str, text: str) -> str:
    """The figure as an `svg` element that takes its colours from the page, its ids made unique by `key`."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rmtkd", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for name, colour in PALETTE.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = svg.replace("url(#", f"url(#{key}-").replace('href="#', f'href="#{key}-')
    width, height = figure.get_size_inches()
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    box = f"0 0 {72 * width:g} {72 * height:g}"
    head = f'<svg role="img" aria-label="{html.escape(text)}" viewBox="{box}" {spaces}>'
    return head + svg[svg.index(">") + 1 :]


def render(
    title: str,
    facts: Sequence[tuple[str, str]],
    sections: Sequence[Mapping],
    recipe: Mapping,
    tiles: Sequence[Mapping] = (),
) -> str:
    """The whole page, signed.

    Args:
        facts: (name, value) below the title. tiles: answers, before anything else.
        sections: mappings with "title" and any field of `SECTION`, in their order.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        title=title,
        facts=facts,
        tiles=tiles,
        sections=_placed(sections),
        recipe=sorted(recipe.items()),
        generator=UNSIGNED,
    )
    return sign(page.encode("utf8", "replace").decode("utf8"))  # halves of characters, which JSON may hold


def _placed(sections: Sequence[Mapping]) -> list[dict[str, Any]]:
    """With keys, and places in the grid of a wide screen: whole rows, and pairs of a main part and its side."""
    found = [SECTION | dict(section) | {"key": f"part-{i}", "place": "whole"} for i, section in enumerate(sections)]
    for main, side in zip(found, found[1:], strict=False):
        if side["side"] and main["place"] == "whole" and not main["side"]:
            main["place"], side["place"] = "main", "side"
    return found
