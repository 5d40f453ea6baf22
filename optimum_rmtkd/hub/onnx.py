"""A model as ONNX, dynamic in batch and length, checked with onnxruntime before it counts as written."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RMTKDError


if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["to_onnx"]

FILE = "model.onnx"
TOLERANCE = 1e-4  # largest difference of the outputs to PyTorch's, in fp32
SHAPES = ((1, 5), (3, 24), (5, 16))  # (batch, length) of the check; none of them is traced


def to_onnx(model: PreTrainedModel, folder: str | Path) -> float:
    """Write `model.onnx` (and `model.onnx.data`) into `folder`.

    The inputs are those that `example_inputs` gives, the outputs the tensors that the model returns by default; batch
    and length are free. Weights are fp32. Decoders are written without a cache of keys and values.

    Returns:
        The largest difference to PyTorch's outputs over several shapes, in units of the output.

    Raises:
        RMTKDError: onnx, onnxscript or onnxruntime (the extra `onnx`) is missing, a file lies there already, the model
            cannot be traced, or the outputs differ by more than 1e-4; then no file is left.
    """
    import torch

    _check_installed()
    target = Path(folder) / FILE
    for path in (target, target.with_name(FILE + ".data")):
        if os.path.lexists(path):
            raise RMTKDError(f"{path} exists, and an export replaces no file: choose another folder, or move it away.")
    model = copy.deepcopy(model).float().eval()
    for part in model.modules():  # a cache of keys and values is no tensor that a graph could return
        if getattr(getattr(part, "config", None), "use_cache", False):
            part.config.use_cache = False
    from ..batches.examples import example_inputs

    inputs = example_inputs(model, batch=2)
    names = _output_names(model, inputs)
    try:
        traced = torch.export.export(model, (), inputs, dynamic_shapes=_dynamic(model, inputs), strict=False)
        program = torch.onnx.export(traced, input_names=list(inputs), output_names=names, dynamo=True, verbose=False)
    except (torch.onnx.OnnxExporterError, torch._dynamo.exc.UserError) as error:
        raise RMTKDError(f"{type(model).__name__} cannot be exported to ONNX: {error}") from error
    with tempfile.TemporaryDirectory(prefix=".onnx.", dir=folder) as beside:
        # protobuf holds 2 GB at most
        program.save(Path(beside) / FILE, external_data=model.num_parameters() * 4 > 1.5e9)
        difference = max(_difference(model, names, Path(beside) / FILE, *shape) for shape in SHAPES)
        if not difference <= TOLERANCE:
            raise RMTKDError(
                f"onnxruntime's outputs differ from PyTorch's by {difference:.2g}, more than {TOLERANCE:g}: the "
                "export is not to be trusted and nothing is kept. Try other versions of torch, onnxscript and "
                "onnxruntime."
            )
        for written in sorted(Path(beside).iterdir(), reverse=True):  # the weights before the graph that names them
            written.rename(target.with_name(written.name))
    return difference


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise RMTKDError(f'ONNX export needs {", ".join(missing)}: pip install "optimum-rmtkd[onnx]".')


def _output_names(model: PreTrainedModel, inputs: dict) -> list[str]:
    import torch

    with torch.no_grad():
        found = model(**inputs)
    return [name for name, value in found.items() if isinstance(value, torch.Tensor)]


def _dynamic(model: PreTrainedModel, inputs: dict) -> dict[str, dict]:
    from torch.export import Dim

    batch = Dim("batch")
    if not any(name.endswith("input_ids") for name in inputs):
        return {name: {0: batch} for name in inputs}
    length, behind = Dim("length", max=_longest(model)), Dim("decoder_length", max=_longest(model))
    rows = {name: {1: behind if name.startswith("decoder") else length} for name in inputs}
    return {name: {0: batch} | ({} if inputs[name].is_floating_point() else rows[name]) for name in inputs}


def _longest(model: PreTrainedModel) -> int:
    """Tokens of the longest text. Positions that start behind the padding token's (RoBERTa) leave fewer of them."""
    from torch import nn

    tables = [
        m for name, m in model.named_modules() if name.endswith("position_embeddings") and isinstance(m, nn.Embedding)
    ]
    from ..batches.examples import stating

    name = "max_position_embeddings"
    rows = getattr(stating(model.config, name), name, None) or 4096
    return rows - max((table.padding_idx + 1 for table in tables if table.padding_idx is not None), default=0)


def _difference(model: PreTrainedModel, names: list[str], path: Path, batch: int, length: int) -> float:
    import onnxruntime
    import torch

    from ..batches.examples import example_inputs

    inputs = example_inputs(model, batch, min(length, _longest(model)), seed=batch)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {item.name: inputs[item.name].cpu().numpy() for item in session.get_inputs()}
    with torch.no_grad():
        outputs = model(**{name: value.to(model.device) for name, value in inputs.items()})
    found = session.run(None, feed)
    pairs = zip(names, found, strict=True)
    return max(float((outputs[name].cpu() - torch.from_numpy(array)).abs().max()) for name, array in pairs)
