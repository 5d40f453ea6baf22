"""Parts of a network run again and again on the same data while their layers are fitted one after the other.

Nothing is computed twice that has not changed: the stream between two blocks is kept for all batches, and inside a
block the outputs of everything that is finished. Both are kept in a `Store`, so that memory does not grow with the
data.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import Cache

from ..batches import Store, unchunked
from ..models import nearly_equal
from .calibration import observed
from .sites import Point, get_module


__all__ = ["Progress", "Replay", "Scope", "forwards"]


@dataclass(frozen=True)
class _Kept:
    """A tensor by its number in a store."""

    number: int


class _Stop(Exception):
    """Raised inside a forward pass once everything asked for has been seen."""


@dataclass
class Scope:
    """Something that can be run on the data again and again: a block, or the whole model.

    Attributes:
        module: the model.
        run: index of a batch -> output.
        masks: what of each batch is padding, for whoever reads what is seen; the number of them is that of batches.
        root: path of the block that `run` runs; None: the whole model.
        copies: activations are copied when they are seen.
        calls: {path of a module: how often one pass calls it}, where that is more than once; known from whole passes.
    """

    module: nn.Module
    run: Callable[[int], Any]
    masks: list[Any]
    root: str | None = None
    copies: bool = False
    calls: dict[str, int] = field(default_factory=dict)

    def watch(self, index: int, points: Collection[Point]) -> dict[Point, torch.Tensor]:
        """Activations at `points` in batch `index`; the pass ends as soon as all are seen."""
        return (self.attempt(index, points) or self.attempt(index, points))[1]

    def pass_through(self, index: int, points: Collection[Point]) -> tuple[Any, dict[Point, torch.Tensor]]:
        """(output, activations at `points`) of a whole pass over batch `index`."""
        return self.attempt(index, points, True) or self.attempt(index, points, True)

    def attempt(self, index: int, points: Collection[Point], whole: bool = False) -> tuple[Any, dict] | None:
        """(output, activations), the output of a `whole` pass alone; None where something changed an activation in
        place after it was seen: then they are copied from now on, and the next attempt will do. Of a module that is
        called several times, a tuple of its activations."""
        seen: dict[Point, list[tuple[torch.Tensor, int]]] = {}
        missing = sum(self.calls.get(point.path, 1) for point in set(points))

        def see(point: Point, x: torch.Tensor) -> None:
            nonlocal missing
            x = x.detach().clone() if self.copies else x.detach()
            seen.setdefault(point, []).append((x, x._version))
            missing -= 1
            if not whole and not missing:
                raise _Stop

        output = None
        with observed(self.module, points, see), torch.no_grad(), contextlib.suppress(_Stop):
            output = self.run(index)
        if whole:
            self.calls.update({point.path: len(found) for point, found in seen.items() if len(found) > 1})
        if any(x._version != version for found in seen.values() for x, version in found):
            self.copies = True
            return None
        several = {point: tuple(x for x, _ in found) for point, found in seen.items()}
        return output, {point: found if len(found) > 1 else found[0] for point, found in several.items()}


class Replay:
    """Runs the blocks of one model one at a time, from hidden states held between them."""

    def __init__(self, model: nn.Module, blocks: tuple[str, ...], whole: Scope):
        self.model, self.masks, self.counted, self.at = model, whole.masks, whole.calls, 0
        self.blocks = blocks
        self._beside: tuple | None = (
            None  # what the blocks return beside the stream, in a tuple; None: the stream alone
        )
        device = next(model.parameters()).device
        self._stream = Store(device)
        # what each block is given beside the stream: its structure, and each tensor once, for blocks share most
        self._rest: list[list[tuple[list[Any], Any]]] = []
        self._tensors = Store(device)
        one_kind = len(set(getattr(getattr(model, "config", None), "layer_types", None) or ())) < 2
        known = False  # are all blocks called with the same arguments beside the stream, in every batch?
        for index in range(len(whole.masks)):
            calls = self._calls(whole, index, blocks[:1] if known else blocks)
            stream, rest, names = _parted(*calls[0])
            others = [_parted(*call)[1:] for call in calls[1:]]
            alike = all(_same((rest, names), other) for other in others)
            known |= alike and one_kind  # windows of some layers show in batches longer than they are
            self._stream.append(stream)
            kept: dict[int, int] = {}
            self._rest.append([self._kept((*r, n), kept) for r, n in ((rest, names), *(() if alike else others))])

    def _kept(self, structure: Any, known: dict[int, int]) -> tuple[list[Any], Any]:
        """(leaves, form) of a structure, its tensors by their number in the store.

        Args:
            known: {id of a tensor that is kept: its number}, added to.
        """
        leaves, form = tree_flatten(structure)
        for at, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                if id(leaf) not in known:
                    known[id(leaf)] = len(self._tensors)
                    self._tensors.append(leaf)
                leaves[at] = _Kept(known[id(leaf)])
        return leaves, form

    def _calls(self, whole: Scope, index: int, blocks: Sequence[str]) -> list[tuple[tuple, dict]]:
        """(positional, named) arguments of these blocks in one pass, which ends with the last of them."""
        caught = []

        def see(_module, args, kwargs):
            caught.append(_without_cache(args, kwargs))
            if len(caught) == len(blocks):
                raise _Stop

        handles = [get_module(self.model, b).register_forward_pre_hook(see, with_kwargs=True) for b in blocks]
        try:
            with torch.no_grad():
                whole.run(index)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return caught

    @property
    def calls(self) -> Iterator[tuple[tuple, dict]]:
        """(positional, named) arguments of the next block, batch by batch."""
        return (self._arguments(index) for index in range(len(self._stream)))

    def _arguments(self, index: int) -> tuple[tuple, dict]:
        rests = self._rest[index]
        leaves, form = rests[self.at] if len(rests) > 1 else rests[0]
        leaves = [self._tensors[leaf.number] if isinstance(leaf, _Kept) else leaf for leaf in leaves]
        args, kwargs, name = tree_unflatten(leaves, form)
        hidden = self._stream[index]
        return ((hidden, *args), kwargs) if name is None else (args, {**kwargs, name: hidden})

    def _output(self, index: int) -> Any:
        args, kwargs = self._arguments(index)
        with unchunked(self.model):
            return get_module(self.model, self.blocks[self.at])(*args, **kwargs)

    def _call(self, index: int) -> torch.Tensor:
        output = self._output(index)
        return output if isinstance(output, torch.Tensor) else output[0]

    def scope(self, block: str) -> Scope:
        """The scope of one block; those before it are advanced over."""
        while self.blocks[self.at] != block:
            self.advance()
        return Scope(self.model, self._call, self.masks, block, calls=self.counted)

    def advance(self, call: Callable[[int], torch.Tensor] | None = None) -> None:
        """Push the hidden states through the next block.

        Args:
            call: index of a batch -> output of that block; None: it is run.
        """
        call = self._call if call is None else call
        after = Store(self._stream.device)
        with torch.no_grad():
            for index in range(len(self._stream)):
                after.append(call(index))
        self._stream = after
        self.at += 1

    @contextlib.contextmanager
    def known(self, index: int, part: float = 1.0) -> Iterator[None]:
        """Within this context every block of the model gives what the last one gives to batch `index` (to its first
        `part`), without running."""
        stream = self._stream[index]
        stream = stream[: max(1, round(part * len(stream)))]

        def given(*_args: Any, **_kwargs: Any) -> Any:
            # a copy each: what comes after may change it in place
            return (stream.clone(), *self._beside) if self._beside is not None else stream.clone()

        with forwards({get_module(self.model, path): given for path in self.blocks}):
            yield

    def behind(self, whole: Scope, part: Callable[[], Any], share: float, points: Collection[Point]) -> Scope:
        """What comes after the blocks, which are known by now.

        A head may read more than the last hidden state. So it is tried on a part of the first batch, and where
        anything at `points` is another than in a whole pass, whole passes it will be.

        Args:
            part: runs the model on the first samples of the first batch; share: how many of them these are.
        """
        while self.at < len(self.blocks):
            self.advance()
        forms: list[Any] = []
        trial = Scope(self.model, lambda _: part(), whole.masks, calls=self.counted)
        hooks = [
            get_module(self.model, b).register_forward_hook(lambda _m, _a, out: forms.append(out)) for b in self.blocks
        ]
        try:
            expected = trial.watch(0, points)
        finally:
            for hook in hooks:
                hook.remove()
        # what a block returns beside the stream: nothing, in a tensor or in a tuple of one form
        beside = {None if isinstance(form, torch.Tensor) else _beside(form) for form in forms}
        if len(beside) != 1 or "more" in beside:
            return whole
        self._beside = beside.pop()
        with self.known(0, share):
            found = trial.watch(0, points)
        if found.keys() != expected.keys() or not all(_nearly_equal(found[p], expected[p]) for p in expected):
            return whole

        def run(index: int) -> Any:
            with self.known(index):
                return whole.run(index)

        return Scope(self.model, run, whole.masks, calls=self.counted)


def _nearly_equal(found: Any, expected: Any) -> bool:
    """Of activations, those of each call of a module that is called several times."""
    found, expected = ([x] if isinstance(x, torch.Tensor) else x for x in (found, expected))
    return len(found) == len(expected) and all(map(nearly_equal, found, expected))


def _beside(output: Any) -> Any:
    """What a tuple holds behind its first entry, where that is nothing but None; else "more"."""
    plain = isinstance(output, tuple) and type(output) is tuple and all(entry is None for entry in output[1:])
    return output[1:] if plain else "more"


class Progress:
    """Runs a scope again and again while its layers are fitted, group by group, each time from what is finished.

    In a pass that ends at the inputs of a group, whatever returned before any layer that is still to be fitted was
    entered is finished: its outputs are kept, those of the largest modules alone, and in the next pass these modules
    give them without running.

    Args:
        scope: what is run.
        groups: (paths of the layers, points that are to be seen) of each group, in the order of the fits.
    """

    def __init__(self, scope: Scope, groups: Sequence[tuple[Collection[str], Collection[Point]]]):
        self.scope, self.groups = scope, groups
        model = scope.module
        self._root = model if scope.root is None else get_module(model, scope.root)
        self._names = {module: name for name, module in self._root.named_modules() if name}
        self._device = next(model.parameters()).device
        self._finished: Store | None = None
        self._copies = False  # something changes outputs in place after they were returned

    def through(self, step: int) -> Iterator[dict[Point, torch.Tensor]]:
        """Batch by batch what is seen at the points of group `step`; to be exhausted before the group is fitted."""
        later = Store(self._device)
        unfitted = {get_module(self.scope.module, path) for paths, _ in self.groups[step:] for path in paths}
        keepable = self._keepable([point for _, points in self.groups[step + 1 :] for point in points])
        for index in range(len(self.scope.masks)):
            found, changed = None, True
            while found is None or changed:
                records = _Records(self._of(index), unfitted, keepable, self._copies)
                with forwards({module: records.wrapped(module, name) for module, name in self._names.items()}):
                    found = self.scope.attempt(index, self.groups[step][1])
                changed = records.changed()
                self._copies |= changed
            later.append(records.kept())
            seen = [found[1]]
            del records, found  # while this waits the teacher may run
            yield seen.pop()
        self._finished = later

    def output(self, index: int) -> Any:
        """What the scope gives once all is fitted."""
        records = _Records(self._of(index), set(), set(), False)
        with forwards({module: records.wrapped(module, name) for module, name in self._names.items()}):
            return self.scope.run(index)

    def _of(self, index: int) -> list[tuple[str, Any]]:
        return [] if self._finished is None else self._finished[index]

    def _keepable(self, points: Iterable[Point]) -> set[nn.Module]:
        """Modules that hold nothing inside them which a later pass has to see."""
        wanted = {get_module(self.scope.module, point.path) for point in points}
        return {m for m in self._names if not any(inner in wanted for inner in m.modules() if inner is not m)}


class _Records:
    """What modules return in one pass.

    Args:
        finished: (name, output) of modules that are not to be run, in the order of their calls.
        unfitted: modules from whose call on nothing is recorded.
        keepable: modules whose outputs may be recorded.
        copies: record copies.
    """

    def __init__(
        self, finished: list[tuple[str, Any]], unfitted: set[nn.Module], keepable: set[nn.Module], copies: bool
    ):
        self._finished: dict[str, deque[Any]] = {}
        for name, output in finished:
            self._finished.setdefault(name, deque()).append(output)
        self._unfitted, self._keepable, self._copies, self._recording = unfitted, keepable, copies, True
        self._made: list[tuple[str, Any, list[int]]] = []

    def wrapped(self, module: nn.Module, name: str) -> Callable:
        """A forward for `module` that gives what is known, and records what it gives."""
        forward = module.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            known, before = self._finished.get(name), len(self._made)
            if known:
                output = known.popleft()
            else:
                self._recording &= module not in self._unfitted
                output = forward(*args, **kwargs)
            if self._recording and module in self._keepable and _plain(output):
                del self._made[before:]  # what is inside it is not needed any more
                kept = _map(torch.clone, output) if self._copies else output
                self._made.append((name, kept, _versions(kept)))
            return output

        return call

    def changed(self) -> bool:
        """Whether a recorded output was changed in place since: copies have to be recorded then."""
        return any(_versions(output) != versions for _, output, versions in self._made)

    def kept(self) -> list[tuple[str, Any]]:
        """(name, output) of what was recorded."""
        return [(name, output) for name, output, _ in self._made]


def _entries(output: Any) -> list[Any]:
    return list(output) if isinstance(output, tuple) else [output]


def _plain(output: Any) -> bool:
    """A tensor, or a tuple of tensors and None."""
    return type(output) in (torch.Tensor, tuple) and all(
        entry is None or type(entry) is torch.Tensor for entry in _entries(output)
    )


def _map(function: Callable[[torch.Tensor], torch.Tensor], output: Any) -> Any:
    mapped = [None if entry is None else function(entry) for entry in _entries(output)]
    return tuple(mapped) if isinstance(output, tuple) else mapped[0]


def _versions(output: Any) -> list[int]:
    """How often each tensor has been changed in place."""
    return [entry._version for entry in _entries(output) if entry is not None]


@contextlib.contextmanager
def forwards(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Other forwards for the time of this context; hooks go on as they are."""
    own = {module: module.__dict__["forward"] for module in forwards if "forward" in module.__dict__}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward
        for module, forward in own.items():
            module.forward = forward


def _parted(args: tuple, kwargs: dict) -> tuple[torch.Tensor, tuple[tuple, dict], str | None]:
    """(stream, arguments beside it, its name where it comes by one) of a block's call; the stream keeps its place in
    it: of what comes by name the order stays what it was."""
    if args:
        return args[0], (args[1:], kwargs), None
    name = next(iter(kwargs))
    return kwargs[name], (args, {**kwargs, name: None}), name


def _same(one: Any, other: Any) -> bool:
    """Whether two structures hold the same tensors (the same objects) and equal values."""
    (ours, form), (theirs, alike) = tree_flatten(one), tree_flatten(other)
    return form == alike and all(
        a is b or (not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and a == b)
        for a, b in zip(ours, theirs, strict=True)
    )


def _without_cache(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a block's call without a cache, which would grow with every replay."""

    def bare(value: Any) -> Any:
        return None if isinstance(value, Cache) else value

    kwargs = {name: False if name == "use_cache" else bare(value) for name, value in kwargs.items()}
    return tuple(bare(value) for value in args), kwargs
