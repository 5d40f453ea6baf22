"""Does a model compute what its class and config describe? Its outputs on one batch, beside those of a stock twin."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..batches import evaluating, run
from ..errors import UnsupportedArchitectureError
from .carrying import carry_over, is_plain, is_users_hook, is_wrapped
from .differences import ON_THE_RESULT, differences, field_that_says_so
from .rebuilding import blank, sharing_tensors, with_computed_buffers


__all__ = ["check_behaviour", "nearly_equal"]

CANNOT_RUN = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)
SAMPLED = 4096  # values of each output that are compared, evenly spaced


def check_behaviour(model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Run a batch through the model and through its twin, and compare the outputs of every
    module, up to rounding.

    Raises:
        UnsupportedArchitectureError: they differ; names the first module that computes something else, and what of it
            differs from what class and config describe.
    """
    twin = sharing_tensors(with_computed_buffers(model), model)
    with evaluating(model), stock_forward(model):
        ours = _outputs(model, batch)
    try:
        theirs = _outputs(twin, batch)
    except CANNOT_RUN as error:
        raise _computes_something_else(model, twin, "", f"its class alone cannot run the batch: {error}") from error
    _check_buffers(model, twin)
    known = dict(model.named_modules())  # one activation in several places has the first of their names
    for path in theirs:
        if path in known and (path not in ours or not _close(ours[path], theirs[path])):
            raise _computes_something_else(model, twin, path)
    _check_bound(model, batch)


def patched(model: nn.Module) -> dict[str, Callable[..., Any]]:
    """{path: function} of the modules whose forward was bound to the instance."""
    return {
        path: vars(module)["forward"].__func__
        for path, module in model.named_modules()
        if isinstance(vars(module).get("forward"), types.MethodType) and not is_wrapped(module)
    }


def _check_bound(model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """A forward that is bound to a copy must run the layers of the copy."""
    functions = patched(model)
    if not functions:
        return
    copied = carry_over(model, sharing_tensors(with_computed_buffers(model), model))
    first, function = next(iter(functions.items()))
    watch = _Watch(model.parameters())
    try:
        with watch:
            _outputs(copied.eval(), batch)
        how = "runs the layers of this very model, through a variable instead of `self`"
    except CANNOT_RUN as error:
        watch.seen, how = True, f"cannot run there ({error})"
    if watch.seen:
        raise UnsupportedArchitectureError(
            f"{first or 'The model'} has a forward of its own ({function.__qualname__}), and bound to a copy it "
            f"{how}: a narrow model would not compute with its own weights. Call the original as "
            "type(self).forward(self, ...) in it, or undo it (del module.forward), narrow, and patch the result."
        )


class _Watch(TorchFunctionMode):
    """Notes whether any of some tensors takes part in a computation."""

    def __init__(self, tensors: Iterable[torch.Tensor]):
        self.watched, self.seen = {id(t) for t in tensors}, False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen = self.seen or any(id(leaf) in self.watched for leaf in tree_leaves((args, kwargs)))
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def stock_forward(model: nn.Module) -> Iterator[None]:
    """Without the wrapper (autocast) that accelerate puts around the forward of a prepared model."""
    wrapper = vars(model).pop("forward", None) if is_wrapped(model) else None
    try:
        yield
    finally:
        if wrapper is not None:
            model.forward = wrapper


def _outputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, list[torch.Tensor]]:
    """{path: values of what the module returned at its first call}, in the order in which modules return: parts
    before the whole."""
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(path: str, output: Any) -> None:
        if path not in seen:
            seen[path] = _values(output)

    handles = [
        module.register_forward_hook(lambda _module, _args, output, path=path: keep(path, output))
        for path, module in model.named_modules()
    ]
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _values(output: Any) -> list[torch.Tensor]:
    """At most SAMPLED evenly spaced values of each tensor in an output, copied to the CPU: a view would keep the whole
    tensor alive."""
    if isinstance(output, torch.Tensor):
        flat = output.detach().reshape(-1)
        return [flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].to("cpu", copy=True)]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [value for item in output for value in _values(item)] if isinstance(output, (tuple, list)) else []


def _close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(nearly_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def nearly_equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Two tensors of one shape, equal up to rounding: within the square root of the coarser machine epsilon of what is
    expected, in the mean square. NaN equals NaN."""
    if found.shape != expected.shape:
        return False
    if not (found.is_floating_point() and expected.is_floating_point()):
        return torch.equal(found, expected)
    epsilon = max(torch.finfo(found.dtype).eps, torch.finfo(expected.dtype).eps)
    a, b = (torch.nan_to_num(x.double(), nan=1.0, posinf=2.0, neginf=-2.0) for x in (found, expected))
    return bool((a - b).norm() <= epsilon**0.5 * b.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _check_buffers(model: nn.Module, stock: nn.Module) -> None:
    """What a class computes from its config and does not save must still be that, after the same pass (some follow
    the length of what they have seen)."""
    theirs = dict(stock.named_modules())
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            computed = theirs[path]._buffers.get(name) if path in theirs else None
            held = module._buffers.get(name)
            if computed is not None and held is not None and not _close(_values(held), _values(computed)):
                raise UnsupportedArchitectureError(
                    f"Buffer {path}.{name} of {type(model).__name__} holds other values than its class computes from "
                    f"the config; it is not saved, so that a narrow model would lose them. Put the change into the "
                    f"config, or {ON_THE_RESULT}."
                )


def _computes_something_else(
    model: PreTrainedModel, twin: nn.Module, path: str, how: str | None = None
) -> UnsupportedArchitectureError:
    ours, theirs = (dict(m.named_modules(remove_duplicate=False)) for m in (model, twin))
    odd = {at: _oddities(ours[at], theirs[at], at) for at in theirs if at in ours}
    reasons = [text for at in _around(path) for text in odd.get(at, ())] or [
        t for texts in odd.values() for t in texts
    ]
    field = field_that_says_so(model, differences(model, blank(model), activations=True))
    cure = (
        f"Say so in the config: model.config.{field}."
        if field
        else f"Put the change into the config if it has a field for it; else {ON_THE_RESULT}."
    )
    how = how or (
        f"the first module whose output differs is {path or 'the model itself'} ({type(ours.get(path)).__name__})"
    )
    return UnsupportedArchitectureError(
        f"{type(model).__name__} computes something else than its class and config describe, from which a narrow "
        f"model is rebuilt: {how}. {'; '.join(reasons[:3]) or 'None of its attributes tells why'}. {cure}"
    )


def _around(path: str) -> list[str]:
    """The module and those it lies in."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]


def _oddities(module: nn.Module, stock: nn.Module, path: str) -> list[str]:
    """What of one module is not as its class makes it."""
    where, found = path or "the model itself", []
    if type(module) is not type(stock):
        found.append(f"{where} is a {type(module).__name__}, the class builds a {type(stock).__name__}")
    if patch := patched(module).get(""):
        found.append(f"{where} has a forward of its own ({patch.__qualname__})")
    hooks = [h for store in (module._forward_hooks, module._forward_pre_hooks) for h in store.values()]
    if named := [getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks if is_users_hook(hook)]:
        found.append(f"{where} has hooks ({', '.join(named)})")
    for name, value in vars(stock).items():
        given = vars(module).get(name, value)
        told = (is_plain(value) and is_plain(given)) or callable(value)
        if told and given != value and name != "training":
            found.append(f"{where} has {name}={given!r}, class and config {value!r}")
    return found
