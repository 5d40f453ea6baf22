"""The layout of convolutional networks: which axes of channels belong together, read off a declaration of paths.

Channels that are added, multiplied entry by entry or passed through a depthwise convolution are one site with one
index: all blocks of a stage and its shortcut. What mixes channels reads one site and writes another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from ..errors import UnsupportedArchitectureError
from .sites import Anatomy, Point, Site, Unit, get_module, has_module, is_layer, linear_shape


__all__ = ["Gate", "ResidualConvLayout", "Step"]


@dataclass(frozen=True)
class Step:
    """One layer that mixes channels, or a depthwise or grouped convolution, and what lies along its channels.

    Attributes:
        path: the convolution or linear layer.
        along: what stands behind it with an entry a channel: norms, bare parameters. A batch norm is the first.
        before: the same in front of it, on the channels that it reads.
    """

    path: str
    along: tuple[str, ...] = ()
    before: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gate:
    """A squeeze-and-excitation of the channels that the steps in front of it wrote: two layers, of which the second
    gives a factor for each channel."""

    reduce: str
    expand: str


@dataclass(frozen=True)
class ResidualConvLayout:
    """Blocks of convolutions, in stages or in a row. Steps that a model lacks are passed over.

    Paths of `inner`, `steps`, `shortcut` are relative to a block, those of `entry` to a stage, the others to the model
    ("@.": to the backbone).

    Attributes:
        stages: the ModuleList of stages, or of blocks, where `blocks` is empty.
        blocks: the blocks of a stage, relative to it.
        steps: the layers of a block in forward order. Empty: those of the Sequential `inner`, each with `convolution`
            and `normalization`.
        shortcut: the layer on the residual path of a block, where that changes the channels.
        adds: blocks without a shortcut add what they read to what they give; or the path of an attribute that says
            whether one does.
        stem, tail: steps before and after the blocks. Without a stem the channels between blocks stay as they are.
        entry: steps at the beginning of a stage.
        last: norms and the like behind the tail.
        heads: layers of task heads that read the last channels.
        output: a module whose input is the last channels, in models without a head as well.
        whole_stages: a stage is run as a whole in the refit, because something stands between its blocks and those of
            the stage before.
        stem_field, sizes_field: fields of the config that state the channels of the stem and of each stage, where
            these and `inner_share` say all widths; None: there is no native shape.
        inner_share: channels inside a block over those of its stage, by `config.layer_type`; "" for all.
    """

    stages: str
    blocks: str = ""
    inner: str = ""
    convolution: str = "convolution"
    normalization: str = "normalization"
    steps: tuple[Step | Gate, ...] = ()
    shortcut: Step | None = None
    adds: bool | str = True
    stem: tuple[Step | Gate, ...] = ()
    entry: tuple[Step, ...] = ()
    tail: tuple[Step, ...] = ()
    last: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    output: str = ""
    whole_stages: bool = False
    stem_field: str | None = None
    sizes_field: str | None = None
    inner_share: dict[str, float] = field(default_factory=dict)

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Sites and units of `model`.

        Raises:
            UnsupportedArchitectureError: the model lacks a declared module, or has a grouped convolution that cannot
                be cut by whole groups.
        """
        walk = _Walk(model)
        if self.stem:
            walk.stream()
            walk.chain(_under("", self.stem), "stem", opens=True)
        blocks = []
        for s in range(len(get_module(model, self.stages))):
            stage = f"{self.stages}.{s}"
            count = len(get_module(model, f"{stage}.{self.blocks}")) if self.blocks else 1
            if self.whole_stages:
                blocks.append(stage)
            entry = _under(f"{stage}.", self.entry)
            if self.entry and walk.current is not None:
                walk.inside = stage
                walk.chain(entry, f"stage.{s}", opens=True)
            for b in range(count):
                block = f"{stage}.{self.blocks}.{b}" if self.blocks else stage
                if not self.whole_stages:
                    blocks.append(block)
                walk.inside, walk.depth = blocks[-1], len(blocks) - 1
                self._block(walk, block, f"stage.{s}.{b}" if self.blocks else f"layer.{s}")
        walk.inside, walk.depth = None, len(blocks)
        walk.chain(_under("", self.tail), "tail", opens=True)
        walk.along(self.last)
        for path in self.heads:
            walk.add(Unit(path, walk.current))
        return walk.anatomy(tuple(blocks), self.output)

    def _block(self, walk: _Walk, block: str, name: str) -> None:
        steps = _under(f"{block}.", self.inner_steps(walk.model, block))
        shortcut = _under(f"{block}.", (self.shortcut,) if self.shortcut is not None else ())
        projected = bool(shortcut) and is_layer(walk.model, shortcut[0].path)
        adds = self._adds(walk.model, block) and not projected
        source = walk.current
        walk.chain(steps, name, back=source if adds else None, opens=not adds)
        if projected:
            walk.shortcut(shortcut[0], source)
        elif adds:
            walk.joined(source)

    def _adds(self, model: nn.Module, block: str) -> bool:
        if isinstance(self.adds, bool):
            return self.adds
        owner, _, name = f"{block}.{self.adds}".rpartition(".")
        return bool(getattr(get_module(model, owner), name))

    def inner_steps(self, model: nn.Module, block: str) -> tuple[Step | Gate, ...]:
        """The steps of a block, relative to it."""
        if self.steps:
            return self.steps
        layers = [f"{self.inner}.{i}" for i in range(len(get_module(model, f"{block}.{self.inner}")))]
        return tuple(Step(f"{path}.{self.convolution}", (f"{path}.{self.normalization}",)) for path in layers)


def _under(prefix: str, steps: tuple[Step | Gate, ...]) -> list[Step | Gate]:
    """The same steps with whole paths."""

    def at(path: str) -> str:
        return prefix + path

    return [
        Gate(at(step.reduce), at(step.expand))
        if isinstance(step, Gate)
        else Step(at(step.path), tuple(map(at, step.along)), tuple(map(at, step.before)))
        for step in steps
    ]


class _Walk:
    """Goes through the layers in forward order and notes who reads and writes which channels.

    Attributes:
        current: name of the site that holds the channels at this place; None where they never change.
        inside, depth: block (and its number) that layers belong to.
    """

    def __init__(self, model: nn.Module):
        self.model, self.current = model, None
        self.inside, self.depth, self.streams = None, -1, 0
        self.units: list[Unit] = []
        self.widths: dict[str, int] = {}
        self.kinds: dict[str, str] = {}
        self.depths: dict[str, int] = {}
        self.shares: dict[str, int] = {}
        self.declares_streams = False

    def add(self, unit: Unit) -> None:
        self.units.append(unit)

    def stream(self) -> None:
        """From here on channels between blocks are sites."""
        self.declares_streams = True

    def _site(self, name: str, width: int, depth: int) -> str:
        self.widths[name], self.kinds[name], self.depths[name] = width, "channels", depth
        return name

    def _opened(self, width: int) -> str | None:
        """A new site between blocks."""
        if not self.declares_streams:
            return None
        self.streams += 1
        return self._site(f"stream.{self.streams - 1}", width, -1)

    def joined(self, name: str | None) -> None:
        """Something is added to these channels."""
        if name is not None:
            self.kinds[name] = "residual_channels"

    def along(self, paths: tuple[str, ...]) -> None:
        for path in paths:
            if has_module(self.model, path):
                self.add(Unit(path, writes=self.current, block=self.inside))

    def chain(self, steps: list[Step | Gate], name: str, back: str | None = None, opens: bool = False) -> None:
        """Steps one behind the other. The last one that mixes channels writes `back`, or opens a site between blocks;
        those between write sites of their own.

        Args:
            back: site that the chain's output is added to.
        """
        present = [step for step in steps if is_layer(self.model, _first(step))]
        mixing = [step for step in present if isinstance(step, Step) and not self._by_channel(step)]
        number = 0
        for step in present:
            if isinstance(step, Gate):
                self._gate(step, name)
                continue
            self.along(step.before)
            last = bool(mixing) and step is mixing[-1]
            if self._by_channel(step):
                target = self._shared(step)
            elif last:
                target = self._opened(self._width(step)) if opens else back
            else:
                target = self._site(f"{name}.channels.{number}", self._width(step), self.depth)
                number += 1
            norm = next((path for path in step.along[:1] if self._is_batch_norm(path)), None)
            self.add(Unit(step.path, self.current, target, block=self.inside, norm=norm))
            self.current = target
            self.along(step.along)

    def shortcut(self, step: Step, source: str | None) -> None:
        """A layer that reads `source` and adds to the channels at hand."""
        self.joined(self.current)
        norm = next((path for path in step.along[:1] if self._is_batch_norm(path)), None)
        self.add(Unit(step.path, source, self.current, block=self.inside, norm=norm))
        self.along(step.along)

    def _gate(self, gate: Gate, name: str) -> None:
        width = linear_shape(get_module(self.model, gate.reduce))[1]
        between = self._site(f"{name}.squeeze", width, self.depth)
        self.add(Unit(gate.reduce, self.current, between, block=self.inside))
        self.add(Unit(gate.expand, between, self.current, block=self.inside))

    def _width(self, step: Step) -> int:
        return linear_shape(get_module(self.model, step.path))[1]

    def _by_channel(self, step: Step) -> bool:
        """Whether it is a depthwise or grouped convolution, or was one, of which a single group is left."""
        spec = (getattr(getattr(self.model, "config", None), "rmtkd", None) or {}).get("spec", {})
        was = "groups" in spec.get("modules", {}).get(step.path, {})
        return was or getattr(get_module(self.model, step.path), "groups", 1) > 1

    def _is_batch_norm(self, path: str) -> bool:
        return has_module(self.model, path) and isinstance(get_module(self.model, path), nn.BatchNorm2d)

    def _shared(self, step: Step) -> str | None:
        """The site of a depthwise or grouped convolution: its outputs have the index of its inputs, whole groups."""
        conv = get_module(self.model, step.path)
        if conv.in_channels != conv.out_channels:
            raise UnsupportedArchitectureError(
                f"{step.path!r} of {type(self.model).__name__} is a convolution in {conv.groups} groups from "
                f"{conv.in_channels} to {conv.out_channels} channels: only those with as many channels behind as in "
                "front are cut, by whole groups. Declare a layout without it (optimum_rmtkd.register_family), or use "
                "form='factored'."
            )
        if self.current is not None:
            each = conv.in_channels // conv.groups
            if each % self.shares.get(self.current, 1) and self.shares[self.current] % each:
                raise UnsupportedArchitectureError(
                    f"{step.path!r} of {type(self.model).__name__} has groups of {each} channels, another convolution "
                    f"on the same channels groups of {self.shares[self.current]}: neither divides the other. Declare "
                    "a layout without it (optimum_rmtkd.register_family), or use form='factored'."
                )
            self.shares[self.current] = max(each, self.shares.get(self.current, 1))
        return self.current

    def anatomy(self, blocks: tuple[str, ...], output: str) -> Anatomy:
        sites = {name: self._finished(name, output) for name in self.widths if self._has_places(name, output)}
        units = tuple(
            dataclasses.replace(
                unit,
                reads=unit.reads if unit.reads in sites else None,
                writes=unit.writes if unit.writes in sites else None,
            )
            for unit in self.units
        )
        return Anatomy(sites, units, blocks)

    def _places(self, name: str, output: str) -> Iterator[str]:
        """Paths of the layers that read a site and can make up for what is cut; where none does, of what its channels
        go into."""
        readers = [u.path for u in self.units if u.reads == name and u.writes != name and is_layer(self.model, u.path)]
        ends = name == self.current and output and has_module(self.model, output)
        yield from readers or ([output] if ends else [])

    def _has_places(self, name: str, output: str) -> bool:
        return any(True for _ in self._places(name, output))

    def _finished(self, name: str, output: str) -> Site:
        # all positions cost less than the convolution behind; a few would miss channels that fire rarely
        paths = list(self._places(name, output))
        points = (*[Point(path, "input", whole=True) for path in paths], Point(paths[len(paths) // 2], "input"))
        each = self.shares.get(name, 1)
        parts = (each,) if each > 1 else ()
        return Site(name, self.kinds[name], self.widths[name], points, each, self.depths[name], name, parts)


def _first(step: Step | Gate) -> str:
    return step.reduce if isinstance(step, Gate) else step.path
