"""Rebuilds a narrowed model from its config.

This file is what a reduced checkpoint needs, with those it imports from beside it: `layers_rmtkd.py`,
`resizing_rmtkd.py`, `spec_rmtkd.py` (the schema of the config) and `loading_rmtkd.py`. The plugin imports them, and
the same files are copied into every saved repository, where `trust_remote_code=True` runs them. They therefore import
torch and transformers alone.

Config and weights may be a stranger's. Before a tensor is allocated, the config is held against the schema, the number
of layers against the tensors in the files' headers, the spec against the dense skeleton (which transformers builds on
the meta device), and all shapes against those in the files.

`config.rmtkd` of a reduced model holds `version`, `spec`, `recipe` and `provenance`. `spec` describes the architecture
as deltas against the dense one, in paths that start with "@." where they are relative to the backbone, so that one
checkpoint serves `AutoModel`, other task heads and another `num_labels` alike:

    base        fields of the config that the dense skeleton is built from, for example {"hidden_size": 384}
    modules     {path: {"in", "out", "rank", "dim", "eps", "groups"}}: widths of linear, convolution, norm and
                embedding layers
    parameters  {path: {"dim", "axis"}}: last dimension of bare parameters, for example a class token; with "axis": -2
                the one before it
    attrs       {path: {name: value}}: head sizes and scales that modules keep as plain attributes
    heads       {path of an attention: {"kept", "of"}}: whole key-value groups that were kept, each as wide as before;
                with "config": true the layer sees a config that says so
    blocks      {path of the list of blocks: {"kept", "of"}}: numbers, of the uncut model, of the blocks that stayed;
                the config says how many these are, and all other paths count them anew
    ternary     {path: options of TernaryMLP, and "replaces": class name}: parts with ternary weights
"""

import contextlib
import functools
import sys

import torch
import transformers
from torch import nn
from transformers import conversion_mapping

from .layers_rmtkd import (
    LowRankConv2d,
    LowRankEmbedding,
    LowRankLinear,
    TernaryLinear,
    TernaryMLP,
    check_adapters,
)
from .loading_rmtkd import (
    REFUSALS,
    as_many_as_tensors,
    check_plain_numbers,
    finalizing,
    load_checked,
    named_errors,
)
from .resizing_rmtkd import ConfigView, check_heads, check_numbers, resize_module
from .spec_rmtkd import (
    COUNTS,
    VERSION,
    SpecMismatchError,
    check_attributes,
    check_base,
    check_fields,
    check_module,
    check_rmtkd,
    epsilon_name,
    is_norm,
    mismatch,
    version_of,
    widest,
)


__all__ = [  # generated classes, RMTKD<name in transformers>, are attributes as well
    "PREFIX",
    "TYPE_PREFIX",
    "VERSION",
    "LowRankConv2d",
    "LowRankEmbedding",
    "LowRankLinear",
    "SpecMismatchError",
    "TernaryLinear",
    "TernaryMLP",
    "apply_spec",
    "check_spec",
    "load_checked",
    "reduced_class",
    "epsilon_name",
    "is_norm",
    "resize_module",
    "resolve_path",
    "version_of",
]

PREFIX, TYPE_PREFIX = "RMTKD", "rmtkd_"  # of class names and of model types
CONFIG_HOOKS = []  # called with a generated config class when it is first instantiated
METHODS = {}  # of generated model classes; the package lends a push_to_hub that brings a card


def _ternary_in_place_of(old, options):
    """A TernaryMLP that stands where `old` stood; another number of labels is taken over from the dense skeleton."""
    options = {name: value for name, value in options.items() if name != "replaces"}
    if isinstance(old, nn.Linear):
        options["out_features"] = old.out_features
    return TernaryMLP(**options)


def resolve_path(model, path):
    """Absolute module path in `model` of a spec path: "@." stands for the backbone."""
    if not path.startswith("@."):
        return path
    path = path[2:]
    return path if model.base_model is model else f"{model.base_model_prefix}.{path}"


def _locate(model, raw):
    """(parent module, name) of a module or parameter at a spec path; None where this model has neither."""
    parent, _, name = resolve_path(model, raw).rpartition(".")
    try:
        owner = model.get_submodule(parent)
    except AttributeError:
        return None
    return (owner, name) if _child(owner, name) is not None else None


def _child(owner, name):
    found = owner._modules.get(name)
    return owner._parameters.get(name) if found is None else found


def _at(model, raw):
    """What stands at a spec path: a module, a parameter, or None."""
    found = _locate(model, raw)
    return None if found is None else _child(*found)


def check_spec(model, spec):
    """Whether the freshly built dense skeleton `model` can be narrowed as `spec` says; nothing is changed.

    A path that this model lacks must be one of another head on the same backbone, which the spec serves as well.

    Raises:
        SpecMismatchError: names the entry.
    """
    for section in ("modules", "parameters", "attrs", "heads", "blocks", "ternary"):
        resolved = {}
        for raw, entry in spec.get(section, {}).items():
            where = f"rmtkd.spec.{section}[{raw!r}]"
            twin = resolved.setdefault(resolve_path(model, raw), raw)
            if twin != raw:
                raise mismatch(where, raw, f"one name for each module; {twin!r} is the same one")
            found, fits = _at(model, raw), _FITS[section]
            if found is None or not fits(found, entry):
                if not _is_elsewhere(model, raw, section, entry, spec.get("base", {})):
                    raise mismatch(where, raw, f"a path of a {type(model).__name__}, or of another head, that fits")
            elif section == "modules":
                check_module(found, entry, where)
            elif section == "parameters" and entry["dim"] > found.shape[entry.get("axis", -1)]:
                raise mismatch(f"{where}.dim", entry["dim"], f"at most {found.shape[entry.get('axis', -1)]}")
            elif section == "attrs":
                check_attributes(found, entry, where)
            elif section == "blocks" and len(entry["kept"]) != len(found):
                raise mismatch(f"{where}.kept", entry["kept"], f"as many as the config says, {len(found)}")
            elif isinstance(found, nn.Linear) and entry["in_features"] > found.in_features:
                raise mismatch(f"{where}.in_features", entry["in_features"], f"at most {found.in_features}")
    _check_all_heads(model, spec)


def _check_all_heads(model, spec):
    deltas, attrs, heads = (
        {resolve_path(model, raw): entry for raw, entry in spec.get(section, {}).items()}
        for section in ("modules", "attrs", "heads")
    )
    for path, module in model.named_modules():
        inside = {name: deltas[f"{path}.{name}"] for name in module._modules if f"{path}.{name}" in deltas}
        if inside or path in attrs or path in heads:
            where = f"rmtkd.spec.attrs[{path!r}]"
            check_heads(module, attrs.get(path, {}), inside, where, heads.get(path))
            if path in heads:
                check_numbers(module, attrs.get(path, {}), heads[path], where)


_FITS = {
    "modules": lambda found, entry: widest(found) is not None,
    "parameters": lambda found, entry: isinstance(found, nn.Parameter) and found.dim() >= -entry.get("axis", -1),
    "attrs": lambda found, entry: isinstance(found, nn.Module),
    "heads": lambda found, entry: isinstance(found, nn.Module),
    "blocks": lambda found, entry: isinstance(found, nn.ModuleList),
    "ternary": lambda found, entry: type(found).__name__ == entry["replaces"],
}
_ELSEWHERE = set()  # (dense class, section, path) that were found in another class


def _is_elsewhere(model, raw, section, entry, base):
    """Whether another class of the same architecture has at `raw` what the entry is about. A parameter may be declared
    as a module: whoever wrote the spec had a head that lacks it, too."""
    dense = type(model).__mro__[1] if type(model).__name__.startswith(PREFIX) else type(model)
    known = dense, section, raw
    if known not in _ELSEWHERE:
        for other in _relatives(dense, model.config, base):
            found = _at(other, raw)
            if found is not None and (_FITS[section](found, entry) or isinstance(found, nn.Parameter)):
                _ELSEWHERE.add(known)
                break
    return known in _ELSEWHERE


def _stock_config(config, fields):
    """The config of the dense class with other fields: heads that make their backbone through AutoModel would make a
    narrowed one, which asks for its relatives in turn."""
    cls = type(config).__mro__[1] if type(config).__name__.startswith(PREFIX) else type(config)
    ours = ("model_type", "rmtkd", "auto_map", "architectures", "transformers_version")
    known = {name: value for name, value in fields.items() if isinstance(getattr(config, name, None), int)}
    return cls(**{name: value for name, value in config.to_dict().items() if name not in ours} | known)


def _relatives(dense, config, base):
    """Skeletons of the classes beside `dense`, on the meta device: heads first, as wide as `base` says, of one layer
    where the config counts them (the paths of all layers are the model's own), of two labels, as spans need."""
    home = vars(sys.modules[dense.__module__]).values()
    classes = [
        cls
        for cls in home
        if isinstance(cls, type)
        and issubclass(cls, transformers.PreTrainedModel)
        and cls.__module__ == dense.__module__
        and getattr(cls, "config_class", None) is dense.config_class
        and any("forward" in vars(c) for c in cls.__mro__[: cls.__mro__.index(transformers.PreTrainedModel)])
        and cls is not dense
    ]
    for cls in sorted(classes, key=lambda cls: "For" not in cls.__name__):
        for fields in ({"num_labels": 2, "num_hidden_layers": 1}, {"num_labels": 2}):
            try:
                small = _stock_config(config, base)
                for name, value in fields.items():
                    if isinstance(getattr(small, name, None), int):
                        setattr(small, name, value)
                with torch.device("meta"):
                    skeleton = cls(small)
            except REFUSALS:  # a head that wants other fields than this checkpoint has
                continue
            yield skeleton
            break


def apply_spec(model, spec):
    """Narrow the freshly built dense skeleton `model` in place, as `spec` says (see the module's text).

    Raises:
        SpecMismatchError: see `check_spec`; nothing has changed then.
    """
    spec = _not_applied_yet(model, spec)
    check_spec(model, spec)
    for raw, delta in spec.get("modules", {}).items():
        found = _locate(model, raw)
        if found is not None and widest(_child(*found)) is not None:
            setattr(*found, resize_module(_child(*found), delta))
    for raw, delta in spec.get("parameters", {}).items():
        found = _locate(model, raw)
        if found is not None:
            old = _child(*found)
            shape = list(old.shape)
            shape[delta.get("axis", -1)] = delta["dim"]
            setattr(*found, nn.Parameter(torch.zeros(shape, dtype=old.dtype, device=old.device)))
    for raw, options in spec.get("ternary", {}).items():
        found = _locate(model, raw)
        if found is not None and type(_child(*found)).__name__ == options["replaces"]:
            setattr(*found, _ternary_in_place_of(_child(*found), options))
    for raw, attributes in spec.get("attrs", {}).items():
        module = _at(model, raw)
        if module is not None:  # not in this head, or inside a part that is ternary now
            vars(module).update(attributes)
    for raw, entry in spec.get("heads", {}).items():
        module = _at(model, raw)
        if module is not None and entry.get("config"):
            module.config = _with_fewer_heads(module.config, entry)
    _keep_frequencies(model, spec.get("base", {}))
    _retie(model)


def _with_fewer_heads(config, entry):
    """The config as one layer sees it, whose code reads numbers of heads from it."""
    counts = {name: getattr(config, name, None) for name in COUNTS}
    return ConfigView(
        config, {name: n * entry["kept"] // entry["of"] for name, n in counts.items() if isinstance(n, int)}
    )


def _keep_frequencies(model, base):
    """Rotary frequencies that are computed anew for longer texts follow from the dense widths, as the first ones."""
    for module in model.modules() if base else ():
        rotary = any(name.endswith("inv_freq") for name in module._buffers)
        if rotary and module is not model and getattr(module, "config", None) is model.config:
            module.config = ConfigView(model.config, base)


def _not_applied_yet(model, spec):
    """The spec without what concerns the backbone, where that is a narrowed model already: heads that several families
    share make theirs through AutoModel, which knows the narrowed classes."""
    backbone = model.base_model
    if backbone is model or not type(backbone).__name__.startswith(PREFIX):
        return spec
    return {
        section: {path: entry for path, entry in entries.items() if section == "base" or not path.startswith("@.")}
        for section, entries in spec.items()
    }


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


def _save_what_changed(model, spec):
    """Sinusoids that a class computes from the width, and does not save, are others where that has changed."""
    changed = {resolve_path(model, raw) for raw in spec.get("modules", {})}
    passed_over = model._keys_to_ignore_on_save or ()
    model._keys_to_ignore_on_save = {key for key in passed_over if key.rpartition(".")[0] not in changed}


@contextlib.contextmanager
def _dense(config, spec):
    """The config with the widths of the dense skeleton; the identity of `config` is kept, modules hold references to
    it."""
    base = spec.get("base", {})
    check_base(config, base)
    kept = {name: getattr(config, name) for name in base}
    try:
        for name, value in base.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(config, name, value)


def _share_key_renames(name, base_name):
    """Weights of older checkpoints are renamed while loading, and back while saving, by class name; transformers
    withholds this from classes it does not know, which would leave backbone and heads with different names on disk."""
    renames = conversion_mapping.get_checkpoint_conversion_mapping(base_name)
    if renames is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(name, renames, overwrite=True)


def _make_config(name):
    base = getattr(transformers, name[len(PREFIX) :])

    def __new__(cls, *args, **kwargs):
        for hook in CONFIG_HOOKS:
            hook(cls)
        return object.__new__(cls)

    def validate(self):
        """Whether sizes divide as the dense model's code needs it: asked of the dense widths, for it is built from
        them."""
        with _dense(self, (self.rmtkd or {}).get("spec", {})):
            base.validate(self)

    validate.__is_defined_by_strict_decorator__ = True  # transformers takes no other

    made = type(
        name,
        (base,),
        {
            "validate": validate,
            "model_type": TYPE_PREFIX + base.model_type,
            "__annotations__": {"rmtkd": "dict | None"},
            "rmtkd": None,
            "__new__": __new__,
            "__module__": __name__,
            "__doc__": f"{base.__name__} of a narrowed model; `rmtkd` holds the spec.",
        },
    )
    fill = made.__init__  # transformers makes it: config classes are dataclasses

    @functools.wraps(fill)
    def __init__(self, *args, **kwargs):
        check_rmtkd(kwargs.get("rmtkd"))
        check_fields(kwargs, made)
        check_plain_numbers(kwargs)
        with named_errors(base.__name__):
            fill(self, *args, **kwargs)

    made.__init__ = __init__
    return made


def _make_model(name):
    base = getattr(transformers, name[len(PREFIX) :])
    config_class = getattr(sys.modules[__name__], PREFIX + base.config_class.__name__)
    _share_key_renames(name, base.__name__)

    def __init__(self, config, *args, **kwargs):
        spec = check_rmtkd(getattr(config, "rmtkd", None))
        with _dense(config, spec), as_many_as_tensors(), named_errors(base.__name__):
            base.__init__(self, config, *args, **kwargs)
        if spec:
            with named_errors(base.__name__):
                apply_spec(self, spec)
            self.post_init()
            _save_what_changed(self, spec)

    def initialize_weights(self):
        # loading computes buffers that are not saved anew: rotary frequencies follow from the dense widths
        with _dense(self.config, (getattr(self.config, "rmtkd", None) or {}).get("spec", {})):
            base.initialize_weights(self)

    def __setattr__(self, name, value):
        base.__setattr__(self, name, value)
        if name == "peft_config":  # PEFT has put its adapters into this model
            check_adapters(self)

    def from_pretrained(cls, *args, **kwargs):
        return load_checked(cls, super(model_class, cls).from_pretrained, *args, **kwargs)

    model_class = type(
        name,
        (base,),
        {
            "__init__": __init__,
            "__setattr__": __setattr__,
            "initialize_weights": initialize_weights,
            "from_pretrained": classmethod(from_pretrained),
            "_finalize_model_loading": finalizing(base),
            "config_class": config_class,
            "__module__": __name__,
            "__doc__": f"{base.__name__}, narrowed as its config's `rmtkd` spec says.",
        }
        | METHODS,
    )
    return model_class


def reduced_class(cls):
    """The generated class that narrows the stock class `cls` (model or config); a generated class is returned as it
    is."""
    if cls.__name__.startswith(PREFIX):
        return cls
    return getattr(sys.modules[__name__], PREFIX + cls.__name__)


def __getattr__(name):  # PEP 562: generated classes are importable and picklable
    if not name.startswith(PREFIX) or not hasattr(transformers, name[len(PREFIX) :]):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = _make_config(name) if name.endswith("Config") else _make_model(name)
    setattr(sys.modules[__name__], name, made)
    return made
