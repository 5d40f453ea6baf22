"""A model made anew: as its class and config describe it, or narrower; and what an instance has beyond them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from ..modeling_rmtkd import reduced_class
from ..spec_rmtkd import EPSILONS
from .scratch import Scratch, in_files


__all__ = [
    "as_tied",
    "blank",
    "match_precision",
    "pinned",
    "rebuilt",
    "relatives",
    "sharing_tensors",
    "twin_of",
    "widest_dtype",
    "with_computed_buffers",
]

# Plain numbers that decide what a layer computes, and that few configs state: the spec of a narrow model states them.
PINNED = ("eps", "variance_epsilon", "scaling", "scale", "softmax_scale", "negative_slope", "momentum")


def blank(model: PreTrainedModel, config: Any = None) -> PreTrainedModel:
    """What the class of `model` builds from its config (or from `config`), in eval mode, without memory: every tensor
    is on the meta device, tied ones are tied."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return type(model)(copy.deepcopy(model.config if config is None else config)).eval()


def with_computed_buffers(model: PreTrainedModel) -> PreTrainedModel:
    """As `blank`, but the buffers hold what the class computes from the config. Parameters that it ties by assignment
    may be apart."""
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        return type(model)(copy.deepcopy(model.config)).eval()


def sharing_tensors(stock: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
    """`stock`, in place, with the memory of the parameters and buffers of `model`, its ties, and the numbers of its
    layers; tensors must not be changed in place. The two have the same modules (`identity.check_structure`).

    Buffers that are not saved, and that `stock` has computed itself (`with_computed_buffers`), stay its own, in the
    dtype and on the device of the model's.
    """
    for path, numbers in pinned(model, stock).items():
        vars(stock.get_submodule(path)).update(numbers)
    parameters = {id(p): nn.Parameter(p.detach()) for p in model.parameters()}
    ours = dict(model.named_modules(remove_duplicate=False))
    for path, module in stock.named_modules():
        for name in module._parameters:
            if (tensor := ours[path]._parameters[name]) is not None:
                module._parameters[name] = parameters[id(tensor)]
        for name, own in module._buffers.items():
            held = ours[path]._buffers[name]
            computed = name in module._non_persistent_buffers_set and own is not None and not own.is_meta
            module._buffers[name] = own.to(held) if computed and held is not None else held
    return stock


def pinned(model: nn.Module, stock: nn.Module) -> dict[str, dict[str, float]]:
    """{module path: {attribute: number}} of the layers that have another epsilon or scale than `stock`."""
    theirs, found = dict(stock.named_modules()), {}
    for path, module in model.named_modules():
        ours, usual = vars(module), vars(theirs[path]) if path in theirs else {}
        numbers = {n: ours[n] for n in PINNED if isinstance(usual.get(n), float) and isinstance(ours.get(n), float)}
        if changed := {name: value for name, value in numbers.items() if value != usual[name]}:
            found[path] = changed
    return found


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """The stock model with the tensors of `model`: a new object in eval mode, without hooks, patches and attributes of
    the user's. See `sharing_tensors`."""
    return sharing_tensors(as_tied(blank(model), model), model)


def widest_dtype(model: nn.Module) -> torch.dtype:
    """The floating dtype that holds the values of all parameters of a model."""
    return functools.reduce(torch.promote_types, {p.dtype for p in model.parameters() if p.is_floating_point()})


def as_tied(model: PreTrainedModel, reference: PreTrainedModel) -> PreTrainedModel:
    """`model`, in place, without the ties that its class describes and that `reference` does not have, because its
    checkpoint held both tensors: transformers takes note of that when it loads them (T5 v1.1, whose output layer is
    its own, while its config says that it is tied)."""
    apart = model.all_tied_weights_keys.keys() - reference.all_tied_weights_keys.keys()
    for name in apart & {name for name, _ in reference.named_parameters(remove_duplicate=False)}:
        owner, _, leaf = name.rpartition(".")
        tensor = model.get_parameter(name)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.detach().clone(), tensor.requires_grad))
        model.all_tied_weights_keys.pop(name)
    return model


def match_precision(model: nn.Module, reference: nn.Module, scratch: Scratch | None = None) -> nn.Module:
    """`model` with the dtypes that `reference` has, in place: tensor by tensor where both have it, else that of the
    nearest relative (the other tensors of the smallest module around it).

    Args:
        scratch: where tensors of another dtype are put.
    """
    known = {name: t for name, t in _tensors(reference) if t.is_floating_point()}
    for name, tensor in _tensors(model):
        if tensor.is_floating_point() and tensor.dtype != (dtype := _nearest(name, known)):
            in_file = scratch is not None and not tensor.is_meta
            tensor.data = scratch.keep(tensor, dtype) if in_file else tensor.data.to(dtype)
            if in_file:
                scratch.release()
    return model


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _nearest(name: str, known: Mapping[str, torch.Tensor]) -> torch.dtype:
    if name in known:
        return known[name].dtype
    family = relatives(name, known)
    return family[0].dtype if family else next(iter(known.values())).dtype


def relatives(name: str, known: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of the smallest module around `name` of which `known` has any; where one of them has its last word
    ("dense.weight" for "dense.up.weight"), that one alone."""
    leaf = name.rpartition(".")[2]
    while "." in name:
        name = name.rpartition(".")[0]
        if family := {other: tensor for other, tensor in known.items() if other.startswith(name + ".")}:
            return [family[f"{name}.{leaf}"]] if f"{name}.{leaf}" in family else list(family.values())
    return []


def rebuilt(
    model: PreTrainedModel,
    rmtkd: dict[str, Any],
    fields: Mapping[str, Any] | None = None,
    scratch: Scratch | None = None,
) -> PreTrainedModel:
    """A new model of the architecture that `rmtkd` (spec and all) describes, in eval mode, in the dtypes and on the
    device of `model`; tensors of the same name and shape are copied, the others are as initialised.

    Numbers of layers that no config states (`pinned`) enter the spec; what else `model` is beyond its class and config
    comes along with `carry_over`.

    Args:
        fields: fields of the config that change.
        scratch: where its parameters are put; those that are not copied are zero then.
    """
    rmtkd = rmtkd | {"spec": _with_pinned(model, rmtkd["spec"])}
    if scratch is None:
        student = as_tied(outline(model, rmtkd, fields).to(device=model.device), model)
        student = match_precision(student, model).eval()
    else:
        with init_empty_weights(include_buffers=False):
            student = as_tied(outline(model, rmtkd, fields), model)
        student = in_files(match_precision(student, model), scratch).eval()
        student.tie_weights(recompute_mapping=False)
    old = dict(_tensors(model))  # not its state dict, whose hooks may rename tensors
    with torch.no_grad():
        for name, tensor in _tensors(student):
            if name in old and old[name].shape == tensor.shape:
                tensor.copy_(old[name])
    return student


def outline(model: PreTrainedModel, rmtkd: dict[str, Any], fields: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """The same without anything of `model` but its config: its weights are as initialised, on the default device."""
    model_class = reduced_class(type(model))
    values = model.config.to_dict()
    for name in ("model_type", "transformers_version", "architectures", "auto_map"):
        values.pop(name, None)
    config = model_class.config_class(**values)
    for name, value in (fields or {}).items():
        setattr(config, name, value)
    config.rmtkd = rmtkd
    config._attn_implementation = model.config._attn_implementation
    return model_class(config)


def _with_pinned(model: PreTrainedModel, spec: Mapping[str, Any]) -> dict[str, Any]:
    """The spec with the numbers of layers that differ from what the class makes; those that the spec says itself (the
    epsilon of a norm over fewer features) stand."""
    attrs = {path: dict(values) for path, values in spec.get("attrs", {}).items()}
    prefix = "" if model.base_model is model else model.base_model_prefix + "."
    for path, numbers in pinned(model, blank(model)).items():
        raw = "@." + path.removeprefix(prefix) if path.startswith(prefix) else path
        said = spec.get("modules", {}).get(raw, {})
        said = {*said, *EPSILONS} if "eps" in said else said
        attrs[raw] = {name: n for name, n in numbers.items() if name not in said} | attrs.get(raw, {})
    return {**spec, "attrs": attrs}
