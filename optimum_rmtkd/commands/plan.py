"""`optimum-cli rmtkd plan`: what a cut needs in memory and work, told from the config alone."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from ..config import RMTKDConfig
from ..errors import RMTKDError
from .base import Command, set_help
from .options import add_recipe_options, recipe_from_options
from .output import check_target


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..surgery.needs import Phase, Shape

__all__ = ["PlanCommand"]

USAGE = "optimum-cli rmtkd plan --model MODEL [--target-reduction X] [options]"

DESCRIPTION = """\
Tell what each phase of a cut (calibration, planning, cutting, refit), the distillation after it and the saving need in
memory and FLOPs, which part is the largest, and whether it fits. The config is read and nothing else: no weights are
loaded or downloaded, no data is read.
"""

EPILOG = """\
examples:
  does it fit this machine?
    optimum-cli rmtkd plan --model meta-llama/Meta-Llama-3-8B --target-reduction 0.3
  does it fit another one, on its accelerator?
    optimum-cli rmtkd plan --model ./my-llama --target-reduction 0.3 --host-memory 64GB --device-memory 80GB
  with less in one batch, and for another tool
    optimum-cli rmtkd plan --model ./my-bert --target-reduction 0.5 --batch-size 8 --length 128 --json needs.json

What other programs, Python and the libraries hold is not in it.
"""

SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(GB|GiB|MB|MiB)", re.IGNORECASE)
UNITS = {"gb": 10**9, "gib": 2**30, "mb": 10**6, "mib": 2**20}
SPARE = 10**9  # bytes for Python and the libraries
FORMATS = ("float32", "bfloat16", "float16")


class PlanCommand(Command):
    @staticmethod
    def parse_args(parser):
        set_help(parser, DESCRIPTION, EPILOG, USAGE)
        parser.add_argument("--model", required=True, help="Hub name or local folder; only config.json is read.")
        parser.add_argument("--batch-size", type=int, default=32, help="Samples in one forward pass. Default: 32.")
        parser.add_argument(
            "--length", type=int, help="Tokens of a sample. Default: 512, or what the model takes at most."
        )
        parser.add_argument(
            "--train-samples",
            type=int,
            default=0,
            help="Samples of the distillation, all epochs together. Default: 0.",
        )
        parser.add_argument("--dtype", choices=FORMATS, help="Of the weights. Default: what the config says.")
        parser.add_argument("--device-memory", metavar="SIZE", help="Of the accelerator, for example 80GB.")
        parser.add_argument("--host-memory", metavar="SIZE", help="For example 64GB. Default: that of this machine.")
        parser.add_argument("--json", metavar="FILE", help="Also write it as JSON.")
        add_recipe_options(parser)

    def execute(self) -> None:
        recipe = recipe_from_options(self.args)
        if other := [name for name in recipe.targets if name != "target_reduction"]:
            raise RMTKDError(
                f"--{other[0].replace('_', '-')}: what a cut needs is told for a size. Give --target-reduction."
            )
        if recipe.target_reduction is None:
            recipe = recipe.replace(target_reduction=0.5)
        for name, least in (("batch_size", 1), ("length", 1), ("train_samples", 0)):
            given = getattr(self.args, name)
            if given is not None and given < least:
                raise RMTKDError(f"--{name.replace('_', '-')} {given}: expected a whole number of at least {least}.")
        device, host = (_bytes(getattr(self.args, name), name) for name in ("device_memory", "host_memory"))
        if self.args.json:
            check_target(self.args.json)

        from ..files import UNSIGNED, write_signed
        from ..surgery.needs import phases
        from ..surgery.outlook import shape_of

        model = _without_weights(self.args.model, self.args.dtype)
        batch = _batch(model, self.args.batch_size, self.args.length)
        shape = shape_of(model, batch, recipe, self.args.train_samples)
        room = device if device is not None else (host if host is not None else _of_this_machine())
        where = "device" if device is not None else "host"
        needs, files = phases(shape), phases(shape, streamed=True)
        print("\n".join(_report(self.args.model, model, shape, recipe, needs, room, where)))
        host_room = room if where == "host" else host  # files are mapped into the memory of the host
        schedule, words = _schedule(needs, files, room, host_room)
        print(words)
        if self.args.json:
            record = _record(self.args.model, shape, recipe, needs, room, where)
            record |= {"schedule": schedule, "streamed": _told(files, host_room)}
            write_signed(self.args.json, json.dumps(record | {"written_by": UNSIGNED}, indent=1) + "\n")


def _bytes(text: str | None, name: str) -> int | None:
    if text is None:
        return None
    found = SIZE.fullmatch(text.strip())
    if found is None:
        raise RMTKDError(f"--{name.replace('_', '-')} {text!r}: expected a size with its unit, such as 80GB or 512MB.")
    return round(float(found[1]) * UNITS[found[2].lower()])


def _of_this_machine() -> int | None:
    """Bytes of memory of this machine; None where the system does not tell."""
    import os

    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _without_weights(name: str, dtype: str | None) -> PreTrainedModel:
    """The class that the config names, on the meta device."""
    import torch

    from ..hub.loading import check_plain, class_of, load_config, refusals_named

    config = load_config(name)
    check_plain(name, config)
    kind = getattr(torch, dtype) if dtype else (config.dtype or torch.float32)
    with refusals_named(f"Cannot build the model of '{name}'"), torch.device("meta"):
        return class_of(name, config)(config).to(kind).eval()


def _batch(model: PreTrainedModel, size: int, length: int | None) -> dict[str, Any]:
    """A batch without values.

    Raises:
        RMTKDError: texts longer than the model takes; a model whose inputs are not known.
    """
    import torch

    from ..batches.examples import example_inputs, longest_text

    inputs = example_inputs(model, 1, 1)
    if any(name.endswith("input_ids") for name in inputs):
        longest = longest_text(model)
        if length is not None and longest is not None and length > longest:
            raise RMTKDError(f"--length {length}: {type(model).__name__} takes {longest} tokens at most.")
        length = length or min(512, longest or 512)
    wanted = {name: value for name, value in inputs.items() if name not in ("attention_mask", "token_type_ids")}
    shapes = {
        name: (size, *(value.shape[1:] if value.is_floating_point() else (length,))) for name, value in wanted.items()
    }
    types = {name: model.dtype if value.is_floating_point() else torch.long for name, value in wanted.items()}
    return {name: torch.empty(shape, device="meta", dtype=types[name]) for name, shape in shapes.items()}


def _report(
    name: str,
    model: PreTrainedModel,
    shape: Shape,
    recipe: RMTKDConfig,
    needs: list[Phase],
    room: int | None,
    where: str,
) -> list[str]:
    lines = [
        f"{name}: {type(model).__name__}, {shape.parameters:,} parameters of {8 * shape.element} bits, to be cut by "
        f"{recipe.target_reduction:.0%}",
        f"calibration: {shape.samples} samples of {shape.length} tokens in batches of {shape.batch}; "
        + ("no training samples given" if not shape.distilled else f"training on {shape.distilled:,} samples"),
        "",
        f"{'phase':13} {'memory GB':>10} {'TFLOP':>12}  {'largest part':44} fits",
    ]
    for phase in needs:
        largest = f"{phase.largest}, {phase.parts[phase.largest] / 1e9:.2f} GB"
        fits = "" if room is None else ("yes" if phase.bytes + SPARE <= room else "NO")
        lines.append(f"{phase.name:13} {phase.bytes / 1e9:10.2f} {phase.flops / 1e12:12.1f}  {largest:44} {fits}")
    lines.append("")
    if room is None:
        return [*lines, "This system does not tell how much memory it has: give --host-memory."]
    beyond = [phase for phase in needs if phase.bytes + SPARE > room]
    lines.append(
        f"{room / 1e9:.1f} GB of {where} memory, of which {SPARE / 1e9:.0f} GB are left to Python and its libraries: "
        + ("everything fits." if not beyond else f"{', '.join(p.name for p in beyond)} would not fit.")
    )
    return lines + [f"  {advice}" for advice in dict.fromkeys(_advice(phase, shape) for phase in beyond)]


def _schedule(needs: list[Phase], files: list[Phase], room: int | None, host: int | None) -> tuple[str | None, str]:
    """("memory", "streamed" or None where neither fits, what is said of it)"""
    most = max(files, key=lambda phase: phase.bytes)
    says = f"with models and moments in files (narrow_streamed, on the host): {most.bytes / 1e9:.2f} GB ({most.name})"
    cut = [phase for phase in needs if phase.name not in ("distillation", "saving")]
    if room is None or all(phase.bytes + SPARE <= room for phase in cut):
        return "memory", f"Schedule of the cut: in memory. {says[0].upper()}{says[1:]}."
    if host is not None and most.bytes + SPARE <= host:
        return "streamed", f"Schedule of the cut: streamed. {says[0].upper()}{says[1:]}."
    return None, f"Schedule of the cut: none fits. {says[0].upper()}{says[1:]}."


def _advice(phase: Phase, shape: Shape) -> str:
    """What to change where a phase does not fit, by what takes the most of it."""
    cures = {
        "one batch, forward and backward": f"fewer samples at once (--batch-size under {shape.batch}), or shorter "
        "ones (--length)",
        "moments": "fewer sites, for example --sites without intermediate: their moments grow with the square of "
        "their widths",
        "projections": "fewer sites at a time: cut by kind of site, one after the other",
        "directions": "--sites without hidden, or a machine with more memory: the directions of the stream are found "
        "from all its moments at once",
        "factors that price neurons": "--importance variance, which prices without factors, or --sites without "
        "intermediate",
        "regression of the largest group": "--no-refit, or --sites without intermediate",
        "gradients and optimizer": "adapters (LoRA) on the narrow model, an optimizer of fewer bytes a weight, or "
        "several devices",
    }
    cure = cures.get(phase.largest, "a machine with more memory, or weights of fewer bits (--dtype bfloat16)")
    return f"{phase.name} ({phase.bytes / 1e9:.1f} GB, mostly {phase.largest}): {cure}."


def _record(
    name: str, shape: Shape, recipe: RMTKDConfig, needs: list[Phase], room: int | None, where: str
) -> dict[str, Any]:
    return {
        "model": name,
        "parameters": shape.parameters,
        "recipe": recipe.to_dict(),
        "samples": shape.samples,
        "length": shape.length,
        "batch_size": shape.batch,
        "memory": {"where": where, "bytes": room},
        "phases": _told(needs, room),
    }


def _told(needs: list[Phase], room: int | None) -> list[dict[str, Any]]:
    return [
        {
            "name": p.name,
            "bytes": p.bytes,
            "flops": p.flops,
            "parts": dict(p.parts),
            "largest": p.largest,
            "fits": None if room is None else p.bytes + SPARE <= room,
        }
        for p in needs
    ]
