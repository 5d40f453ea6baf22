"""From a folder to a folder: a cut that never holds a model in memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RMTKDError, UnsupportedArchitectureError
from .loading import check_plain, load_config, load_model, load_processors
from .saving import saving_into


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config import RMTKDConfig

__all__ = ["narrow_streamed"]


def narrow_streamed(
    source: str | Path,
    out: str | Path,
    dataloader: Iterable,
    config: RMTKDConfig | None = None,
    *,
    scratch: str | Path | None = None,
    max_shard_size: str | int = "1GB",
    progress: bool = True,
) -> PreTrainedModel:
    """`narrow` for a model that memory has no room for, from the folder it lies in to a new one: same widths, same
    weights, on the host.

    What has to be in memory at a time is one block of the model, what its layers compute of one batch, the logits of
    one batch twice, and the sums of one site (`optimum-cli rmtkd plan` tells how much that is); neither the number of
    blocks nor that of samples changes it. Everything else lies in files: the model in its own format and once more in
    fp32, the narrow one in fp32, moments, and the stream of the calibration data between two blocks. Backward passes
    compute each block twice.

    Args:
        source: folder or name on the Hub, of weights as safetensors; never changed.
        out: folder for the narrow model, in shards; written beside it and renamed when all is done. Tokenizer,
            image processor and feature extractor come along.
        dataloader, config, progress: as for `narrow`; no `tolerance`, which tries several sizes.
        scratch: folder on a disk with room for what is kept in files. Default: where `out` will lie.
        max_shard_size: of one file of weights; each is in memory once while it is written.

    Returns:
        the narrow model as it was saved, its weights mapped from the files in `out`.

    Raises:
        RMTKDError: `out` is `source`, or a file; quantised weights; a recipe with `tolerance`, or
            with `shape="native"`.
        DiskFullError: no room in `scratch` or `out`.
        UnsupportedArchitectureError, CalibrationError, BudgetError, NoTargetError: as for `narrow`.
    """
    from ..models import Scratch, in_files, released
    from ..surgery import narrow

    out = Path(out)
    _check(source, out, config)
    check_plain(source, load_config(source))
    processors = load_processors(source)
    files = Scratch(_nearest(out) if scratch is None else scratch)
    model = in_files(load_model(source), files)
    with released(files, [model.get_submodule(path) for path in _blocks(model)]):
        student = narrow(model, dataloader, config, progress=progress, scratch=files)
    del model
    with saving_into(out) as beside:
        student.save_pretrained(beside, max_shard_size=max_shard_size)
        for processor in processors:
            processor.save_pretrained(beside)
    return load_model(out)


def _blocks(model: PreTrainedModel) -> list[str]:
    """Paths of the modules at which memory is given back; of a model of several streams those of all its lists."""
    from ..reparameterization.targets import block_lists
    from ..surgery import block_paths

    try:
        return list(block_paths(model))
    except UnsupportedArchitectureError:  # narrow says so, if it is one
        return [path for paths in block_lists(model).values() for path in paths]


def _check(source: str | Path, out: Path, config: RMTKDConfig | None) -> None:
    from ..surgery.checks import check_scratch

    if out.is_file():
        raise RMTKDError(f"{out} is a file: expected a folder for the narrow model, there or not.")
    if out.is_dir() and Path(source).is_dir() and out.samefile(source):
        raise RMTKDError(f"{out} holds the model that is to be narrowed: choose another folder.")
    if config is not None:
        check_scratch(config)
    if config is not None and config.tolerance is not None:
        raise RMTKDError(
            "A recipe with tolerance tries several sizes, each whole: give a size (target_reduction), or load the "
            "model and call narrow(evaluate=..., scratch=...)."
        )


def _nearest(folder: Path) -> Path:
    """The folder itself, or the first one above it that is there."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())
