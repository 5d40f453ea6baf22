"""Which layers of a task head read the stream: found by turning the stream and looking at what turns with it.

A family declares the heads it knows. Others, of classes that it has not heard of, are found on one batch: the stream
is rotated behind its last layer, what is known to read it gets the rotation undone, and a layer whose input still
changes reads it as well. Where that input is the old one rotated, the layer reads the stream itself (selected, pooled
or reshaped, but feature by feature) and can be narrowed with it; anything else is refused by name. The same is done
with the output of a pooler, whose features are permuted, because an element-wise function follows it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..batches import run
from ..errors import UnsupportedArchitectureError
from ..modeling_rmtkd import TernaryMLP, resolve_path
from ..models import nearly_equal
from .sites import Anatomy, Point, Unit, all_but_the_stream, get_module, is_layer, linear_layers


__all__ = ["with_traced_reads"]


@dataclass(frozen=True)
class _Source:
    """Where `width` features are turned: the output of `module`; `site` is what a reader of it reads."""

    site: str
    module: nn.Module
    width: int
    turn: Callable[[torch.Tensor, bool], torch.Tensor]  # (features last, back) -> turned
    calls: int = 1  # of the module in one pass; the output of the last one is turned


def with_traced_reads(model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any]) -> Anatomy:
    """The anatomy with the layers of the head that read the stream or the pooler and are not declared.

    Args:
        model: in eval mode.
        batch: one batch.

    Raises:
        UnsupportedArchitectureError: something of the head depends on the stream and is no linear layer that reads it;
            names the layer, or the output.
    """
    if any(isinstance(module, TernaryMLP) for module in model.modules()):
        return anatomy  # the cut itself refuses what would change a ternary part
    for source in _sources(model, anatomy):
        anatomy = _traced(model, anatomy, source, batch)
    return anatomy


def _sources(model: nn.Module, anatomy: Anatomy) -> list[_Source]:
    writers = [  # a bare parameter is not called: where one is the last, the block gives what it scales
        u
        for u in anatomy.units
        if u.writes == "hidden" and is_layer(model, u.path) and isinstance(get_module(model, u.path), nn.Module)
    ]
    if "hidden" not in anatomy.sites or not anatomy.blocks or not writers:
        return []
    width, last = anatomy.sites["hidden"].width, writers[-1]
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    order = torch.randperm(width, generator=generator)

    def rotate(x: torch.Tensor, back: bool) -> torch.Tensor:
        return (x.double() @ (rotation.T if back else rotation).to(x.device)).to(x.dtype)

    def permute(x: torch.Tensor, back: bool) -> torch.Tensor:
        return x[..., (order.argsort() if back else order).to(x.device)]

    # a layer that adds to a skip path does not hold the stream; its block does
    sources = [_Source("hidden", get_module(model, anatomy.blocks[-1] if last.skip else last.path), width, rotate)]
    pooler = next((u for u in anatomy.units if u.writes == "pooler" and is_layer(model, u.path)), None)
    return sources + ([_Source("pooler", get_module(model, pooler.path), width, permute)] if pooler else [])


def _traced(model: nn.Module, anatomy: Anatomy, source: _Source, batch: Mapping[str, Any]) -> Anatomy:
    inside = {unit.path for unit in anatomy.units if unit.block is not None}
    known = {u.path for u in anatomy.units if u.reads == source.site} - inside
    candidates = [
        path
        for path in linear_layers(model)
        if path not in {unit.path for unit in anatomy.units}
        and not any(path.startswith(f"{block}.") for block in anatomy.blocks)
    ]
    calls: list[None] = []
    counting = source.module.register_forward_hook(lambda *_: calls.append(None))
    before, outputs = _run(model, candidates, batch)
    counting.remove()
    source = dataclasses.replace(source, calls=len(calls))
    found: list[str] = []
    while True:
        readers = [path for path in (*known, *found) if is_layer(model, path)]
        with _turned(model, source, readers):
            after, turned_outputs = _run(model, candidates, batch)
        changed = next((p for p in after if p not in found and not nearly_equal(after[p], before[p])), None)
        if changed is None:
            break
        if not _turns_with(source, after[changed], before[changed], _features(get_module(model, changed))):
            raise _refused(model, anatomy, f"{resolve_path(model, changed)} reads what was made of it")
        found.append(changed)
    for name, value in turned_outputs.items():
        if not nearly_equal(value, outputs[name]) and not _turns_with(source, value, outputs[name]):
            raise _refused(model, anatomy, f"its output {name!r} depends on it without a linear layer that reads it")
    if not found:
        return anatomy
    site = anatomy.sites[source.site]
    if site.kind == "pooled":  # its features are chosen behind the activation, where they are read
        site = dataclasses.replace(site, points=(Point(found[0], "input"),))
    through = anatomy.last_norm if source.site == "hidden" else None
    copies = {path: before[path].shape[_features(get_module(model, path))] // source.width for path in found}
    units = tuple(Unit(path, source.site, through=through, copies=copies[path]) for path in found)
    return dataclasses.replace(anatomy, units=anatomy.units + units, sites={**anatomy.sites, source.site: site})


def _refused(model: nn.Module, anatomy: Anatomy, how: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"The head of {type(model).__name__} uses the residual stream in a way that no declaration of its family "
        f"covers: {how}. Expected linear layers that read the stream itself. Leave the stream as wide as it is "
        f"(RMTKDConfig({all_but_the_stream(anatomy)})), declare a layout "
        "(optimum_rmtkd.register_family), or use form='factored'."
    )


@contextlib.contextmanager
def _turned(model: nn.Module, source: _Source, readers: list[str]) -> Iterator[None]:
    """The source turns its features, `readers` get them turned back."""

    left = source.calls

    def forth(_module, _args, output):
        nonlocal left
        left -= 1
        if left:
            return output
        if isinstance(output, torch.Tensor):
            return source.turn(output, False)
        return (source.turn(output[0], False), *output[1:])

    def back(module, args):
        at = _features(module)
        each = args[0].movedim(at, -1).unflatten(-1, (-1, source.width))  # it may read several vectors at once
        return (source.turn(each, True).flatten(-2).movedim(-1, at), *args[1:])

    handles = [source.module.register_forward_hook(forth)]
    handles += [get_module(model, path).register_forward_pre_hook(back) for path in readers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _features(module: nn.Module) -> int:
    """The dimension of a layer's input that holds its features."""
    return 1 if hasattr(module, "kernel_size") else -1


def _run(model: nn.Module, paths: list[str], batch: Mapping[str, Any]) -> tuple[dict, dict]:
    """({path: input of the layer}, {name: output}) of one pass, layers in the order of their calls."""
    seen: dict[str, torch.Tensor] = {}

    def keep(path: str, args: tuple) -> None:
        if args and path not in seen:
            seen[path] = args[0].detach()

    handles = [
        get_module(model, path).register_forward_pre_hook(lambda _module, args, path=path: keep(path, args))
        for path in paths
    ]
    devices = [model.device] if model.device.type == "cuda" else []  # manual_seed below seeds those, too
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            outputs = run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    named = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    return seen, {name: value for name, value in named if isinstance(value, torch.Tensor)}


def _turns_with(source: _Source, after: torch.Tensor, before: torch.Tensor | None, features: int = -1) -> bool:
    """Whether a tensor is what it was before, its features, of one vector or of several one behind the other, turned
    like the source's."""
    if before is None or before.dim() < 2 or before.shape[features] % source.width:
        return False
    each = before.movedim(features, -1).unflatten(-1, (-1, source.width))
    return nearly_equal(after, source.turn(each, False).flatten(-2).movedim(-1, features))
