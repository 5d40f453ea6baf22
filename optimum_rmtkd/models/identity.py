"""Is a model what its class and config say it is? A narrow one is rebuilt from these two, so the answer must be yes.

Asked in two steps: `check_structure` here, before any data is read, against a twin without weights;
`behaviour.check_behaviour` on the first batch, against a twin that shares the model's own tensors. What differs
without changing an output (a dropout rate, a hook that looks on) is carried over by `rebuilding.carry_over`.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
import transformers
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from .. import modeling_rmtkd
from ..errors import RMTKDError, UnsupportedArchitectureError
from ..modeling_rmtkd import PREFIX
from ..validation.wording import shown
from .carrying import is_wrapped
from .differences import AROUND_THE_RESULT, ON_THE_RESULT, differences, not_its_config
from .rebuilding import as_tied, blank


__all__ = ["check_kind", "check_structure"]


def check_structure(model: Any) -> None:
    """Refuse a model that its class and config do not describe, before anything is computed.

    Raises:
        RMTKDError: no PreTrainedModel: a wrapper, an adapter, a plain module.
        UnsupportedArchitectureError: a class that transformers does not have; weights that are quantised, offloaded,
            masked or parametrised; modules, shapes, ties or attributes that differ. Names the modules, and the field
            of the config where there is one.
    """
    check_kind(model)
    _check_class(type(model))
    _check_config(model)
    stock = blank(model)
    _check_weights(model, stock)
    if found := differences(model, stock):
        raise not_its_config(model, found)
    _check_ties(model, stock)
    _check_forwards(model)


def check_kind(model: Any) -> None:
    """
    Raises:
        RMTKDError: no PreTrainedModel: its name, its class, a wrapper, an adapter, a plain module.
    """
    if isinstance(model, PreTrainedModel):
        return
    name, inner = type(model).__name__, _unwrapped(model)
    adapters = getattr(model, "peft_config", {})
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in dict(adapters).values()):
        cure = (
            "A prompt is no weight and cannot be merged: narrow the model inside, model.get_base_model(), and tune a "
            "prompt for the result."
        )
    elif hasattr(model, "merge_and_unload") or adapters:
        cure = "Merge the adapter first: model = model.merge_and_unload(); then narrow it, and train a new adapter."
    elif inner is not None:
        cure = f"Pass the model inside it, {inner}."
    elif isinstance(model, (str, os.PathLike)):
        name = f"{name} ({shown(os.fspath(model))})"
        cure = "Load it: AutoModelForSequenceClassification.from_pretrained(name), or the Auto class of your task."
    elif isinstance(model, type):
        name, cure = f"the class {model.__name__}", f"Make one: {model.__name__}.from_pretrained(name)."
    else:
        cure = "Load the model with a class of transformers."
    raise RMTKDError(f"Expected a transformers PreTrainedModel, got {name}. {cure}")


def _unwrapped(model: Any) -> str | None:
    """The attribute of a wrapper (DistributedDataParallel, torch.compile) that holds the model."""
    return next(
        (f"model.{a}" for a in ("module", "_orig_mod", "model") if isinstance(getattr(model, a, None), nn.Module)),
        None,
    )


def _check_class(cls: type) -> None:
    name = cls.__name__
    if cls.__module__.startswith("transformers_modules.") and name.startswith(PREFIX):
        raise UnsupportedArchitectureError(
            f"{name} was loaded with the code of its repository (trust_remote_code), which this package cannot tell "
            "from any other code. Load it again after `import optimum_rmtkd`, without trust_remote_code."
        )
    home = modeling_rmtkd if name.startswith(PREFIX) else transformers
    stock = getattr(home, name, None)
    if stock is cls:
        return
    stocks = [c.__name__ for c in cls.__mro__ if getattr(transformers, c.__name__, None) is c]
    parent = next((name for name in stocks if not name.endswith("PreTrainedModel")), None)
    cure = f"Load the weights into transformers.{parent}, which it derives from: {ON_THE_RESULT}"
    if parent is None:
        cure = AROUND_THE_RESULT
    why = (
        f"{name} of {cls.__module__} is not the class of that name in transformers"
        if stock is not None
        else f"{name} is no class of transformers"
    )
    raise UnsupportedArchitectureError(
        f"{why}, from which a narrowed checkpoint would be rebuilt: what it does differently would be lost. {cure}; "
        "or contribute the class."
    )


def _check_config(model: PreTrainedModel) -> None:
    try:
        copy.deepcopy(model.config)
    except (TypeError, RuntimeError) as error:
        raise UnsupportedArchitectureError(
            f"The config of {type(model).__name__} cannot be copied ({error}), nor saved: it holds something beside "
            "numbers, words and lists of them. Keep that as an attribute of the model instead."
        ) from error


# -- the weights ------------------------------------------------------------------------------------------------------


def _check_weights(model: PreTrainedModel, stock: PreTrainedModel) -> None:
    """Weights that are something else than plain tensors on one device, unless the class makes them so."""
    if getattr(model, "_hf_peft_config_loaded", False) or any(hasattr(m, "base_layer") for m in model.modules()):
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} carries an adapter (PEFT), whose layers a narrow model would not have. Merge it "
            "first, peft's PeftModel.merge_and_unload() or model.delete_adapter(), then narrow, then adapt anew."
        )
    if beside := [path for path, m in model.named_modules() if hasattr(m, "modules_to_save")]:
        raise UnsupportedArchitectureError(
            f"{beside[0]} of {type(model).__name__} is wrapped by PEFT, which trained a copy of it beside an adapter. "
            f"PeftModel.merge_and_unload() puts the copy in its place; where there is none, by hand: "
            f"model.{beside[0]} = model.{beside[0]}.modules_to_save['default']."
        )
    if away := [name for name, tensor in model.named_parameters() if is_lazy(tensor) or tensor.is_meta]:
        raise UnsupportedArchitectureError(
            f"{len(away)} tensor(s) of {type(model).__name__} are offloaded or empty (device meta), the first is "
            f"{away[0]}: surgery needs all weights. Load the model whole, from_pretrained(..., device_map=None); one "
            "that memory has no room for is cut from its folder, optimum_rmtkd.narrow_streamed(folder, out, data)."
        )
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} was made, or is to be cut, under torch.inference_mode: surgery needs gradients. "
            "Load it and call this outside of that context."
        )
    places = sorted({str(tensor.device) for tensor in model.parameters()})
    if len(places) > 1:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} is spread over {', '.join(places)} (device_map): surgery needs it on one device. "
            "Load it with device_map=None and move it with model.to(device); one that no device has room for is cut "
            "on the host from its folder, optimum_rmtkd.narrow_streamed(folder, out, data)."
        )
    _check_quantised(model)
    if compiled := [path for path, module in model.named_modules() if isinstance(module, OptimizedModule)]:
        raise UnsupportedArchitectureError(
            f"{compiled[0]} of {type(model).__name__} is wrapped by torch.compile, which neither class nor config "
            f"says. Put back what is inside (model.{compiled[0]} = model.{compiled[0]}._orig_mod), or compile in "
            f"place: model.{compiled[0]}.compile()."
        )
    usual = {path for path, module in stock.named_modules() if _reparametrised(module)}
    changed = {
        path: how for path, module in model.named_modules() if path not in usual and (how := _reparametrised(module))
    }
    if changed:
        path, (what, cure) = next(iter(changed.items()))
        raise UnsupportedArchitectureError(
            f"{len(changed)} module(s) of {type(model).__name__} compute their weights from others ({what}), which "
            f"neither class nor config says; the first is {path}. Make them plain first: {cure}."
        )


def _check_quantised(model: PreTrainedModel) -> None:
    plain = (torch.Tensor, nn.Parameter)
    odd = [
        name
        for name, p in model.named_parameters()
        if type(p) not in plain or type(p.data) is not torch.Tensor or not p.is_floating_point() or p.itemsize < 2
    ]
    packed = [path for path, module in model.named_modules() if "quantized" in type(module).__module__.split(".")]
    if odd or packed or getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        first = (odd or packed or ["its config's quantization_config"])[0]
        raise UnsupportedArchitectureError(
            f"The weights of {type(model).__name__} are quantised or sharded ({first}): surgery needs plain floating "
            "tensors. Load the checkpoint it was made from without quantization_config (or call model.dequantize()), "
            "narrow that one, and quantise the result."
        )


def _reparametrised(module: nn.Module) -> tuple[str, str] | None:
    """(what, cure) where a module computes its weight from other tensors."""
    own = set(module._parameters)
    if parametrize.is_parametrized(module):
        return "parametrizations", 'torch.nn.utils.parametrize.remove_parametrizations(module, "weight")'
    if any(f"{name}_mask" in module._buffers and f"{name}_orig" in own for name in _stems(own, "_orig")):
        return "pruning masks", 'torch.nn.utils.prune.remove(module, "weight")'
    if any(f"{name}_v" in own for name in _stems(own, "_g")):
        return "weight norm", "torch.nn.utils.remove_weight_norm(module)"
    if any(f"{name}_u" in module._buffers for name in _stems(own, "_orig")):
        return "spectral norm", "torch.nn.utils.remove_spectral_norm(module)"
    return None


def _stems(names: set[str], ending: str) -> list[str]:
    return [name.removesuffix(ending) for name in names if name.endswith(ending)]


def _check_ties(model: PreTrainedModel, stock: PreTrainedModel) -> None:
    ours, theirs = _ties(model), _ties(as_tied(stock, model))
    if ours != theirs:
        names = sorted({name for group in ours ^ theirs for name in group})
        listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise UnsupportedArchitectureError(
            f"{listed} of {type(model).__name__} {'share' if ours - theirs else 'do not share'} their "
            "memory, where class and config describe the contrary: a narrow model, rebuilt from these, would be tied "
            f"otherwise. Set config.tie_word_embeddings = {bool(ours - theirs)} if that says it; else make them what "
            "the config describes (model.tie_weights())."
        )


def _ties(model: nn.Module) -> set[frozenset[str]]:
    """Groups of names of one parameter."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in groups.values() if len(group) > 1}


def _check_forwards(model: nn.Module) -> None:
    for path, module in model.named_modules():
        patch = vars(module).get("forward")
        if patch is None or is_wrapped(module) or getattr(patch, "__self__", None) is module:
            continue
        raise UnsupportedArchitectureError(
            f"{path or 'The model'} ({type(module).__name__}) has a forward of its own that is no method of it "
            f"({getattr(patch, '__qualname__', type(patch).__name__)}): neither class nor config says so, and in a "
            "copy it would still run the layers of this model. Undo it (del module.forward), narrow, and patch the "
            "result; or bind it: module.forward = types.MethodType(function, module)."
        )
