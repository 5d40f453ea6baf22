"""What leaves the house: the model card, the HTML report and its figures, exports, and the record of a run they
read."""

from __future__ import annotations

from ..pages import spectra_page
from .card import model_card, write_card
from .page import report_page
from .run import Run, write_results, write_spectra


__all__ = ["Run", "model_card", "report_page", "spectra_page", "write_card", "write_results", "write_spectra"]
