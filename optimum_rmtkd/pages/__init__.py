"""Words, figures and HTML of what people read. Knows plain dictionaries, no model and no run."""

from __future__ import annotations

from .spectra import spectra_page


__all__ = ["spectra_page"]
