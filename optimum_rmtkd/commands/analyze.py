"""`optimum-cli rmtkd analyze`: what each site of a model could lose. Changes nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..config import RMTKDConfig
from ..errors import RMTKDError, check_matplotlib
from .base import Command, set_help
from .data import DataArguments, check_files
from .options import add_options, add_recipe_options, from_options, recipe_from_options
from .output import check_target
from .threads import THREADS, use_threads


__all__ = ["AnalyzeCommand"]

UNUSED = ("validation_file", "max_eval_samples", "metric")

USAGE = "optimum-cli rmtkd analyze --model MODEL (--train-file FILE | --dataset NAME) [options]"

DESCRIPTION = """\
Run a little data through a fine-tuned model and print, for each site that can be narrowed, its width, its noise edge,
the rank that lies above it, and the rank under the other edge estimators. Nothing is cut and nothing is trained.
"""

EPILOG = """\
examples:
  a text classifier on local files; text and label columns are found
    optimum-cli rmtkd analyze --model ./my-bert --train-file train.csv
  the same numbers for another tool, and as a page to look at
    optimum-cli rmtkd analyze --model ./my-bert --train-file train.parquet --json spectra.json --html spectra.html
  the rule of the paper, on all tokens
    optimum-cli rmtkd analyze --model ./my-bert --train-file train.csv --edge-estimator mp_quantile --sample-unit token
  a dataset of the Hub
    optimum-cli rmtkd analyze --model org/bert-sst2 --dataset glue --dataset-config sst2
  a file whose labels are called otherwise than the classes of the model
    optimum-cli rmtkd analyze --model ./my-bert --train-file train.csv --label-map bad=LABEL_0 good=LABEL_1

A file that is there already is replaced only if this command wrote it and nobody changed it since.
"""


class AnalyzeCommand(Command):
    @staticmethod
    def parse_args(parser):
        set_help(parser, DESCRIPTION, EPILOG, USAGE)
        parser.add_argument("--model", required=True, help="Hub name or local folder of a fine-tuned classifier.")
        parser.add_argument("--batch-size", type=int, default=32, help="Samples in one forward pass. Default: 32.")
        parser.add_argument("--threads", type=int, metavar="N", help=THREADS)
        parser.add_argument("--json", metavar="FILE", help="Also write the report as JSON.")
        parser.add_argument("--html", metavar="FILE", help="Also write it as one HTML page (needs matplotlib).")
        parser.add_argument("--plot", metavar="FILE", help="Also plot the spectra (needs matplotlib).")
        add_options(parser, DataArguments, "data", skip=UNUSED)
        add_recipe_options(parser)

    def execute(self) -> None:
        recipe: RMTKDConfig = recipe_from_options(self.args)
        data = from_options(DataArguments, self.args)
        if self.args.batch_size < 1:
            raise RMTKDError(f"--batch-size {self.args.batch_size}: expected a whole number of at least 1.")
        if self.args.threads is not None and self.args.threads < 1:
            raise RMTKDError(f"--threads {self.args.threads}: expected a whole number of at least 1.")
        check_files(data)
        targets = [path for path in (self.args.json, self.args.html, self.args.plot) if path]
        for path in targets:
            check_target(path)
        if len({Path(path).resolve() for path in targets}) < len(targets):
            raise RMTKDError(f"{', '.join(targets)}: the outputs would replace each other; give each its own file.")
        if self.args.html or self.args.plot:
            check_matplotlib()

        from ..spectra.edges import find_estimator
        from ..surgery import analyze
        from .task import load_task

        use_threads(self.args.threads)
        find_estimator(recipe.edge_estimator)
        # Nothing is validated here, so no row is held out for it.
        seen = dataclasses.replace(data, validation_file=data.train_file, max_eval_samples=1)
        task = load_task(self.args.model, seen, recipe.seed)
        loader = task.calibration_loader(self.args.batch_size, recipe.seed)
        report = analyze(task.model, loader, recipe)
        print(report.table())
        if self.args.json:
            report.to_json(self.args.json)
        if self.args.html:
            report.to_html(self.args.html)
        if self.args.plot:
            report.plot(self.args.plot)
