"""What an instance of a model has beyond its class, config and weights, and how it comes over to another instance."""

from __future__ import annotations

import copy
import functools
import logging
import operator
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .depth import block_names
from .rebuilding import PINNED, blank, relatives
from .scratch import released


__all__ = ["carry_over", "copied", "is_bare", "is_plain", "is_untrained", "is_users_hook", "is_wrapped", "own_forward"]

logger = logging.getLogger(__name__)

# What accelerate and transformers keep on an instance that is in use: it belongs to this instance, not to the model.
RUNTIME = frozenset(
    (
        *vars(nn.Module()),
        "config",
        "generation_config",
        "forward",
        "hf_device_map",
        "name_or_path",
        "warnings_issued",
        "all_tied_weights_keys",
        "_tied_weights_keys",
        "_original_forward",
        "_old_forward",
        "_hf_hook",
        "_is_accelerate_prepared",
        "_is_hf_initialized",
        "_weight_conversions",  # names in the files that it was loaded from; the new class has names of its own there
        "_output_capturing_hooks_installed",
        "_compiled_call_impl",
    )
)
HOOKS = (  # where torch keeps them, who registers them, and {option: where it keeps the numbers of those that have it}
    ("_forward_pre_hooks", "register_forward_pre_hook", {"with_kwargs": "_forward_pre_hooks_with_kwargs"}),
    (
        "_forward_hooks",
        "register_forward_hook",
        {"with_kwargs": "_forward_hooks_with_kwargs", "always_call": "_forward_hooks_always_called"},
    ),
    ("_backward_pre_hooks", "register_full_backward_pre_hook", {}),
    ("_backward_hooks", "register_full_backward_hook", {}),
    ("_state_dict_pre_hooks", "register_state_dict_pre_hook", {}),
    ("_state_dict_hooks", "_register_state_dict_hook", {}),
    ("_load_state_dict_pre_hooks", "_register_load_state_dict_pre_hook", {}),
    ("_load_state_dict_post_hooks", "register_load_state_dict_post_hook", {}),
)
# whose hooks come back by themselves, or are ours for the time of a cut
RETURNING = ("transformers.utils.output_capturing", "accelerate.", released.__module__)


def carry_over(old: PreTrainedModel, new: PreTrainedModel, root: nn.Module | None = None) -> PreTrainedModel:
    """`new`, in place, with what the instance `old` has beyond its class and config and beyond its weights.

    Carried are, module by module at the same path (where blocks were removed, of the same block): `requires_grad`;
    attributes that the class does not set, or sets otherwise (dropout rates, a loss function, tags); methods bound to
    the instance, bound anew; modules without parameters; buffers of the user's; hooks; attributes of parameters; and
    the generation config. Where an attribute refers to a module or a method of `old`, it refers to that of `new`
    afterwards.

    Args:
        root: what such references to `old` itself are to be; default: `new`.
    """
    stock, name = blank(old), block_names(old, new)
    twins, students = dict(stock.named_modules()), dict(new.named_modules())
    places = {path: place for path, _ in old.named_modules() if (place := name(path)) in students}
    known = {id(module): students[places[path]] for path, module in old.named_modules() if path in places}
    known[id(old)] = new if root is None else root
    _carry_flags(old, new, name)
    if getattr(old, "generation_config", None) is not None:
        new.generation_config = copy.deepcopy(old.generation_config)
    triples = [(m, twins[p], students[places[p]]) for p, m in old.named_modules() if p in twins and p in places]
    for triple in triples:
        _carry_modules(*triple)
        _carry_buffers(*triple)
        known |= _carry_hooks(*triple)
    for triple in triples:
        _carry_attributes(*triple, known)
    if hooked := [name for name, parameter in old.named_parameters() if parameter._backward_hooks]:
        logger.warning(
            "%d parameter(s) have hooks of their own, the first is %s: they do not follow into the new model, whose "
            "tensors are others. Register them again.",
            len(hooked),
            hooked[0],
        )
    return new


def _carry_flags(old: nn.Module, new: nn.Module, place: Callable[[str], str | None]) -> None:
    """Frozen parameters stay frozen by name; a new one (a factor in place of a layer) where its relatives all are.
    Attributes of parameters (that optimizers read) stay on those of the same name."""
    known = {found: parameter for name, parameter in old.named_parameters() if (found := place(name)) is not None}
    for name, parameter in new.named_parameters():
        if name in known:
            parameter.requires_grad_(known[name].requires_grad)
            vars(parameter).update({k: v for k, v in vars(known[name]).items() if k not in RUNTIME})
        elif family := relatives(name, known):
            parameter.requires_grad_(any(other.requires_grad for other in family))


def is_bare(module: nn.Module) -> bool:
    """Without a tensor of its own or beneath it: an activation, a dropout, a criterion."""
    return next(module.parameters(), None) is None and next(module.buffers(), None) is None


def is_untrained(module: nn.Module) -> bool:
    """Without a parameter of its own or beneath it; a criterion may hold the weights of classes in a buffer."""
    return next(module.parameters(), None) is None


def _carry_modules(module: nn.Module, stock: nn.Module, new: nn.Module) -> None:
    for name, child in module._modules.items():
        if child is None:
            continue
        other = stock._modules.get(name)
        if other is None and is_untrained(child):
            setattr(new, name, copied(child))
        elif other is not None and is_bare(child) and is_bare(other) and type(child) is not type(other):
            setattr(new, name, copied(child))


def copied(module: nn.Module, instead: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy. Attributes that cannot be copied (a lock, a file, an output that was kept) are shared with it.

    Args:
        instead: {id of an object inside: what the copy has in its place}, for example other tensors.
    """
    instead = dict(instead or {})
    try:
        return copy.deepcopy(module, dict(instead))
    except (TypeError, RuntimeError):
        whole = list(module.modules())
        values = [value for m in whole for name, value in vars(m).items() if name not in RUNTIME]
        shared = {id(value): value for value in values if not _can_be_copied(value, whole)}
        return copy.deepcopy(module, shared | instead)


def _can_be_copied(value: Any, modules: list[nn.Module]) -> bool:
    """Whether an attribute can be, apart from the modules that it refers to."""
    try:
        copy.deepcopy(value, {id(module): module for module in modules})
    except (TypeError, RuntimeError):
        return False
    return True


def _carry_buffers(module: nn.Module, stock: nn.Module, new: nn.Module) -> None:
    fleeting = module._non_persistent_buffers_set
    for name, buffer in module._buffers.items():
        ours = new._buffers.get(name)
        if name not in stock._buffers and name not in new._buffers:
            copied = None if buffer is None else buffer.detach().clone()
            new.register_buffer(name, copied, name not in fleeting)
        elif name in fleeting and buffer is not None and ours is not None and ours.shape == buffer.shape:
            ours.copy_(buffer)  # state that goes with plain attributes: frequencies stretched for a length


def _carry_attributes(module: nn.Module, stock: nn.Module, new: nn.Module, known: Mapping[int, Any]) -> None:
    theirs = vars(stock)
    if (forward := own_forward(module)) is not None:
        new.forward = moved(forward, known)
    for name, value in vars(module).items():
        if name in RUNTIME:
            continue
        if name in PINNED and name in theirs:
            continue  # the spec states it
        if name not in theirs or (is_plain(value) and is_plain(theirs[name]) and value != theirs[name]):
            new.__dict__[name] = moved(value, known)


def moved(value: Any, known: Mapping[int, Any]) -> Any:
    """A value with the modules, methods and hook handles of the old model in it replaced by those of the new one.

    Args:
        known: {id of an old module, or number of an old hook: what stands for it}. What is not known stays the object
            it is; containers of the basic types, methods and `functools.partial` are made anew.
    """
    if isinstance(value, nn.Module):
        return known.get(id(value), value)
    if isinstance(value, RemovableHandle):
        return known.get(value.id, value)
    if isinstance(value, types.MethodType):
        return types.MethodType(_rebound(value.__func__, known), moved(value.__self__, known))
    if type(value) is functools.partial:
        arguments = [moved(item, known) for item in value.args]
        return functools.partial(moved(value.func, known), *arguments, **moved(value.keywords, known))
    if type(value) in (list, tuple):
        return type(value)(moved(item, known) for item in value)
    if isinstance(value, (list, dict, set)):
        made = copy.copy(value)
        if isinstance(made, dict):
            made.update({key: moved(item, known) for key, item in value.items()})
        return made
    return value


def _rebound(function: Any, known: Mapping[int, Any]) -> Any:
    """A function whose closure refers to modules and methods of the new model where it referred to those of the old:
    `original = model.forward; model.forward = MethodType(lambda self, **inputs: original(**inputs), model)` is how
    libraries patch a forward. Itself where there is nothing of the kind."""
    if not isinstance(function, types.FunctionType) or not function.__closure__:
        return function
    cells = [_rebound_cell(cell, known) for cell in function.__closure__]
    if all(map(operator.is_, cells, function.__closure__)):
        return function
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    for name in ("__kwdefaults__", "__qualname__", "__module__", "__doc__", "__annotations__"):
        setattr(made, name, getattr(function, name))
    made.__dict__.update(function.__dict__)
    return made


def _rebound_cell(cell: types.CellType, known: Mapping[int, Any]) -> types.CellType:
    try:
        value = cell.cell_contents
    except ValueError:  # not filled yet
        return cell
    owner = value.__self__ if isinstance(value, types.MethodType) else value
    return types.CellType(moved(value, known)) if isinstance(owner, nn.Module) and id(owner) in known else cell


def own_forward(module: nn.Module) -> types.MethodType | None:
    """The forward that was bound to this instance, without what accelerate wraps it in, which comes and goes with
    `prepare`; None where it is that of its class."""
    bound = vars(module).get("_original_forward" if is_wrapped(module) else "forward")
    if not isinstance(bound, types.MethodType) or bound.__self__ is not module:
        return None
    return None if bound.__func__ is type(module).forward else bound


def is_wrapped(module: nn.Module) -> bool:
    """Whether accelerate has wrapped the forward of this module (autocast, or hooks of a device map)."""
    return "_original_forward" in vars(module) or "_hf_hook" in vars(module)


def is_plain(value: Any) -> bool:
    """A value that says all of itself: numbers, words, and tuples of them."""
    return (
        value is None
        or isinstance(value, (bool, int, float, str, torch.dtype))
        or (isinstance(value, (tuple, list)) and all(map(is_plain, value)))
    )


def _carry_hooks(module: nn.Module, stock: nn.Module, new: nn.Module) -> dict[int, RemovableHandle]:
    """The hooks that the class does not register itself, in place of those that `new` may have of an earlier life;
    {number of an old one: handle of the new one}."""
    handles = {}
    for store, register, flags in HOOKS:
        usual = {_what(hook) for hook in getattr(stock, store).values()}
        for number, hook in list(getattr(new, store).items()):
            if _what(hook) not in usual and is_users_hook(hook):
                _handle(new, store, number, flags).remove()
        for number, hook in getattr(module, store).items():
            if _what(hook) in usual or not is_users_hook(hook):
                continue
            options = {option: True for option, numbers in flags.items() if number in getattr(module, numbers)}
            if store == "_load_state_dict_pre_hooks":  # torch keeps it in a wrapper
                hook, options = hook.hook, {"with_module": hook.with_module}
            if store == "_backward_hooks" and module._is_full_backward_hook is False:
                register = "register_backward_hook"
            if getattr(hook, "_from_public_api", False):
                register = "register_state_dict_post_hook"
            handles[number] = getattr(new, register)(hook, **options)
    return handles


def _handle(module: nn.Module, store: str, number: int, flags: Mapping[str, str]) -> RemovableHandle:
    handle = RemovableHandle(getattr(module, store), extra_dict=[getattr(module, name) for name in flags.values()])
    handle.id = number
    return handle


def _what(hook: Any) -> Any:
    """The code of a hook, also of one that is bound to its module, made anew for each, or wrapped by torch."""
    hook = getattr(hook, "hook", hook)
    hook = getattr(hook, "__func__", hook)
    return getattr(hook, "__code__", id(hook))


def is_users_hook(hook: Any) -> bool:
    """Whether a hook was put there on purpose, and not by a library that puts it back where it needs it."""
    return not f"{getattr(hook, '__module__', None) or type(hook).__module__}.".startswith(RETURNING)
