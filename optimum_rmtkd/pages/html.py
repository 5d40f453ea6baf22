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


if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["picture", "render", "table"]

TEMPLATES = Path(__file__).parent / "templates"


def table(
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[Any]],
    notes: Sequence[str] = (),
    figures: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [any(cell["number"] for cell in column) for column in zip(*cells, strict=True)] or [False] * len(head)
    names = [
        {"name": name, "note": note, "number": number}
        for name, note, number in zip(head, notes or [""] * len(head), numeric, strict=True)
    ]
    return {"title": title, "head": names, "rows": cells, "figures": figures}


def _cell(value: Any) -> dict[str, Any]:
    """Text of a cell, and the number it is sorted by where it is or starts with one."""
    if value is None:
        return {"text": "–", "key": "", "number": True}
    if isinstance(value, (int, float)):
        text = f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return {"text": text, "key": value, "number": True}
    found = re.match(r"[+-]?[\d,]*\.?\d+", value)
    return {"text": value, "key": float(found[0].replace(",", "")) if found else value, "number": bool(found)}


def picture(figure: Figure, key: str, text: str) -> dict[str, str]:
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


def render(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Mapping], recipe: Mapping) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    blank = {"text": "", "figures": (), "rows": (), "remarks": (), "details": ()}
    keyed = [blank | dict(s) | {"key": f"part-{i}"} for i, s in enumerate(sections)]
    page = environment.get_template("report.html.jinja").render(
        title=title, facts=facts, sections=keyed, recipe=sorted(recipe.items()), generator=UNSIGNED
    )
    return sign(page.encode("utf8", "replace").decode("utf8"))  # halves of characters, which JSON may hold
