"""What the spectra say, for people: a table, JSON, a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import check_matplotlib
from ..files import UNSIGNED, check_replaceable, picture_metadata, write_signed
from ..spectra import SignalSubspace
from .budget import BudgetPoint


__all__ = ["SiteSpectrum", "SpectralReport"]


@dataclass(frozen=True)
class SiteSpectrum:
    """Spectrum of one site.

    Attributes:
        name, kind: of the site. width: features now. planned: features the recipe would leave.
        subspace: the diagnosis; its basis belongs to the centred covariance and is for looking only.
    """

    name: str
    kind: str
    width: int
    planned: int
    subspace: SignalSubspace

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "name": self.name,
            "kind": self.kind,
            "width": self.width,
            "planned": self.planned,
        } | self.subspace.to_dict()


@dataclass(frozen=True)
class SpectralReport:
    """Spectra of all sites of a model, and the budget they lead to.

    Attributes:
        sites: in the order of the network.
        parameters: of the model now. planned_parameters: of the model that the recipe would leave.
        budget: the moves of the allocation (`BudgetPoint`), which is the curve of size against predicted loss; empty
            where the edge decides.
        recipe: RMTKDConfig.to_dict().
        round_to: what planned widths are multiples of: less than the recipe says where that would have missed the
            target. None: not known.
        note: what is to be said of a recipe without a target; empty otherwise.
        blocks: where whole blocks may go, {name: (predicted loss without it, whether the recipe leaves it)}.
    """

    sites: tuple[SiteSpectrum, ...]
    parameters: int
    planned_parameters: int
    budget: tuple[BudgetPoint, ...]
    recipe: dict[str, Any]
    round_to: int | None = None
    note: str = ""
    blocks: Mapping[str, tuple[float, bool]] = field(default_factory=dict)

    def table(self) -> str:
        """One line a site: width, planned width, rank under the chosen and every other estimator, and the fit of the
        bulk."""
        from ..spectra import EDGE_ESTIMATORS

        chosen = self.recipe["edge_estimator"]
        others = [
            name for name in EDGE_ESTIMATORS if name != chosen and any(name in s.subspace.ranks for s in self.sites)
        ]
        head = [
            "site",
            "width",
            "planned",
            "n",
            "n_eff",
            "q",
            "edge",
            f"k {chosen}",
            "k/d",
            "KS",
            *[f"k {o}" for o in others],
        ]
        rows = []
        for site in self.sites:
            s = site.subspace
            numbers = [site.width, site.planned, s.n, _short(s.n_eff), _short(s.q), _short(s.edge), s.spectral_rank]
            ratios = [f"{s.spectral_rank / s.dim:.2f}", _short(s.ks_distance)]
            rows.append([site.name, *map(str, numbers), *ratios, *[str(s.ranks.get(o, "-")) for o in others]])
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in [head, ["-" * w for w in widths], *rows]
        ]
        share = 1 - self.planned_parameters / self.parameters
        lines += [
            "",
            f"parameters {self.parameters:,} -> {self.planned_parameters:,} ({-share:+.1%})",
            *([f"widths: {self.steps}"] if self.steps else []),
            *self._of_blocks(),
            *self.warnings(),
            *([self.note] if self.note else []),
        ]
        return "\n".join(lines)

    def _of_blocks(self) -> list[str]:
        """Whole blocks, and what their loss is predicted to cost."""
        if not self.blocks:
            return []
        costs = ", ".join(f"{name} {_short(cost)}" for name, (cost, _) in self.blocks.items())
        gone = [name for name, (_, stays) in self.blocks.items() if not stays]
        return [f"blocks: predicted loss without {costs}; removed: {', '.join(gone) or 'none'}"]

    @property
    def steps(self) -> str:
        """What is to be said of the steps of the widths; empty where they are the recipe's."""
        asked = self.recipe.get("round_to")
        if self.round_to is None or self.round_to == asked:
            return ""
        return f"multiples of {self.round_to}, because multiples of {asked} would have missed the target"

    def warnings(self) -> list[str]:
        """Each distinct warning once, with the number of sites it concerns."""
        kinds: dict[str, list[str]] = {}
        texts: dict[str, str] = {}
        for site in self.sites:
            for text in site.subspace.warnings:
                label = text.split(":")[0]
                kinds.setdefault(label, []).append(site.name)
                texts.setdefault(label, text)
        return [
            f"! {len(names)} of {len(self.sites)} sites ({names[0]}{', ...' if len(names) > 1 else ''}): "
            f"{texts[label]}"
            for label, names in kinds.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; NaN becomes None."""
        return {
            "parameters": self.parameters,
            "planned_parameters": self.planned_parameters,
            "round_to": self.round_to,
            "steps": self.steps,
            "note": self.note,
            "blocks": {n: {"predicted_loss": cost, "kept": stays} for n, (cost, stays) in self.blocks.items()},
            "recipe": self.recipe,
            "sites": [site.to_dict() for site in self.sites],
            "budget": [vars(point) for point in self.budget],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, written to `path` where one is given, with a line that says who wrote it.

        Raises:
            RMTKDError: `path` cannot be written to, or holds a file that is not from here.
        """
        values = self.to_dict()
        if path is not None:
            write_signed(path, json.dumps(values | {"written_by": UNSIGNED}, indent=1) + "\n")
        return json.dumps(values, indent=1)

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one self-contained HTML page, written to `path` where one is given.

        Raises:
            RMTKDError: matplotlib (the extra `report`) is not installed, `path` cannot be written to, or holds a file
                that is not from here.
        """
        from ..pages import spectra_page  # on demand: most reports become no page

        html = spectra_page(self.to_dict())
        if path is not None:
            write_signed(path, html)
        return html

    def plot(self, path: str | Path) -> None:
        """A PNG (or what the suffix of `path` says): per site its eigenvalues, the edge and the planned width.

        Raises:
            RMTKDError: matplotlib (the extra `report`) is not installed, or `path` holds a file that is not from here.
        """
        check_matplotlib()
        check_replaceable(path)
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        columns = min(4, len(self.sites))
        rows = math.ceil(len(self.sites) / columns)
        figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.4 * rows), squeeze=False)
        for axis, site in zip(axes.flat, self.sites, strict=False):
            values = site.subspace.eigenvalues.clamp_min(site.subspace.eigenvalues[0] * 1e-12)
            axis.semilogy(range(1, len(values) + 1), values, lw=1.2)
            if math.isfinite(site.subspace.edge) and site.subspace.edge > 0:
                axis.axhline(site.subspace.edge, color="tab:red", lw=0.8, label="edge")
            axis.axvline(site.planned, color="tab:green", lw=0.8, ls="--", label="planned width")
            axis.set_title(site.name, fontsize=8)
            axis.tick_params(labelsize=6)
        for axis in list(axes.flat)[len(self.sites) :]:
            axis.axis("off")
        axes.flat[0].legend(fontsize=6)
        figure.supxlabel("direction", fontsize=8)
        figure.supylabel("eigenvalue", fontsize=8)
        figure.tight_layout()
        figure.savefig(path, dpi=120, metadata=picture_metadata(path))
        plt.close(figure)


def _short(number: float) -> str:
    if not math.isfinite(number):
        return "-"
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.3g}"
