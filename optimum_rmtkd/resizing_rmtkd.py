"""Layers of a dense skeleton are made narrower, and see the config and the numbers that their code needs.

Lies beside `modeling_rmtkd.py` in every saved repository, and imports torch and transformers alone.
"""

import inspect
from types import CodeType, FunctionType

from torch import nn
from transformers.pytorch_utils import Conv1D

from .layers_rmtkd import LowRankConv2d, LowRankEmbedding, LowRankLinear
from .spec_rmtkd import COUNTS, WHOLE, epsilon_name, is_norm, mismatch


def _corner(tensor, *shape):
    """A parameter of this shape, its first entries: random weights of the dense layer are those of a narrow one."""
    index = tuple(slice(size) for size in shape)
    return nn.Parameter(tensor.detach()[index].clone(), requires_grad=tensor.requires_grad)


def _resize_linear(layer, delta):
    features_in, features_out = delta.get("in", layer.in_features), delta.get("out", layer.out_features)
    if "rank" in delta:
        return LowRankLinear(features_in, features_out, delta["rank"], layer.bias is not None)
    layer.weight = _corner(layer.weight, features_out, features_in)
    if layer.bias is not None:
        layer.bias = _corner(layer.bias, features_out)
    layer.in_features, layer.out_features = features_in, features_out
    return layer


def _resize_conv1d(layer, delta):
    features_in, features_out = (delta.get(side, size) for side, size in zip(("in", "out"), layer.weight.shape))
    if "rank" in delta:
        return LowRankLinear(features_in, features_out, delta["rank"], bias=True)
    layer.weight, layer.bias = _corner(layer.weight, features_in, features_out), _corner(layer.bias, features_out)
    layer.nx, layer.nf = features_in, features_out
    return layer


def _resize_conv(layer, delta):
    channels_in, channels_out = delta.get("in", layer.in_channels), delta.get("out", layer.out_channels)
    if "rank" in delta:
        return LowRankConv2d(channels_in, channels_out, delta["rank"], layer.stride, layer.bias is not None)
    groups = delta.get("groups", layer.groups)
    layer.weight, layer.groups = _corner(layer.weight, channels_out, channels_in // groups), groups
    if layer.bias is not None:
        layer.bias = _corner(layer.bias, channels_out)
    layer.in_channels, layer.out_channels = channels_in, channels_out
    return layer


def _resize_norm(layer, delta):
    for name, parameter in list(layer._parameters.items()):
        if parameter is not None:
            setattr(layer, name, _corner(parameter, delta["dim"]))
    if isinstance(getattr(layer, "normalized_shape", None), tuple):
        layer.normalized_shape = (delta["dim"],)
    if "eps" in delta:
        setattr(layer, epsilon_name(layer), delta["eps"])
    return layer


def _resize_batch_norm(layer, delta):
    for name, parameter in list(layer._parameters.items()):
        if parameter is not None:
            setattr(layer, name, _corner(parameter, delta["dim"]))
    for name, buffer in list(layer._buffers.items()):
        if buffer is not None and buffer.dim():
            layer._buffers[name] = buffer[: delta["dim"]].clone()
    layer.num_features = delta["dim"]
    return layer


def _resize_embedding(layer, delta):
    dim = delta.get("dim", getattr(layer, "output_dim", layer.embedding_dim))
    if "rank" in delta:
        return LowRankEmbedding(layer.num_embeddings, delta["rank"], dim, layer.padding_idx)
    layer.weight, layer.embedding_dim = _corner(layer.weight, len(layer.weight), dim), dim
    return layer


RESIZES = (
    ((nn.Linear,), _resize_linear),
    ((Conv1D,), _resize_conv1d),
    ((nn.Conv2d,), _resize_conv),
    ((nn.BatchNorm2d,), _resize_batch_norm),
    ((nn.Embedding,), _resize_embedding),
)


def resize_module(layer, delta):
    """The layer with the widths of `delta`: itself, resized in place, so that a subclass stays what it is; or another
    in its place, where it becomes two factors. Dtype and device of what stays are its own.

    Raises:
        TypeError: no layer of this type can be narrowed.
    """
    for types, resize in RESIZES:
        if isinstance(layer, types):
            return resize(layer, delta)
    if is_norm(layer):
        return _resize_norm(layer, delta)
    raise TypeError(
        f"A {type(layer).__name__} cannot be narrowed; known: linear, 2-d convolution, batch norm, embedding, and "
        "norms over features."
    )


class ConfigView:
    """A config as one module sees it: some fields are its own, all others those that the model's config has now (the
    implementation of attention may change at any time).

    Args:
        config: the model's.
        own: {field: value}.
    """

    def __init__(self, config, own):
        vars(self).update(own, _viewed=config)

    def __getattr__(self, name):  # of what is not its own
        if name.startswith("__") or "_viewed" not in vars(self):  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self._viewed, name)


def check_numbers(module, attributes, kept, where):
    """Whether the spec says all numbers of heads that the code of an attention reads: with those of the dense one it
    would fail at the first text, or compute something else.

    Args:
        module: of the dense skeleton.
        attributes: what the spec sets of it.
        kept: its entry in `heads`.

    Raises:
        SpecMismatchError: names a number that is missing.
    """
    if kept["kept"] == kept["of"]:
        return
    read = _names_read(type(module))
    own = {name for name in COUNTS | WHOLE if type(vars(module).get(name)) is int}
    if missing := sorted(read & own - attributes.keys()):
        raise mismatch(where, attributes, f"the entry {missing[0]!r} as well, which its code reads")
    if "config" in read and read & COUNTS - own and not kept.get("config"):
        raise mismatch(where, kept, '"config": true in its entry of `heads`: its code reads numbers of heads there')


def _names_read(cls):
    """Names of all attributes that the forward of a class reads, and the methods of the class that it calls."""
    found, todo = set(), ["forward"]
    while todo:
        method = inspect.unwrap(getattr(cls, todo.pop()))
        names = _names_in(method.__code__) - found if isinstance(method, FunctionType) else set()
        found |= names
        todo += [name for name in names if callable(getattr(cls, name, None))]
    return found


def _names_in(code):
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))
