"""`optimum-cli rmtkd report`: the HTML report of a finished run."""

from __future__ import annotations

from pathlib import Path

from ..files import write_signed
from ..folders import add_to_record
from .base import Command, set_help
from .output import check_target


__all__ = ["ReportCommand"]

USAGE = "optimum-cli rmtkd report OUT [-o FILE]"

DESCRIPTION = """\
Write one HTML page about a finished reduction: how small, how fast and how good it is, a map of all widths, the
budget, the stages with every metric, the training curves, and for each site its eigenvalues with the Marchenko-Pastur
fit and the edge. The page needs no network and no other file; its speed is what optimum-cli rmtkd bench measured.
"""

EPILOG = """\
examples:
  the output folder of compress, or the output_dir of an RMTKDTrainer
    optimum-cli rmtkd report ./my-bert-small
  somewhere else
    optimum-cli rmtkd report ./my-bert-small -o ~/report.html

A file that lies there already is replaced only if it is such a page, unchanged since.

For a model that has not been cut yet: optimum-cli rmtkd analyze ... --html spectra.html
"""


class ReportCommand(Command):
    @staticmethod
    def parse_args(parser):
        set_help(parser, DESCRIPTION, EPILOG, USAGE)
        parser.add_argument("folder", metavar="OUT", help="Folder of a finished run.")
        parser.add_argument("-o", "--output", metavar="FILE", help="Default: report.html in OUT.")

    def execute(self) -> None:
        from ..hub import Run, report_page
        from ..hub.page import PAGE

        target = Path(self.args.output or Path(self.args.folder) / PAGE)
        run = Run.read(self.args.folder)
        check_target(target)
        write_signed(target, report_page(run))
        if self.args.output is None:
            add_to_record(target.parent, [PAGE])
        print(f"report written to {target}")
