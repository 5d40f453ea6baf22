"""Rebuilds a narrowed model from its config.

This one file is what a reduced checkpoint needs: the plugin imports it, and the same file is copied into every saved
repository, where `trust_remote_code=True` runs it. It therefore imports torch and transformers alone.

`config.rmtkd` of a reduced model holds `version`, `spec`, `recipe` and `provenance`. `spec` describes the architecture as
deltas against the dense one, in paths that start with "@." where they are relative to the backbone, so that one
checkpoint serves `AutoModel`, other task heads and another `num_labels` alike:

    base        fields of the config that the dense skeleton is built from, for example {"hidden_size": 384}
    modules     {path: {"in", "out", "rank", "dim", "eps"}}: widths of linear, convolution, norm and embedding layers
    parameters  {path: {"dim"}}: last dimension of bare parameters, for example a class token
    attrs       {path: {name: value}}: head sizes and scales that modules keep as plain attributes
"""

import contextlib
import sys

import torch
import transformers
from torch import nn
from transformers import conversion_mapping
from transformers.pytorch_utils import Conv1D


PREFIX = "RMTKD"
VERSION = 1
CONFIG_HOOKS = []  # called with a generated config class when it is first instantiated


class SpecMismatchError(ValueError):
    """A checkpoint holds tensors that do not fit the widths its own config declares."""


class LowRankLinear(nn.Module):
    """A linear layer of rank `rank` as two real `nn.Linear` children, which PEFT, torchao and FSDP see as what they are.

    Shapes: (..., in_features) -> (..., out_features).
    """

    def __init__(self, in_features, out_features, rank, bias=True):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    @property
    def weight(self):  # code of transformers peeks at `.weight.dtype` and `.weight.device`
        return self.up.weight

    @property
    def bias(self):
        return self.up.bias

    def forward(self, x):
        return self.up(self.down(x))


class LowRankConv2d(nn.Module):
    """A 1x1 convolution of rank `rank`: (batch, in, h, w) -> (batch, out, h', w'). The stride stays with the first factor."""

    def __init__(self, in_channels, out_channels, rank, stride=1, bias=True):
        super().__init__()
        self.in_channels, self.out_channels, self.rank, self.stride = in_channels, out_channels, rank, stride
        self.kernel_size, self.groups = (1, 1), 1
        self.down = nn.Conv2d(in_channels, rank, 1, stride=stride, bias=False)
        self.up = nn.Conv2d(rank, out_channels, 1, bias=bias)

    @property
    def weight(self):
        return self.up.weight

    @property
    def bias(self):
        return self.up.bias

    def forward(self, x):
        return self.up(self.down(x))


class LowRankEmbedding(nn.Embedding):
    """A table (num_embeddings, rank) followed by a projection (rank -> embedding_dim); ids (...) -> (..., embedding_dim).

    It stays an `nn.Embedding`, whose rows `resize_token_embeddings` can add and drop.
    """

    def __init__(self, num_embeddings, rank, embedding_dim, padding_idx=None):
        super().__init__(num_embeddings, rank, padding_idx=padding_idx)
        self.rank, self.output_dim = rank, embedding_dim
        self.up = nn.Linear(rank, embedding_dim, bias=False)

    def forward(self, input_ids):
        return self.up(super().forward(input_ids))


def _rebuild_linear(old, delta):
    features_in, features_out = delta.get("in", old.in_features), delta.get("out", old.out_features)
    bias = old.bias is not None
    if "rank" in delta:
        return LowRankLinear(features_in, features_out, delta["rank"], bias)
    return nn.Linear(features_in, features_out, bias)


def _rebuild_conv1d(old, delta):
    features_in, features_out = old.weight.shape
    return LowRankLinear(features_in, features_out, delta["rank"], bias=True)


def _rebuild_conv(old, delta):
    channels_in, channels_out = delta.get("in", old.in_channels), delta.get("out", old.out_channels)
    bias = old.bias is not None
    if "rank" in delta:
        return LowRankConv2d(channels_in, channels_out, delta["rank"], old.stride, bias)
    return nn.Conv2d(
        channels_in,
        channels_out,
        old.kernel_size,
        old.stride,
        old.padding,
        old.dilation,
        old.groups,
        bias,
        old.padding_mode,
    )


def _rebuild_layer_norm(old, delta):
    return nn.LayerNorm(delta["dim"], eps=delta.get("eps", old.eps), bias=old.bias is not None)


def _rebuild_batch_norm(old, delta):
    return nn.BatchNorm2d(delta["dim"], old.eps, old.momentum, old.affine, old.track_running_stats)


def _rebuild_embedding(old, delta):
    dim = delta.get("dim", getattr(old, "output_dim", old.embedding_dim))
    if "rank" in delta:
        return LowRankEmbedding(old.num_embeddings, delta["rank"], dim, old.padding_idx)
    return nn.Embedding(old.num_embeddings, dim, padding_idx=old.padding_idx)


BUILDERS = (
    ((nn.Linear, LowRankLinear), _rebuild_linear),
    ((Conv1D,), _rebuild_conv1d),
    ((nn.Conv2d, LowRankConv2d), _rebuild_conv),
    ((nn.LayerNorm,), _rebuild_layer_norm),
    ((nn.BatchNorm2d,), _rebuild_batch_norm),
    ((nn.Embedding,), _rebuild_embedding),
)


def rebuild_module(old, delta):
    """A fresh layer like `old` with the widths of `delta`; dtype and device follow the defaults in force.

    Raises:
        TypeError: no layer of this type can be narrowed.
    """
    for types, build in BUILDERS:
        if isinstance(old, types):
            return build(old, delta)
    raise TypeError(
        f"A {type(old).__name__} cannot be narrowed; known: linear, 2-d convolution, layer and batch norm, embedding."
    )


def resolve_path(model, path):
    """Absolute module path in `model` of a spec path: "@." stands for the backbone."""
    if not path.startswith("@."):
        return path
    path = path[2:]
    return path if model.base_model is model else f"{model.base_model_prefix}.{path}"


def _locate(model, raw):
    """(parent module, name) of a spec path, or None where this model has another head and lacks it."""
    parent, _, name = resolve_path(model, raw).rpartition(".")
    try:
        owner = model.get_submodule(parent)
    except AttributeError:
        return None
    return (owner, name) if getattr(owner, name, None) is not None else None


def apply_spec(model, spec):
    """Narrow the freshly built dense skeleton `model` in place, as `spec` says (see the module's text)."""
    for raw, delta in spec.get("modules", {}).items():
        found = _locate(model, raw)
        if found is not None and isinstance(getattr(*found), tuple(t for types, _ in BUILDERS for t in types)):
            setattr(*found, rebuild_module(getattr(*found), delta))
    for raw, delta in spec.get("parameters", {}).items():
        found = _locate(model, raw)
        if found is not None:
            old = getattr(*found)
            setattr(
                *found, nn.Parameter(torch.zeros(*old.shape[:-1], delta["dim"], dtype=old.dtype, device=old.device))
            )
    for raw, attributes in spec.get("attrs", {}).items():
        module = model.get_submodule(resolve_path(model, raw))
        for name, value in attributes.items():
            setattr(module, name, value)
    _retie(model)


def _retie(model):
    """A factored decoder is tied by its factor over the vocabulary: the class-level names follow on the instance."""
    tied = getattr(model, "_tied_weights_keys", None)
    if not isinstance(tied, dict):
        return
    renamed = {}
    for target, source in tied.items():
        owner, _, leaf = target.rpartition(".")
        try:
            factored = isinstance(model.get_submodule(owner), LowRankLinear)
        except AttributeError:  # a pattern, not a path
            factored = False
        renamed[f"{owner}.up.{leaf}" if factored else target] = source
    model._tied_weights_keys = renamed
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)


@contextlib.contextmanager
def _dense(config, spec):
    """The config with the widths of the dense skeleton; the identity of `config` is kept, modules hold references to it."""
    base = spec.get("base", {})
    kept = {name: getattr(config, name) for name in base}
    try:
        for name, value in base.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(config, name, value)


def _check_loaded(cls, model, info, ignore_mismatched):
    """Nothing may have been re-initialised silently, but for the head of another task than the checkpoint's."""
    prefix = "" if model.base_model is model else model.base_model_prefix + "."
    same_task = cls.__name__ in (model.config.architectures or ())
    advice = "The weights and the config are not of the same model: save them again together."
    for key, found, expected in sorted(info["mismatched_keys"]):
        if key.startswith(prefix) or not ignore_mismatched:
            raise SpecMismatchError(
                f"{cls.__name__}: the checkpoint's tensor {key} has shape {tuple(found)}, its spec (config.json, rmtkd) expects "
                f"{tuple(expected)}. {advice} (A new head, as for another num_labels, needs ignore_mismatched_sizes=True.)"
            )

    def needed(key):  # whether a model has a pooler depends on its task
        return same_task or (key.startswith(prefix) and not key.startswith(prefix + "pooler."))

    missing = sorted(key for key in info["missing_keys"] if needed(key))
    if missing:
        raise SpecMismatchError(
            f"{cls.__name__}: the checkpoint lacks {len(missing)} tensor(s) that its spec expects, the first is {missing[0]}. {advice}"
        )


def _share_key_renames(name, base_name):
    """Weights of older checkpoints are renamed while loading, and back while saving, by class name; transformers withholds
    this from classes it does not know, which would leave backbone and heads with different names on disk."""
    renames = conversion_mapping.get_checkpoint_conversion_mapping(base_name)
    if renames is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(name, renames, overwrite=True)


def _make_config(name):
    base = getattr(transformers, name[len(PREFIX) :])

    def __new__(cls, *args, **kwargs):
        for hook in CONFIG_HOOKS:
            hook(cls)
        return object.__new__(cls)

    return type(
        name,
        (base,),
        {
            "model_type": "rmtkd_" + base.model_type,
            "__annotations__": {"rmtkd": "dict | None"},
            "rmtkd": None,
            "__new__": __new__,
            "__module__": __name__,
            "__doc__": f"{base.__name__} of a narrowed model; `rmtkd` holds the spec.",
        },
    )


def _make_model(name):
    base = getattr(transformers, name[len(PREFIX) :])
    config_class = getattr(sys.modules[__name__], PREFIX + base.config_class.__name__)
    _share_key_renames(name, base.__name__)

    def __init__(self, config, *args, **kwargs):
        spec = (getattr(config, "rmtkd", None) or {}).get("spec", {})
        with _dense(config, spec):
            base.__init__(self, config, *args, **kwargs)
        if spec:
            apply_spec(self, spec)
            self.post_init()

    def from_pretrained(cls, *args, **kwargs):
        wants_info = kwargs.pop("output_loading_info", False)
        ignore = kwargs.pop("ignore_mismatched_sizes", False)
        load = super(model_class, cls).from_pretrained
        model, info = load(*args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
        _check_loaded(cls, model, info, ignore)
        return (model, info) if wants_info else model

    model_class = type(
        name,
        (base,),
        {
            "__init__": __init__,
            "from_pretrained": classmethod(from_pretrained),
            "config_class": config_class,
            "__module__": __name__,
            "__doc__": f"{base.__name__}, narrowed as its config's `rmtkd` spec says.",
        },
    )
    return model_class


def reduced_class(cls):
    """The generated class that narrows the stock class `cls` (model or config); a generated class is returned as it is."""
    if cls.__name__.startswith(PREFIX):
        return cls
    return getattr(sys.modules[__name__], PREFIX + cls.__name__)


def __getattr__(name):  # PEP 562: generated classes are importable and picklable
    if not name.startswith(PREFIX) or not hasattr(transformers, name[len(PREFIX) :]):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = _make_config(name) if name.endswith("Config") else _make_model(name)
    setattr(sys.modules[__name__], name, made)
    return made
