"""Layers of a dense skeleton are made narrower, and see the config and the numbers that their code needs; heads and
the layers around them go together.

Lies beside `modeling_rmtkd.py` in every saved repository, and imports torch and transformers alone.
"""

import fractions
import inspect
from types import CodeType, FunctionType

from torch import nn
from transformers.pytorch_utils import Conv1D

from .layers_rmtkd import LowRankConv2d, LowRankEmbedding, LowRankLinear
from .spec_rmtkd import COUNTS, HEADS, SCALES, WHOLE, WIDTHS, epsilon_name, is_norm, mismatch, widest


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


def check_heads(module, attributes, deltas, where, kept=None):
    """Whether the layers of an attention are as wide as its heads, which reshape what these give: with other heads
    the same tensors would load, and compute something else.

    Args:
        module: of the dense skeleton, with the layers as its children.
        attributes: what the spec sets of it.
        deltas: {name of a child: what the spec makes of it}.
        kept: its entry in `heads`: whole heads of it went.

    Raises:
        SpecMismatchError: widths of heads and layers that do not shrink alike.
    """
    given = {name: value for name, value in attributes.items() if name in WIDTHS}
    if kept is not None:
        _check_whole_heads(module, given, deltas, where, fractions.Fraction(kept["kept"], kept["of"]))
        return
    if not given and not any(isinstance(vars(module).get(name), int) for name in HEADS):
        return
    if wrong := [name for name in given if name in COUNTS]:
        raise mismatch(where, wrong[0], "a number of heads only where `heads` says how many of them were kept")
    shares = {fractions.Fraction(value, vars(module)[name]) for name, value in given.items()} or {1}
    if len(shares) > 1:
        raise mismatch(where, attributes, "widths that shrink alike")
    (share,) = shares
    if share != 1:
        read = _names_read(type(module)) & ((WIDTHS - COUNTS) | SCALES)
        own = {name for name in read if type(vars(module).get(name)) in (int, float)}
        if missing := sorted(own - attributes.keys()):
            raise mismatch(where, attributes, f"the entry {missing[0]!r} as well, which its code reads")
    _check_children(module, attributes, deltas, where, share)


def _check_whole_heads(module, given, deltas, where, share):
    """Heads keep their width, and there are fewer of them."""
    for name, value in given.items():
        own = vars(module)[name]
        if value != (own if name in HEADS else own * share):
            raise mismatch(f"{where}.{name}", value, f"what `heads` keeps of {own}")
    for name in COUNTS:
        own = vars(module).get(name)
        if isinstance(own, int) and not isinstance(own, bool) and (own * share).denominator != 1:
            raise mismatch(where, share.numerator, f"whole heads of {own}")
    _check_children(module, given, deltas, where, share)


def _check_children(module, attributes, deltas, where, share):
    for name, child in module.named_children():
        if isinstance(child, (nn.Linear, Conv1D)):
            most = widest(child)
            delta, own = deltas.get(name, {}), {side: most[side] for side in ("in", "out")}
            # queries, keys and values give the heads, the layer behind takes them
            if not any(delta.get(side, own[side]) == own[side] * share for side in own):
                raise mismatch(where, attributes, f"heads that the layer {name!r} fits: {delta or own}")
