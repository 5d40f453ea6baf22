"""`optimum-cli rmtkd families`: what can be narrowed."""

from __future__ import annotations

import dataclasses
import json

from .base import Command, set_help


__all__ = ["FamiliesCommand"]

USAGE = "optimum-cli rmtkd families [MODEL_TYPE ...] [--json]"

DESCRIPTION = """\
Print which architectures can be narrowed, at which sites, and in which forms, as the registry of this installation
answers. Nothing is downloaded: models without weights are asked.
"""

EPILOG = """\
examples:
  all families
    optimum-cli rmtkd families
  the model_type that a config.json names
    optimum-cli rmtkd families bert mpnet
  for a script
    optimum-cli rmtkd families --json

A family that is not there can be declared in a few lines: docs/guides/extending.md.
"""


class FamiliesCommand(Command):
    @staticmethod
    def parse_args(parser):
        set_help(parser, DESCRIPTION, EPILOG, USAGE)
        parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="Those alone. Default: all.")
        parser.add_argument("--json", action="store_true", help="As JSON: a list, one object a row.")

    def execute(self) -> None:
        from ..surgery.overview import families_table, family_rows

        rows = family_rows(self.args.model_types)
        if self.args.json:
            print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        else:
            print(families_table(rows))
