"""`optimum-cli rmtkd bench`: a reduced model against the one it was made from."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RMTKDError
from ..files import UNSIGNED, write_signed
from ..folders import add_to_record
from ..validation import Count, check_fields
from .base import Command, set_help
from .generation import cache_bytes, check_bench_texts, compare_decoding, perplexities, writes
from .measuring import NOT_MEASURABLE, count_flops, energy_meter, peak_memory
from .options import add_options, from_options, option
from .output import check_target, format_table, weight_bytes
from .threads import THREADS, use_threads


if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["BenchCommand", "BenchOptions", "compare", "timings", "write_bench"]

REPEATS = 12  # pairs of blocks

USAGE = "optimum-cli rmtkd bench OUT --against BASE [options]"

DESCRIPTION = """\
Compare a reduced model with the one it was made from, in one run on this machine: parameters, bytes on disk, FLOPs,
latency at batch 1, throughput of larger batches, peak memory, and energy with --energy; of causal language models also
tokens a second of reading a prompt and of decoding behind it, bytes of the cache, and perplexity with --texts. Both
models are timed in turn, in short blocks, after a warm-up; ratios are before / after, with the quartiles over all
pairs of blocks in brackets.
"""

EPILOG = """\
examples:
  optimum-cli rmtkd bench ./my-bert-small --against ./my-bert
  optimum-cli rmtkd bench ./my-bert-small --against ./my-bert --batch-sizes 1 8 64 --lengths 32 128 --threads 4
  optimum-cli rmtkd bench ./my-bert-small --against ./my-bert --energy
  optimum-cli rmtkd bench ./llama-small --against ./llama --texts wiki.txt --window 1024

The figures go into OUT/rmtkd_bench.json and into the model card, where OUT has one; a file or a card that somebody
else wrote or changed stays. What this machine has no counter for is "not measurable here".
"""


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, and on what."""

    batch_sizes: list[Count] | None = option(None, "Batch sizes. None: 1 and 32.")
    lengths: list[Count] | None = option(
        None, "Tokens of a text. None: 128, or what the model takes at most. Images have one size."
    )
    repeats: Count = option(REPEATS, "Pairs of blocks of four passes.")
    threads: Count | None = option(None, THREADS)
    dtype: str = option("float32", "Number format of the weights.", ("float32", "bfloat16", "float16"))
    device: str = option("auto", "auto: the GPU where there is one.", ("auto", "cpu", "cuda"))
    energy: bool = option(False, "Also measure energy: about 20 seconds for each batch size and length.")

    texts: list[str] | None = option(
        None, "Files of texts (txt, csv, json, jsonl, parquet) for the perplexity of causal language models."
    )
    text_column: list[str] | None = option(None, "Columns of texts in them. None: those that hold strings.")
    window: Count | None = option(None, "Tokens that are seen at once for it. None: 512, or what the model takes.")
    text_tokens: Count = option(65536, "Tokens of the texts that are read for it.")

    def __post_init__(self):
        check_fields(self, as_options=True)


class BenchCommand(Command):
    @staticmethod
    def parse_args(parser):
        set_help(parser, DESCRIPTION, EPILOG, USAGE)
        parser.add_argument("model", metavar="OUT", help="Folder or Hub name of the reduced model.")
        parser.add_argument("--against", required=True, metavar="BASE", help="Folder or Hub name of the uncut model.")
        parser.add_argument("--json", metavar="FILE", help="Where the figures go. Default: rmtkd_bench.json in OUT.")
        add_options(parser, BenchOptions, "measurement")

    def execute(self) -> None:
        from ..hub import write_card
        from ..hub.card import CARD, card_files, is_ours
        from ..hub.run import BENCH

        options = from_options(BenchOptions, self.args)
        folder = Path(self.args.model)
        target = Path(self.args.json) if self.args.json else folder / BENCH if folder.is_dir() else None
        if target is not None:
            check_target(target)
        found = compare(self.args.against, self.args.model, options)
        print(f"{found['setting']}\n")
        print(format_table(("", "before", "after", "change"), found["rows"]))
        if target is not None:
            write_bench(target, found)
            if self.args.json is None:
                add_to_record(folder, [BENCH])
            print(f"\nwritten to {target}")
        if self.args.json or not (folder / CARD).is_file():
            return
        if is_ours(folder):
            write_card(folder)
            add_to_record(folder, card_files(folder))
            print(f"and into {folder / CARD}")
        else:
            print(f"not into {folder / CARD}, which somebody else wrote or changed")


def write_bench(target: Path, found: dict[str, Any]) -> None:
    """What `compare` or `timings` found, signed; raises RMTKDError where somebody else's file lies."""
    write_signed(target, json.dumps(found | {"written_by": UNSIGNED}, indent=1) + "\n")


def compare(before: str, after: str, options: BenchOptions) -> dict[str, Any]:
    """All figures of both models.

    Returns:
        {"setting": sentence, "rows": [(what, before, after, change)], "values": [{"what", "unit", "before", "after",
        ...}], "options": of the measurement}.
    """
    import torch
    from tqdm.auto import tqdm

    from ..batches.examples import unpadded_inputs
    from ..hub.loading import load_model
    from ..surgery import count_parameters
    from .task import weights_folder

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RMTKDError("--device cuda: torch sees no GPU; expected cpu.")
    use_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    models = [load_model(name, dtype).to(device) for name in (before, after)]
    _check_comparable(*models, before, after)
    check_bench_texts(options.texts, options.text_column, models)
    shapes = _shapes(models[0], options)
    values = [
        _value("parameters", "", *(count_parameters(model) for model in models)),
        _value("bytes on disk", "", *(weight_bytes(weights_folder(name)) for name in (before, after))),
    ]
    if options.texts is not None:
        asked = options.texts, options.text_column, options.window, options.text_tokens
        values.append(_value("perplexity", "", *perplexities(models, before, *asked)))
    meter = energy_meter(device) if options.energy else None
    for batch, length in tqdm(shapes, desc="Measuring", unit="shape", leave=False, disable=None):
        inputs = unpadded_inputs(models[0], batch, length)
        where = _label(batch, length)
        values.append(_value(f"FLOPs, {where}", "FLOP", *(count_flops(model, inputs) for model in models)))
        values.append(_timed(models, inputs, batch, where, options.repeats))
        if all(map(writes, models)):
            values += _written(models, inputs, batch, length, where, options.repeats)
        peaks = (peak_memory(name, batch, length or 1, options.dtype, device) for name in (before, after))
        values.append(_value(f"peak memory, {where}", "B", *peaks))
        if options.energy:
            joules = (None, None) if meter is None else [meter(_pass_of(model, inputs)) for model in models]
            values.append(_value(f"energy, {where}", "J", *joules))
    return {
        "version": 1,
        "setting": _setting(device, options.dtype, options.repeats) + _other_base(*models),
        "rows": [_row(value) for value in values],
        "values": values,
        "options": asdict(options),
    }


def _check_comparable(dense: PreTrainedModel, small: PreTrainedModel, before: str, after: str) -> None:
    if dense.main_input_name != small.main_input_name:
        raise RMTKDError(
            f"'{before}' reads {dense.main_input_name}, '{after}' reads {small.main_input_name}: expected the model "
            "that the reduced one was made from."
        )
    for name in ("vocab_size", "num_channels", "image_size"):
        ours, theirs = (getattr(model.config, name, None) for model in (dense, small))
        if ours != theirs:
            raise RMTKDError(
                f"{name} is {ours} in '{before}' and {theirs} in '{after}', so the two cannot read the same inputs: "
                "expected the model that the reduced one was made from."
            )


def _other_base(dense: PreTrainedModel, small: PreTrainedModel) -> str:
    """What the reader of the figures must know where the model they are ratios to is not the uncut one."""
    from ..surgery import count_parameters, uncut_parameters

    uncut, found = uncut_parameters(small), count_parameters(dense)
    if uncut in (found, count_parameters(small)):  # nothing is known of another one
        return ""
    return f"; against a model of {found:,} parameters, not the uncut one of {uncut:,}"


def timings(models: tuple[PreTrainedModel, PreTrainedModel], inputs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Latency alone, of two models (before, after) on the CPU in fp32, at each of `inputs`, as `compare` has it."""
    from ..models.timing import compare_latency

    values = []
    for each in inputs:
        where = f"batch {len(next(iter(each.values())))}"
        found = compare_latency(*models, each)
        spread = {"ratio": found.ratio, "low": found.low, "high": found.high}
        values.append(_value(f"latency, {where}", "s", found.before, found.after) | spread)
    setting = _setting("cpu", "float32", REPEATS)
    return {"version": 1, "setting": setting, "rows": [_row(value) for value in values], "values": values}


def _shapes(model: PreTrainedModel, options: BenchOptions) -> list[tuple[int, int | None]]:
    from ..batches.examples import longest_text

    batches = options.batch_sizes or [1, 32]
    if model.main_input_name == "pixel_values":
        return [(batch, None) for batch in batches]
    longest = longest_text(model) or 128
    wrong = [length for length in options.lengths or () if length > longest]
    if wrong:
        raise RMTKDError(f"--lengths {wrong[0]}: the model takes at most {longest} tokens.")
    return [(batch, length) for length in options.lengths or [min(128, longest)] for batch in batches]


def _label(batch: int, length: int | None) -> str:
    return f"batch {batch}" if length is None else f"batch {batch}, length {length}"


def _timed(models: list, inputs: dict, batch: int, where: str, repeats: int) -> dict[str, Any]:
    from ..models.timing import compare_latency

    found = compare_latency(*models, inputs, repeats=repeats)
    spread = {"ratio": found.ratio, "low": found.low, "high": found.high}
    if batch == 1:
        return _value(f"latency, {where}", "s", found.before, found.after) | spread
    return _value(f"throughput, {where}", "/s", batch / found.before, batch / found.after) | spread


def _written(models: list, inputs: dict, batch: int, length: int, where: str, repeats: int) -> list[dict[str, Any]]:
    """Reading a prompt, decoding behind it, and what is kept of it."""
    from ..distillation.signatures import named_inputs
    from ..models.timing import compare_latency

    short = {} if any("logits_to_keep" not in named_inputs(m) for m in models) else {"logits_to_keep": 1}
    read = compare_latency(*models, inputs | short | {"use_cache": True}, repeats=repeats)
    decoded = compare_decoding(*models, inputs, repeats)
    rows = []
    for what, found, tokens in (("prefill", read, batch * length), ("decoding", decoded, batch)):
        spread = {"ratio": found.ratio, "low": found.low, "high": found.high}
        rows.append(_value(f"{what}, {where}", "tokens/s", tokens / found.before, tokens / found.after) | spread)
    return [*rows, _value(f"cache, {where}", "B", *(cache_bytes(model, inputs) for model in models))]


def _pass_of(model: PreTrainedModel, inputs: dict) -> Callable[[], None]:
    import torch

    def run() -> None:
        with torch.inference_mode():
            model(**inputs)

    return run


def _value(what: str, unit: str, before: float | None, after: float | None) -> dict[str, Any]:
    return {"what": what, "unit": unit, "before": before, "after": after}


def _row(value: dict[str, Any]) -> tuple[str, str, str, str]:
    before, after = value["before"], value["after"]
    if before is None or after is None:
        return value["what"], NOT_MEASURABLE, NOT_MEASURABLE, "-"
    shown = (_shown(number, value["unit"]) for number in (before, after))
    if "ratio" in value:
        change = f"{value['ratio']:.2f}x ({value['low']:.2f} to {value['high']:.2f})"
    else:
        change = f"{100 * (after / before - 1):+.1f} %" if before else "-"
    return value["what"], *shown, change


def _shown(number: float, unit: str) -> str:
    if unit == "s":
        return f"{1e3 * number:.2f} ms"
    if unit in ("/s", "tokens/s"):
        return f"{number:,.1f} {unit}"
    if unit == "J":
        return f"{number:.3g} J"
    if unit == "B":
        return f"{number / 2**20:,.1f} MiB"
    if unit == "FLOP":
        return f"{number / 1e9:,.3f} G"
    return f"{number:,}" if isinstance(number, int) else f"{number:.4g}"


def _setting(device: str, dtype: str, repeats: int) -> str:
    import torch
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    threads = "" if device == "cuda" else f", {(n := torch.get_num_threads())} thread{'s' * (n > 1)}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{device} ({name}){threads}, {dtype}, {repeats} pairs of blocks, warm, interleaved; {versions}"
