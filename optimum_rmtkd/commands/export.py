"""`optimum-cli rmtkd export`: a reduced model for readers that know nothing of this package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .base import Command, set_help
from .output import OVERWRITE, writing_beside


if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

__all__ = ["ExportCommand"]

USAGE = "optimum-cli rmtkd export OUT --format native|onnx -o DIR [options]"

DESCRIPTION = """\
Write a reduced model in a format that needs nothing of this package.

  native  a plain checkpoint of the base architecture (BertFor..., ViTFor...), where the widths are uniform and its
          config can express them. --pad fills narrower layers up with zeros: the outputs stay, size and time grow;
          the cost is printed. Decoders in two factors, and convolutional networks
          other than ResNet, have no plain form.
  onnx    one ONNX file, batch and length free, in float32, compared with PyTorch by onnxruntime on several shapes.

Either way the outputs are compared before anything is kept.
"""

EPILOG = """\
examples:
  optimum-cli rmtkd export ./my-bert-small --format onnx -o ./my-bert-onnx
  optimum-cli rmtkd export ./my-bert-small --format native --pad -o ./my-bert-plain

A reduction that comes out plain without padding has equal widths in all layers, a whole table, and heads that divide
the stream:  compress --allocation uniform --sites hidden intermediate attention_qk attention_vo ...
"""


class ExportCommand(Command):
    @staticmethod
    def parse_args(parser):
        set_help(parser, DESCRIPTION, EPILOG, USAGE)
        parser.add_argument("model", metavar="OUT", help="Folder or Hub name of a reduced model.")
        parser.add_argument("--format", required=True, choices=tuple(FORMATS), help="What to write.")
        parser.add_argument("-o", "--output", required=True, metavar="DIR", help="Folder to write to.")
        parser.add_argument("--pad", action="store_true", help="native: fill narrower layers up with zeros.")
        parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)

    def execute(self) -> None:
        from ..hub.loading import load_model, load_processors

        inputs = [("the model", self.args.model)]
        with writing_beside(self.args.output, self.args.overwrite, inputs) as folder:
            model = load_model(self.args.model)
            said = FORMATS[self.args.format](model, folder, self.args.pad)
            for processor in load_processors(self.args.model):
                processor.save_pretrained(folder)
        print(f"{said}\nsaved to {self.args.output}")


def _native(model: PreTrainedModel, folder: Path, pad: bool) -> str:
    from ..hub.native import to_native

    found = to_native(model, pad)
    found.model.save_pretrained(folder)
    before, after = found.parameters_before, found.parameters_after
    lines = [f"{type(found.model).__name__}, outputs differ by {found.difference:.2g} of the largest at most"]
    if found.padded:
        lines.append(
            f"{len(found.padded)} sites were filled up with zeros or multiplied out: {before:,} -> {after:,} "
            f"parameters ({after / before - 1:+.1%}); the matrices, and the time they take, grow alike"
        )
    return "\n".join(lines)


def _onnx(model: PreTrainedModel, folder: Path, pad: bool) -> str:
    from ..errors import RMTKDError
    from ..hub.onnx import to_onnx

    if pad:
        raise RMTKDError("--pad belongs to --format native: ONNX takes any width. Leave it out.")
    difference = to_onnx(model, folder)
    model.config.save_pretrained(folder)
    return f"onnxruntime's outputs differ from PyTorch's by {difference:.2g} at most (allowed: 1e-4)"


FORMATS: dict[str, Callable[[PreTrainedModel, Path, bool], str]] = {"native": _native, "onnx": _onnx}
