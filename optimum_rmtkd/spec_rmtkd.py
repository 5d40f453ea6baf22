"""What the config of a narrowed or ternary model may say, checked before anything is built from it.

A config comes from whoever wrote it, so its grammar is closed: what is not described here is refused, with the entry's
name. Lies beside `modeling_rmtkd.py` in every saved repository, and imports torch and transformers alone.

    version     1, 2 where the spec has `heads`, 3 where it has `groups` of convolutions or an `axis` of parameters, or
                4 where it has `blocks`; missing in a config without widths. A later format is refused, with the
                advice to upgrade
    spec        base, modules, parameters, attrs, heads, blocks, ternary: see `modeling_rmtkd.py`
    recipe      how it was narrowed; a record that nothing is built from
    provenance  where it comes from: base_model, parameters_before, rounds, ternary

Paths are those of the dense skeleton, of this class or of another head on the same backbone. Widths are whole numbers
from 1 to the dense layer's. Attributes are those of `WIDTHS` and `NUMBERS` that the dense module has as plain
numbers.
"""

import fractions
import math
import re

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D


VERSION = 4
SECTIONS = ("base", "modules", "parameters", "attrs", "heads", "blocks", "ternary")
DELTAS = ("in", "out", "rank", "dim", "eps", "groups")
PATH = re.compile(r"(@\.)?[A-Za-z_][\w-]*(\.[\w-]+)*", re.ASCII)
NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)

# What modules of transformers call the widths of their heads, and numbers that no config states, with their range.
WIDTHS = frozenset(
    """all_head_size attention_head_size d_head d_kv dim dim_head dim_per_head embed_dim head_dim head_size hidden_dim
    hidden_size inner_dim key_value_proj_dim kv_dim qk_head_dim split_size v_head_dim
    num_attention_heads num_heads num_key_value_heads""".split()
)
COUNTS = frozenset(("num_attention_heads", "num_heads", "num_key_value_heads"))  # of heads, where code reads them
WHOLE = {"all_head_size", "dim", "embed_dim", "hidden_dim", "hidden_size", "inner_dim", "kv_dim", "split_size"}
HEADS = WIDTHS - WHOLE - COUNTS  # widths of one head
EPSILONS = ("eps", "variance_epsilon", "epsilon")  # what norms call it
SCALES = {"scale", "scaling", "softmax_scale"}  # of attention: those of the dense heads, however narrow they are
NUMBERS = {
    "eps": (0.0, 1e3),  # of a norm over few features: it grows as they get fewer
    "variance_epsilon": (0.0, 1e3),
    "momentum": (0.0, 1.0),
    "negative_slope": (-1e6, 1e6),
    "scale": (1e-6, 1e6),
    "scaling": (1e-6, 1e6),
    "softmax_scale": (1e-6, 1e6),
}

MOST_LABELS = 100_000  # that a config may ask for by number; any number may be named
MOST_LAYERS = 10_000
MOST_HIDDEN = 1_000  # layers of a ternary network
MOST_STEPS = 1_000  # thresholds of an activation
LARGEST = 2**31 - 1
DTYPES = ("float32", "float16", "bfloat16", "float64", "auto")
MOST_DRAWN = 2**25  # weights that follow from a seed: no file bounds them, and drawing takes 40 bytes each

ACTIVATIONS = {"erf": torch.erf, "cos": torch.cos, "sign": torch.sign}  # beside those of transformers
STORAGES = ("base3", "2bit", "seed", "latent", "dense")
TERNARY = ("in_features", "out_features", "hidden", "activations", "storage", "sparsity", "seed", "bias")


class SpecMismatchError(ValueError):
    """A checkpoint's config says what no model of its class can be, or holds tensors that do not fit what it says."""


def shown(value):
    """A value on one short line, whatever it is."""
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if value.bit_length() < 100 else f"a number of {value.bit_length()} bits"
    if isinstance(value, str):
        text = ascii(value[:60])
        return text if len(value) <= 60 and len(text) <= 62 else f"{text[:57]}...'"
    if isinstance(value, (dict, list, tuple)):
        kind = "an object" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value)}" if value else f"an empty {kind.split()[1]}"
    return f"a {type(value).__name__}"


def mismatch(where, got, expected):
    """The error that names an entry of the config."""
    return SpecMismatchError(
        f"config.json, {where}: got {shown(got)}, expected {expected}. The config was damaged, or made otherwise than "
        "by this library: get the model again from where it was saved."
    )


# -- the grammar ------------------------------------------------------------------------------------------------------


def _object(value, where, known=None):
    if not isinstance(value, dict):
        raise mismatch(where, value, "an object")
    for name in value:
        if not isinstance(name, str) or (known is not None and name not in known):
            raise mismatch(where, name, f"no entries but {', '.join(known)}" if known else "names")
    return value


def _whole(value, where, most=LARGEST, least=1):
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise mismatch(where, value, f"a whole number from {least} to {most}")
    return value


def _number(value, where, low=-math.inf, high=math.inf):
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not plain or not math.isfinite(_as_float(value)) or not low <= value <= high:
        raise mismatch(where, value, "a finite number" + ("" if low == -math.inf else f" from {low:g} to {high:g}"))
    return value


def _as_float(value):
    try:
        return float(value)
    except OverflowError:  # a whole number beyond floats
        return math.inf


def check_rmtkd(rmtkd, where="rmtkd"):
    """Whether `config.rmtkd` is one that this version of the library writes; gives its spec, {} where there is none.

    Raises:
        SpecMismatchError: names the entry; a later version says to upgrade.
    """
    if rmtkd is None:
        return {}
    _object(rmtkd, where, ("version", "spec", "recipe", "provenance"))
    _check_version(rmtkd.get("version", VERSION), f"{where}.version")
    if rmtkd.get("recipe") is not None:
        _object(rmtkd["recipe"], f"{where}.recipe")
    _check_provenance(rmtkd.get("provenance"), f"{where}.provenance")
    spec = _object(rmtkd.get("spec", {}), f"{where}.spec", SECTIONS)
    for section in SECTIONS:
        for path, entry in _object(spec.get(section, {}), f"{where}.spec.{section}").items():
            at = f"{where}.spec.{section}[{shown(path)}]"
            if section != "base" and not (PATH.fullmatch(path) and len(path) < 500):
                raise mismatch(at, path, "the path of a module")
            _ENTRIES[section](entry, at)
    return spec


def _check_version(version, where):
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise mismatch(where, version, f"the number of a format, {VERSION}")
    if version > VERSION:
        raise SpecMismatchError(
            f"config.json, {where}: got {shown(version)}, expected {VERSION} at most. The model was saved by a later "
            'version of optimum-rmtkd: upgrade it (pip install -U "optimum-rmtkd").'
        )


def _check_provenance(provenance, where):
    if provenance is None:
        return
    _object(provenance, where)
    if not isinstance(provenance.get("base_model") or "", str):
        raise mismatch(f"{where}.base_model", provenance["base_model"], "a name")
    for name in ("parameters_before", "rounds"):
        if provenance.get(name) is not None:
            _whole(provenance[name], f"{where}.{name}", most=2**62, least=0)
    if provenance.get("ternary") is not None:
        _object(provenance["ternary"], f"{where}.ternary")


def _check_delta(delta, where):
    for name, value in _object(delta, where, DELTAS).items():
        if name == "eps":
            _number(value, f"{where}.eps", *NUMBERS["eps"])
        else:
            _whole(value, f"{where}.{name}")


def _check_parameter(delta, where):
    _object(delta, where, ("dim", "axis"))
    _whole(delta.get("dim"), f"{where}.dim")
    _whole(delta.get("axis", -1), f"{where}.axis", most=-1, least=-2)


def _check_attributes(attributes, where):
    for name, value in _object(attributes, where).items():
        if name in WIDTHS:
            _whole(value, f"{where}.{name}")
        elif name in NUMBERS:
            _number(value, f"{where}.{name}", *NUMBERS[name])
        else:
            raise mismatch(where, name, f"no attributes but {', '.join(sorted(WIDTHS | NUMBERS.keys()))}")


def _check_kept(entry, where):
    _object(entry, where, ("kept", "of", "config"))
    if not isinstance(entry.get("config", False), bool):
        raise mismatch(f"{where}.config", entry["config"], "true or false")
    _whole(entry.get("kept"), f"{where}.kept", most=_whole(entry.get("of"), f"{where}.of"))


def _check_blocks(entry, where):
    _object(entry, where, ("kept", "of"))
    kept, most = entry.get("kept"), _whole(entry.get("of"), f"{where}.of", most=MOST_LAYERS)
    if not isinstance(kept, (list, tuple)) or not 1 <= len(kept) <= most:
        raise mismatch(f"{where}.kept", kept, f"a list of 1 to {most} numbers of blocks")
    for place, number in enumerate(kept):
        least = kept[place - 1] + 1 if place else 0
        _whole(number, f"{where}.kept[{place}]", most=most - 1, least=least)


def _check_part(options, where):
    _object(options, where, (*TERNARY, "replaces"))
    if not isinstance(options.get("replaces"), str) or not NAME.fullmatch(options["replaces"]):
        raise mismatch(f"{where}.replaces", options.get("replaces"), "the name of a class")
    _whole(options.get("out_features"), f"{where}.out_features")
    check_network({name: value for name, value in options.items() if name != "replaces"}, where)


_ENTRIES = {
    "base": lambda value, where: _whole(value, where),
    "modules": _check_delta,
    "parameters": _check_parameter,
    "attrs": _check_attributes,
    "heads": _check_kept,
    "blocks": _check_blocks,
    "ternary": _check_part,
}


def check_network(options, where="network"):
    """Whether these are the arguments of a `TernaryMLP`; `out_features` may be missing.

    Raises:
        SpecMismatchError: names the entry.
    """
    _object(options, where, TERNARY)
    width = _whole(options.get("in_features"), f"{where}.in_features")
    if "out_features" in options:
        _whole(options["out_features"], f"{where}.out_features")
    hidden, activations = options.get("hidden"), options.get("activations")
    if not isinstance(hidden, (list, tuple)) or not 1 <= len(hidden) <= MOST_HIDDEN:
        raise mismatch(f"{where}.hidden", hidden, f"a list of 1 to {MOST_HIDDEN} widths")
    if not isinstance(activations, (list, tuple)) or len(activations) != len(hidden):
        raise mismatch(f"{where}.activations", activations, f"a list of {len(hidden)}, one a hidden layer")
    if options.get("storage") not in STORAGES:
        raise mismatch(f"{where}.storage", options.get("storage"), f"one of {', '.join(STORAGES)}")
    for number, features in enumerate(hidden):
        _whole(features, f"{where}.hidden[{number}]")
        _check_activation(activations[number], f"{where}.activations[{number}]")
    if options["storage"] == "seed" and (drawn := hidden_weights(width, hidden)) > MOST_DRAWN:
        raise mismatch(f"{where}.hidden", hidden, f"at most {MOST_DRAWN} weights that follow from a seed, not {drawn}")
    sparsity = _number(options.get("sparsity", 0.5), f"{where}.sparsity", 0, 1)
    if sparsity == 1:
        raise mismatch(f"{where}.sparsity", sparsity, "a share below 1")
    _whole(options.get("seed", 0), f"{where}.seed", most=2**64 - 1, least=0)
    if not isinstance(options.get("bias", False), bool):
        raise mismatch(f"{where}.bias", options["bias"], "true or false")


def hidden_weights(in_features, hidden):
    """Number of weights of all hidden layers of a ternary network."""
    return sum(a * b for a, b in zip((in_features, *hidden), hidden))


def _check_activation(options, where):
    named = "name" in _object(options, where, ("name", "mean", "thresholds", "levels", "slopes"))
    if named:
        _object(options, where, ("name", "mean"))
        name = options["name"]
        if not isinstance(name, str) or not (name in ACTIVATIONS or name in ACT2FN):
            choices = ", ".join(sorted({*ACTIVATIONS, *ACT2FN}))
            raise SpecMismatchError(
                f"config.json, {where}.name: Unknown activation {shown(name)}; expected one of {choices}."
            )
        _number(options.get("mean", 0.0), f"{where}.mean")
        return
    thresholds = _numbers(options.get("thresholds"), f"{where}.thresholds", range(1, MOST_STEPS + 1))
    count = len(thresholds) + 1
    _numbers(options.get("levels"), f"{where}.levels", range(count, count + 1))
    _numbers(options.get("slopes", (0.0, 0.0)), f"{where}.slopes", range(2, 3))
    if any(a > b for a, b in zip(thresholds, thresholds[1:])):
        raise mismatch(f"{where}.thresholds", thresholds, "rising numbers")


def _numbers(values, where, lengths):
    if not isinstance(values, (list, tuple)) or len(values) not in lengths:
        many = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        raise mismatch(where, values, f"a list of {many} numbers")
    for number, value in enumerate(values):
        _number(value, f"{where}[{number}]")
    return values


def check_fields(fields, config_class):
    """Whether the fields that config classes of transformers make lists from are of a size that can be, and neither a
    method of the class nor another file nor a thing of torch that is no dtype is named.

    Raises:
        SpecMismatchError: names the field.
    """
    labels, named = fields.get("num_labels"), fields.get("id2label")
    if isinstance(labels, int) and labels > max(MOST_LABELS, len(named) if isinstance(named, dict) else 0):
        raise mismatch("num_labels", labels, f"at most {MOST_LABELS}, or the names of all in id2label")
    for name, value in fields.items():
        if callable(getattr(config_class, name, None)) or name.startswith("__"):
            raise mismatch(name, value, f"no such field: a {config_class.__name__} has a method of this name")
        counts = value if isinstance(value, (list, tuple)) else (value,)
        if re.search("layer|depth", name) and any(isinstance(n, int) and n > MOST_LAYERS for n in counts):
            raise mismatch(name, value, f"at most {MOST_LAYERS}")
    for name in ("dtype", "torch_dtype"):
        value = fields.get(name)
        if not isinstance(value, (torch.dtype, type(None))) and value not in DTYPES:
            raise mismatch(name, value, f"one of {', '.join(DTYPES)}")
    if fields.get("transformers_weights") is not None:
        raise mismatch("transformers_weights", fields["transformers_weights"], "no such field: weights have one name")


def check_base(config, base):
    """Whether the fields of the dense skeleton are widths that this config has, and no smaller than its own.

    Raises:
        SpecMismatchError: names the field.
    """
    for name, value in base.items():
        where = f"rmtkd.spec.base[{shown(name)}]"
        known = NAME.fullmatch(name) and (name in vars(config) or name in type(config).attribute_map)
        own = getattr(config, name, None) if known else None
        if isinstance(own, bool) or not isinstance(own, int):
            raise mismatch(where, name, f"a width among the fields of a {type(config).__name__}")
        _whole(value, where, least=max(1, own))


# -- against the dense skeleton ---------------------------------------------------------------------------------------


def version_of(spec, decoder=False):
    """The format that a spec needs. The first knew no norms but layer norms, nor heads that go, and so no decoder; the
    second no convolutions in groups, nor experts, whose parameters are cut along another axis; the third no blocks
    that go."""
    if spec.get("blocks"):
        return 4
    modules, parameters = (spec.get(section, {}).values() for section in ("modules", "parameters"))
    third = any("groups" in delta for delta in modules) or any("axis" in delta for delta in parameters)
    return 3 if third else 2 if decoder or spec.get("heads") else 1


def epsilon_name(module):
    """The attribute that holds the epsilon of a norm; None where there is none."""
    return next((name for name in EPSILONS if isinstance(vars(module).get(name, False), (float, type(None)))), None)


def is_norm(module):
    """Whether this is a norm over the last axis by its looks: a weight a feature, perhaps a bias, and an epsilon."""
    if isinstance(module, nn.LayerNorm):
        return True
    if not isinstance(module, nn.Module) or isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
        return False
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    alone = set(parameters) in ({"weight"}, {"weight", "bias"}) and not module._modules and not module._buffers
    return alone and all(p.dim() == 1 for p in parameters.values()) and epsilon_name(module) is not None


def widest(module):
    """{entry of a delta: the most it can be} of a layer that can be narrowed, None of anything else."""
    if isinstance(module, nn.Linear):
        features = module.in_features, module.out_features
        return {"in": features[0], "out": features[1], "rank": max(features)}
    if isinstance(module, Conv1D):
        features = module.weight.shape
        return {"in": features[0], "out": features[1], "rank": max(features)}
    if isinstance(module, nn.Conv2d):
        widths = {"in": module.in_channels, "out": module.out_channels}
        widths |= {"groups": module.groups} if module.groups > 1 else {}
        pointwise = module.kernel_size == (1, 1) and module.groups == 1
        return {**widths, "rank": max(widths.values())} if pointwise else widths
    if isinstance(module, nn.LayerNorm):
        return {"dim": math.prod(module.normalized_shape), "eps": NUMBERS["eps"][1]}
    if is_norm(module):
        return {"dim": module.weight.numel(), "eps": NUMBERS["eps"][1]}
    if isinstance(module, nn.BatchNorm2d):
        return {"dim": module.num_features}
    if isinstance(module, nn.Embedding):
        # two factors stand for a plain table alone: a scale or an offset of its own would be lost
        plain = type(module).forward is nn.Embedding.forward
        return {"dim": module.embedding_dim, **({"rank": module.embedding_dim} if plain else {})}
    return None


def check_module(module, delta, where):
    """Whether a layer can be made as narrow as its delta says.

    Raises:
        SpecMismatchError: names the entry.
    """
    most = widest(module)
    for name, value in delta.items():
        if name not in most:
            known = ", ".join(most) or "nothing"
            raise mismatch(where, name, f"only what a {type(module).__name__} like this one has: {known}")
        if value > most[name]:
            raise mismatch(f"{where}.{name}", value, f"at most {most[name]}, as in the dense layer")
    if "groups" in most and len({fractions.Fraction(delta.get(name, size), size) for name, size in most.items()}) > 1:
        raise mismatch(where, delta, f"groups as wide as those of the dense layer, {most}")
    if (is_norm(module) or isinstance(module, nn.BatchNorm2d)) and "dim" not in delta:
        raise mismatch(where, delta, f"the entry 'dim', which a {type(module).__name__} needs")


def check_attributes(module, attributes, where):
    """Whether a module has these attributes as plain numbers, widths no smaller than the ones given.

    Raises:
        SpecMismatchError: names the attribute.
    """
    for name, value in attributes.items():
        own = vars(module).get(name)
        if isinstance(own, bool) or not isinstance(own, int if name in WIDTHS else (int, float)):
            raise mismatch(where, name, f"a number that a {type(module).__name__} has")
        if name in WIDTHS:
            _whole(value, f"{where}.{name}", most=own)
