"""Reading a batch: its size, its padding, a part of it, and the way into a model."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn


__all__ = [
    "LABELS",
    "accepted_names",
    "batch_size",
    "decoder_mask",
    "described",
    "evaluating",
    "first_samples",
    "main_input",
    "model_inputs",
    "padding_mask",
    "run",
    "to_device",
    "unchunked",
    "with_tensors",
]

LABELS = ("labels", "label", "start_positions", "end_positions", "next_sentence_label", "return_loss")
INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")
SHARED = ("head_mask", "decoder_head_mask", "cross_attn_head_mask", "cache_position")  # first axis: no samples


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without labels: observing a model never needs them, but see `run`."""
    return {k: v for k, v in batch.items() if k not in LABELS}


def accepted_names(model: nn.Module) -> set[str]:
    """The keywords that a model's forward does something with.

    Those it names; where it hands on all others (`**kwargs`), also those that the models inside it name, and the
    common ones of transformers.
    """
    from transformers import PreTrainedModel
    from transformers.utils import TransformersKwargs

    parameters = inspect.signature(model.forward).parameters
    names = {name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        inner = [m for m in model.modules() if m is not model and isinstance(m, PreTrainedModel)]
        within = {name for m in inner for name in inspect.signature(m.forward).parameters}
        names |= {*within, *TransformersKwargs.__annotations__, "return_dict"}
        if getattr(model.config, "is_encoder_decoder", False):
            names |= {f"decoder_{name}" for name in within}
    return names - {"self", "args", "kwargs"}


def main_input(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """The tensor whose first axis counts the samples: token ids or pixels where there are some, else one of the most
    common length; None where no tensor has an axis."""
    for name in INPUTS:
        if isinstance(batch.get(name), torch.Tensor) and batch[name].dim():
            return batch[name]
    tensors = [v for k, v in batch.items() if isinstance(v, torch.Tensor) and v.dim() and k not in SHARED]
    if not tensors:
        return None
    size = Counter(len(t) for t in tensors).most_common(1)[0][0]
    return next(t for t in tensors if len(t) == size)


def batch_size(batch: Mapping[str, Any]) -> int:
    """Samples in a batch; 0 where it holds no tensor that has an axis."""
    found = main_input(batch)
    return 0 if found is None else len(found)


def first_samples(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The first `count` samples of a batch; the batch whole where something in it is neither shared by all samples nor
    one entry a sample (packed images, for example), so that a part would not be a batch."""
    size = batch_size(batch)
    if count >= size or not all(_divisible(k, v, size) for k, v in batch.items()):
        return dict(batch)
    return {k: v[:count] if _each(k, v, size) else v for k, v in batch.items()}


def _each(name: str, value: Any, size: int) -> bool:
    """Whether the first axis of a value counts the samples."""
    if isinstance(value, torch.Tensor):
        alike = name in SHARED or (name == "position_ids" and value.dim() < 2)
        return value.dim() > 0 and len(value) == size and not alike
    return isinstance(value, list) and len(value) == size


def _divisible(name: str, value: Any, size: int) -> bool:
    if _each(name, value, size) or name in SHARED or value is None or isinstance(value, (bool, int, float, str)):
        return True
    if isinstance(value, torch.Tensor):
        return not value.dim() or len(value) == 1 or name == "position_ids"
    return name in LABELS


def to_device(batch: Any, device: torch.device | str) -> Any:
    """All tensors of a batch on `device`, nested ones too; everything else as it is."""
    from accelerate.utils import recursively_apply

    return recursively_apply(lambda tensor: tensor.to(device), batch)


def with_tensors(value: Any) -> Any:
    """A value of a batch with arrays of numbers as tensors, nested ones too: numpy's float64, its default, in torch's
    default precision, and whole numbers that no embedding of torch takes (int16, uint16, ...) as int64."""
    from accelerate.utils import recursively_apply

    def converted(array: np.ndarray) -> torch.Tensor:
        if array.dtype.kind in "iu" and array.dtype not in (np.int32, np.int64):
            array = array.astype(np.int64)
        tensor = torch.from_numpy(np.ascontiguousarray(array).copy())
        return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor

    return recursively_apply(
        converted, value, test_type=lambda x: isinstance(x, np.ndarray) and x.dtype.kind in "biuf"
    )


def padding_mask(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Which positions hold real tokens, (rows, length) bool; None where no mask says so.

    A mask (batch, choices, length) of multiple choice is flattened, as the models do with their ids; masks that say
    who may look at whom, (batch, length, length) or four-dimensional, know nothing of padding.
    """
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 3):
        return None
    if mask.dim() == 3:
        if not isinstance(ids, torch.Tensor) or ids.shape != mask.shape:
            return None
        mask = mask.flatten(0, 1)
    return mask.bool()


def decoder_mask(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Which positions of an encoder-decoder's decoder hold real tokens, (batch, length) bool; None where nothing says
    so, and for other models."""
    given, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    if not getattr(model.config, "is_encoder_decoder", False):
        return None
    if isinstance(given, torch.Tensor) and given.dim() == 2:
        return given.bool()
    made = _makes_decoder_inputs(model, batch) and labels.dim() == 2 and not labels.is_floating_point()
    return labels != -100 if made else None


def run(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """One forward pass as observing wants it: the batch as it is but for its labels, no cache, named outputs, and the
    feed-forward layers over all positions at once.

    An encoder-decoder whose batch has labels but nothing for its decoder gets the labels: it shifts them itself, as it
    does in training.
    """
    inputs = model_inputs(batch)
    if _makes_decoder_inputs(model, batch):
        inputs["labels"] = batch["labels"]
    names = inspect.signature(model.forward).parameters
    for name, value in (("use_cache", False), ("return_dict", True)):
        inputs.pop(name, None)
        if name in names:
            inputs[name] = value
    with _configured(model, use_cache=False, return_dict=True), unchunked(model):
        return model(**inputs)


def _makes_decoder_inputs(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    labels = batch.get("labels")
    given = [k for k, v in batch.items() if k.startswith("decoder_input") and v is not None]
    sequences = isinstance(labels, torch.Tensor) and labels.dim() > 1  # one label a sample is a class
    return sequences and not given and bool(getattr(model.config, "is_encoder_decoder", False))


@contextlib.contextmanager
def _configured(model: nn.Module, **values: bool) -> Iterator[None]:
    """Fields of all configs inside a model, where a config has them, for the time of this context.

    A keyword would not do: heads hand it on to the backbone or refuse it, each as it likes.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    changed = []
    for config in configs.values():
        for name, value in values.items():
            if getattr(config, name, value) is not value:
                changed.append((config, name, getattr(config, name)))
                setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, value in changed:
            setattr(config, name, value)


@contextlib.contextmanager
def unchunked(model: nn.Module) -> Iterator[None]:
    """Feed-forward layers run on all positions at once, where the config has them run chunk by chunk to save memory:
    the results are the same, but hooks would see pieces of sequences, which no mask fits."""
    chunked = [(m, m.chunk_size_feed_forward) for m in model.modules() if getattr(m, "chunk_size_feed_forward", 0)]
    for module, _ in chunked:
        module.chunk_size_feed_forward = 0
    try:
        yield
    finally:
        for module, size in chunked:
            module.chunk_size_feed_forward = size


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and nothing compiled (`module.compile()`), for no hook would see inside; every module is back in its
    own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    model.eval()
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for module, call in compiled.items():
            module._compiled_call_impl = call


def described(value: Any) -> str:
    """A value of a batch in a few words: dtype and shape of tensors, kind and length of others."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        kind = "" if isinstance(value, torch.Tensor) else f"{type(value).__name__} "
        return f"{kind}{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        first = f" ({described(value[0])}{', ...' if len(value) > 1 else ''})" if len(value) else ""
        return f"a {type(value).__name__} of {len(value)}{first}"
    if isinstance(value, (bool, int, float, type(None))):
        return repr(value)
    return f"a {type(value).__name__}"
