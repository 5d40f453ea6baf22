"""The `rmtkd` group of commands of optimum-cli."""

from __future__ import annotations

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .analyze import AnalyzeCommand
from .base import CommandParser, set_help
from .bench import BenchCommand
from .compress import CompressCommand
from .demo import DemoCommand
from .export import ExportCommand
from .families import FamiliesCommand
from .plan import PlanCommand
from .report import ReportCommand
from .ternary import TernaryCommand
from .trim import TrimCommand


__all__ = ["RMTKDCommand"]

DESCRIPTION = """\
Narrow a Transformers model by the spectra of its own activations, distil it back, save it so that from_pretrained
reloads it.
"""

EPILOG = """\
examples:
  optimum-cli rmtkd demo
      the whole way on a small vision transformer, without network, in a few minutes
  optimum-cli rmtkd analyze --model MODEL --train-file train.csv
      what every part of a model could lose; changes nothing
  optimum-cli rmtkd compress --model MODEL --train-file train.csv --validation-file dev.csv \\
      --target-reduction 0.8 -o OUT
      cut, distil, evaluate, save
  optimum-cli rmtkd families
      which architectures can be narrowed, and where
  optimum-cli rmtkd plan --model MODEL --target-reduction 0.5
      what that needs in memory and work; reads the config alone
  optimum-cli rmtkd trim MODEL --texts corpus.txt -o OUT
      without the rows of the token table that a domain does not use
  optimum-cli rmtkd ternary --model MODEL --module classifier --train-file train.csv -o OUT
      a part of a model in weights of 1.6 bits
  optimum-cli rmtkd report OUT
      one HTML page about what was done
  optimum-cli rmtkd export OUT --format onnx -o DIR
      for readers that know nothing of this package
  optimum-cli rmtkd bench OUT --against MODEL
      size, time, memory and energy of both

Each command has its own --help.
"""


class RMTKDCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="rmtkd", help="Compress models by random-matrix spectra and self-distillation.")
    SUBCOMMANDS = (
        CommandInfo(
            name="analyze",
            help="Print the spectrum of every site of a model and the width it would keep.",
            subcommand_class=AnalyzeCommand,
        ),
        CommandInfo(
            name="plan",
            help="Tell what a cut needs in memory and FLOPs, from the config alone.",
            subcommand_class=PlanCommand,
        ),
        CommandInfo(
            name="compress",
            help="Narrow a fine-tuned model, distil it, evaluate it and save it.",
            subcommand_class=CompressCommand,
        ),
        CommandInfo(
            name="trim",
            help="Drop the tokens that the texts of a domain do not use, from table and tokenizer.",
            subcommand_class=TrimCommand,
        ),
        CommandInfo(
            name="ternary",
            help="Replace a part of a model by a network with ternary weights, or fit one to features.",
            subcommand_class=TernaryCommand,
        ),
        CommandInfo(
            name="report",
            help="Write the HTML report of a finished reduction.",
            subcommand_class=ReportCommand,
        ),
        CommandInfo(
            name="export",
            help="Write a reduced model as a plain checkpoint or as ONNX.",
            subcommand_class=ExportCommand,
        ),
        CommandInfo(
            name="families",
            help="Print which architectures can be narrowed, at which sites, in which form.",
            subcommand_class=FamiliesCommand,
        ),
        CommandInfo(
            name="bench",
            help="Measure a reduced model against the one it was made from.",
            subcommand_class=BenchCommand,
        ),
        CommandInfo(
            name="demo",
            help="Train, narrow, distil and reload a small vision transformer; needs no network.",
            subcommand_class=DemoCommand,
        ),
    )

    @property
    def subparsers(self):
        """Of the commands: optimum would make them of the class of its own parser."""
        if getattr(self, "_subparsers", None) is None:
            self._subparsers = self.parser.add_subparsers(parser_class=CommandParser)
        return self._subparsers

    @subparsers.setter
    def subparsers(self, subparsers):
        self._subparsers = subparsers

    @staticmethod
    def parse_args(parser):
        set_help(parser, DESCRIPTION, EPILOG)
