"""Sequential least squares: every narrowed layer is fitted to the teacher's output from the student's own inputs.

Shallow to deep, block by block, group by group of layers that read the same: so a layer repairs what the layers before
it lost. Each block of the teacher runs once a batch; the student goes on from what was finished before (`Progress`).
The fits are made from sums (`LeastSquares`). What has to be held for all batches, the stream of both networks, the
teacher's outputs inside one block and what the student has finished of it, is held in a `Store`. So memory depends on
the size of one batch and not on their number. Of each activation at most MAX_TOKENS positions are used, evenly spaced,
whatever the resolution of the images.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..batches import Store, batch_size, decoder_mask, first_samples, main_input, padding_mask, run
from ..modeling_rmtkd import is_norm
from ..spectra.products import exact_matmul
from .calibration import features_last, token_mask
from .leastsquares import BatchStatistics, LeastSquares, NormFit, least_squares_update, norm_fit
from .linalg import check_finite
from .narrowing import Cuts
from .norms import norm_of
from .replay import Progress, Replay, Scope
from .sites import Anatomy, Point, Unit, get_module, is_layer
from .units import own_units


__all__ = ["Pairs", "Replay", "Scope", "least_squares_update", "norm_fit", "refit"]

Seen = torch.Tensor | tuple[torch.Tensor, ...]  # of a module that is called several times in a pass
# (batch, length) bool each, or None: those of the model's input, those of an encoder-decoder's decoder
Masks = tuple[torch.Tensor | None, torch.Tensor | None]
MAX_TOKENS = 32768  # rows of a regression; ten times the widest input that is common


@dataclass(frozen=True)
class _Part:
    """A block, or what comes before or after the blocks, of both networks.

    Attributes:
        units: those in it, in forward order.
        student, teacher: how each runs.
        cuts: what of it was cut.
        through: how each goes on to the next block, given what runs the present one on a batch; None: there is none.
        names: paths of the block in the student and in the teacher.
        repeats: one pass calls some of them several times.
    """

    units: list[Unit]
    student: Scope
    teacher: Scope
    cuts: Cuts
    through: tuple[Callable, Callable] | None = None
    names: tuple[str, str] = ("", "")
    repeats: bool = False

    def taught(self, point: Point) -> Point:
        """A point of the student as the teacher calls it."""
        block, own = self.names
        inside = block != own and f"{point.path}.".startswith(f"{block}.")
        return dataclasses.replace(point, path=own + point.path[len(block) :]) if inside else point


@dataclass(frozen=True)
class Pairs:
    """Which block of the teacher each block of the student was.

    Attributes:
        blocks: paths of all of the teacher's. former: {path in the student: that in the teacher}.
    """

    blocks: tuple[str, ...]
    former: Mapping[str, str]

    @property
    def missing(self) -> bool:
        """Whether the student has fewer."""
        return len(self.former) < len(self.blocks)

    def run_of(self, stack: tuple[str, ...]) -> tuple[str, ...]:
        """The teacher's blocks where these of the student's are: all of them, where any are missing."""
        return self.blocks if self.missing else stack

    def moved(self, block: str) -> bool:
        """Whether blocks before this one of the student are missing."""
        return self.blocks.index(self.former[block]) != list(self.former).index(block)


def refit(
    student: nn.Module,
    teacher: nn.Module,
    anatomy: Anatomy,
    cuts: Cuts,
    batches: Sequence[dict[str, Any]],
    ridge: float | None,
    progress: bool = True,
    pairs: Pairs | None = None,
    late: Cuts | None = None,
) -> None:
    """Fit all units of `student` that a cut touches, in place, in forward order.

    Args:
        anatomy: of the student's layers.
        pairs: which blocks of the teacher these are; None: they are called alike.
        late: the cuts from where on blocks are missing: all that reads the stream has another one there.
    """
    pairs = pairs or Pairs(anatomy.blocks, {block: block for block in anatomy.blocks})
    batches = _cap(batches)
    masks = [_masks(teacher, batch) for batch in batches]
    free = own_units(student, anatomy)
    bar = tqdm(total=len(anatomy.blocks) + 2, desc="Refitting", unit="block", disable=not progress, leave=False)
    # sums of products that bf16 has rounded tell nothing of small eigenvalues
    with bar, exact_matmul(next(student.parameters()).device):
        for part in _parts(student, teacher, anatomy, batches, masks, (cuts, cuts if late is None else late), pairs):
            _fit_part(part, free, ridge)
            bar.update()


def _cap(batches: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Evenly spaced batches that hold about MAX_TOKENS tokens: batches are sorted by length, and all lengths count.
    Images are all taken: of each there are as many rows as it takes, see `_spaced`."""
    return batches[:: max(1, -(-sum(map(_tokens, batches)) // MAX_TOKENS))]


def _masks(model: nn.Module, batch: Mapping[str, Any]) -> Masks:
    """The positions that are no padding; None where none is."""
    found = padding_mask(batch), decoder_mask(model, batch)
    return tuple(None if mask is None or bool(mask.all()) else mask for mask in found)


def _tokens(batch: Mapping[str, Any]) -> int:
    """Real tokens of a batch of texts; samples of any other."""
    mask, ids = padding_mask(batch), main_input(batch)
    if mask is not None:
        return int(mask.sum())
    texts = ids is not None and not ids.is_floating_point() and ids.dim() > 1
    return ids.numel() if texts else batch_size(batch)


def _parts(student, teacher, anatomy, batches, masks, cuts, pairs) -> Iterator[_Part]:
    """What comes before the blocks, each block, and what comes after, with both networks ready to run."""
    models = (student, teacher)
    calls: dict[str, int] = {}  # the same in both
    whole = [Scope(model, lambda i, model=model: run(model, batches[i]), masks, calls=calls) for model in models]
    if anatomy.repeats > 1:  # no block is finished before all have run
        yield _Part(list(anatomy.units), *whole, cuts[0], repeats=True)
        return
    rest = list(anatomy.units)
    for stack in anatomy.runs:
        positions = [i for i, unit in enumerate(rest) if unit.block in stack]
        first, last = positions[0], positions[-1] + 1
        yield _Part(rest[:first], *whole, cuts[0])
        # a later stack reads what an earlier one gives, which is finished
        each = zip(models, (stack, pairs.run_of(stack)), whole, strict=True)
        replays = [Replay(model, blocks, scope) for model, blocks, scope in each]
        for block, units in itertools.groupby(rest[first:last], key=lambda unit: unit.block):
            names = block, pairs.former[block]  # the teacher goes through what is between them on the way
            scopes = [replay.scope(name) for replay, name in zip(replays, names, strict=True)]
            onwards = tuple(replay.advance for replay in replays)
            yield _Part(list(units), *scopes, cuts[pairs.moved(block)], onwards, names)
        rest = rest[last:]
        if after := [unit for unit in rest if _touched(unit, whole[0], cuts[1])]:
            points = [Point(u.path, side) for u in after for side in ("input", "output")]
            points += [point for u in after for point in u.sums]
            part = first_samples(batches[0], 1)
            share = batch_size(part) / batch_size(batches[0])
            whole = [
                replay.behind(scope, lambda model=model: run(model, part), share, points)
                for model, replay, scope in zip(models, replays, whole, strict=True)
            ]
    yield _Part(rest, *whole, cuts[1])


def _touched(unit: Unit, scope: Scope, cuts: Cuts) -> bool:
    """Whether least squares has anything to do: tables and what reads nothing cut are exact already."""
    if not is_layer(scope.module, unit.path):
        return False
    module = get_module(scope.module, unit.path)
    if isinstance(module, (nn.Parameter, nn.Embedding)) or unit.factor is not None or unit.tied:
        return False
    if getattr(module, "groups", 1) > 1:
        return False  # each channel has its own few weights; the batch norm behind is fitted
    if _is_norm(module):
        return unit.writes in cuts or (isinstance(module, nn.BatchNorm2d) and bool(cuts.projections))
    inside = unit.reads is not None or unit.block is not None
    return hasattr(module, "weight") and (unit.reads in cuts or (inside and unit.writes in cuts))


def _fit_part(part: _Part, free: Collection[str], ridge: float | None) -> None:
    cuts = part.cuts
    units = [unit for unit in part.units if _touched(unit, part.student, cuts)]
    groups = [
        list(group)
        for _, group in itertools.groupby(
            units, key=lambda u: (u.reads, u.entrance, u.through, u.sums, _reads_alone(part.student, u) and u.path)
        )
    ]
    points = [[Point(g[0].path, "input"), *g[0].sums] for g in groups]
    progress = Progress(part.student, [([u.path for u in g], seen) for g, seen in zip(groups, points, strict=True)])
    fits = [_Fit(group, part.student, free, ridge) for group in groups]
    # the first group is fitted while the teacher runs: what it wants need not be kept
    early = progress.through(0) if groups else iter(())
    wants = _wants(groups, part, lambda index, wanted: fits[0].add(index, next(early), wanted))
    for step, fit in enumerate(fits):
        for index, seen in enumerate(early if step == 0 else progress.through(step)):
            fit.add(index, seen, wants[step][index])
        fit.apply()
    if part.through is not None:
        part.through[0](progress.output)


def _wants(
    groups: list[list[Unit]], part: _Part, first: Callable[[int, dict[str, torch.Tensor]], None]
) -> list[Store]:
    """For each group, batch by batch, {path: rows that its unit should give, its skip path included}; those of the
    first one are not kept but told to `first`. The teacher goes on to the next block, where there is one."""
    scope, count = part.teacher, len(part.teacher.masks)
    points = {part.taught(p): p for group in groups for unit in group for p in (Point(unit.path), *unit.sums)}
    device = next(scope.module.parameters()).device
    wants = [Store(device) for _ in groups]

    def keep(index: int, seen: dict[Point, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows = {points[p]: _spaced(_rows(x, scope.masks[index], _at(scope, p)), count) for p, x in seen.items()}
        wanted = [{u.path: _wanted(u, rows, part.cuts) for u in group} for group in groups]
        for rest, store in zip(wanted[1:], wants[1:], strict=True):
            store.append(rest)
        return wanted[0]

    def call(index: int) -> Any:
        output, seen = scope.pass_through(index, points)
        wanted = keep(index, seen)
        del seen  # before the student runs
        first(index, wanted)
        return output

    if part.through is not None:
        part.through[1](call if groups else None)
    elif groups:
        for index in range(count):
            counts = part.repeats and index == 0  # a whole pass counts calls
            seen = scope.pass_through(index, points)[1] if counts else scope.watch(index, points)
            wanted = keep(index, seen)
            del seen
            first(index, wanted)
    return wants


class _Fit:
    """Fits layers that read the same, in place, from sums over batches.

    Args:
        group: the layers.
        scope: what runs them.
        free: sites whose features have units of their own (`own_units`).
    """

    def __init__(self, group: list[Unit], scope: Scope, free: Collection[str], ridge: float | None):
        self.group, self.scope = group, scope
        self.modules = {unit.path: get_module(scope.module, unit.path) for unit in group}
        self.sums = _sums_of(group, self.modules, free, ridge)
        first = self.modules[group[0].path]
        counted = isinstance(first, nn.BatchNorm2d) and first.running_mean is not None
        self.statistics = BatchStatistics() if counted else None

    @torch.no_grad()
    def add(self, index: int, seen: Mapping[Point, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
        """Batch `index`.

        Args:
            seen: what the student has at the input of the first layer, and on its skip path.
            wanted: {path: rows that the layer should give}.
        """
        unit, mask, count = self.group[0], self.scope.masks[index], len(self.scope.masks)
        entrance = seen[Point(unit.path, "input")]
        if self.statistics is not None:
            self.statistics.add(entrance)
        x = _spaced(_entry(self.modules[unit.path], entrance, mask), count)
        lacking = {point: _spaced(_rows(seen[point], mask, _at(self.scope, point)), count) for point in unit.sums}
        for fit, paths in self.sums:
            rows = {path: _less(wanted[path], lacking, unit) for path in paths}
            if isinstance(fit, NormFit):
                fit.add(x, rows[paths[0]])
            else:
                fit.add(x, {path: y - _answer(self.modules[path], x) for path, y in rows.items()})

    def apply(self) -> None:
        """Change the layers."""
        for fit, paths in self.sums:
            for path in paths:
                if isinstance(fit, NormFit):
                    _set_norm(self.modules[path], fit, f"Refit of {path}")
                    if self.statistics is not None:
                        self.statistics.install(self.modules[path])
                else:
                    _change_linear(self.modules[path], fit, path)
        self.sums = []  # what is summed up of a wide layer is among the largest of all


def _sums_of(
    group: list[Unit], modules: dict[str, nn.Module], free: Collection[str], ridge: float | None
) -> list[tuple[Any, list[str]]]:
    """(sums, paths of the layers that they are for): one for all that have a bias, one for all that have none."""
    if _is_norm(modules[group[0].path]):
        return [(NormFit(getattr(modules[u.path], "bias", None) is not None), [u.path]) for u in group]
    fits = []
    for bias in (True, False):
        paths = [path for path, module in modules.items() if (_last(module).bias is not None) == bias]
        if paths:
            last = _last(modules[paths[0]])
            # each channel of a convolution has a scale of its own, which the norms around it make arbitrary
            area = last.kernel_size[0] * last.kernel_size[1] if isinstance(last, nn.Conv2d) else None
            unit = 1 if area is None and group[0].reads in free else area
            fits.append((LeastSquares(ridge, bias, unit, by_outputs=area is None), paths))
    return fits


def _reads_alone(scope: Scope, unit: Unit) -> bool:
    """Norms, convolutions and factored layers have an entry of their own; the others share that of their site."""
    module = get_module(scope.module, unit.path)
    return _is_norm(module) or isinstance(module, nn.Conv2d) or hasattr(module, "down")


def _at(scope: Scope, point: Point) -> nn.Module | nn.Parameter:
    return get_module(scope.module, point.path)


def _is_norm(module: nn.Module | nn.Parameter) -> bool:
    return isinstance(module, nn.BatchNorm2d) or is_norm(module)


def _last(module: nn.Module) -> nn.Module:
    """What of a layer is fitted: all of it, or the second of two factors."""
    return module.up if hasattr(module, "down") else module


def _answer(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    last = _last(module)
    weight = last.weight.T if isinstance(last, Conv1D) else last.weight.flatten(1)
    return F.linear(x, weight, last.bias)


def _rows(x: Seen, masks: Masks, module: nn.Module | None = None) -> torch.Tensor:
    """(n, d) of the unmasked positions of (batch, length, d), (batch, d) or (batch, d, h, w); behind a `module` whose
    features are last, of (batch, h, w, d); of a module that was called several times those of all calls."""
    if isinstance(x, tuple):
        return torch.cat([_rows(each, masks, module) for each in x])
    own, decoder = masks
    keep = token_mask({"attention_mask": own}, x, decoder)
    x = features_last(x, module)
    return x[keep] if keep is not None else x.reshape(-1, x.shape[-1])


def _spaced(rows: torch.Tensor, batches: int) -> torch.Tensor:
    """At most MAX_TOKENS / batches of the rows, one drawn from each of as many equal stretches: the same ones of every
    activation of a batch. Rows at a constant stride would be one column of the images, mostly their border."""
    most = max(1, MAX_TOKENS // batches)
    if len(rows) <= most:
        return rows
    within = torch.rand(most, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return rows[((torch.arange(most) + within) * (len(rows) / most)).long().to(rows.device)]


def _entry(module: nn.Module, x: Seen, mask: Masks) -> torch.Tensor:
    """What the weight of a layer is multiplied with, (n, in): patches (n, in * kernel) of a convolution, normalised
    features of a norm, the thin features of a factored layer."""
    if isinstance(x, tuple):
        return torch.cat([_entry(module, each, mask) for each in x])
    if hasattr(module, "down"):
        return _entry(module.up, module.down(x), mask)
    if (norm := norm_of(module)) is not None:
        return norm.normalised(_rows(x, mask, module))
    if isinstance(module, nn.BatchNorm2d):
        own = module.running_mean is None
        return _rows(F.batch_norm(x, module.running_mean, module.running_var, training=own, eps=module.eps), mask)
    if isinstance(module, nn.Conv2d):
        patches = F.unfold(x, module.kernel_size, module.dilation, _padding(module), module.stride)
        return patches.mT.reshape(-1, patches.shape[1])
    return _rows(x, mask, module)


def _padding(module: nn.Conv2d) -> tuple[int, ...]:
    """Zeros on each side of an image; those of "same" are as many on both sides for kernels of odd size."""
    if module.padding == "valid":
        return (0, 0)
    if module.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return module.padding


def _wanted(unit: Unit, target: dict[Point, torch.Tensor], cuts: Cuts) -> torch.Tensor:
    """(n, out): what the layer should give, from the teacher's rows. Where its output is added to a skip path, the sum
    must be right: what the student's own skip path lacks is asked for, too, so that of the teacher is in it."""
    y = target[Point(unit.path)]
    # what is beside it is multiplied alike; the residual path is not
    for point in unit.sums:
        y = y + (target[point] / unit.scale if point == unit.skip else target[point])
    return _project(y, cuts.of(unit.writes, unit.path))


def _less(rows: torch.Tensor, lacking: Mapping[Point, torch.Tensor], unit: Unit) -> torch.Tensor:
    """The inverse of the sum of `_wanted`, with what the student has."""
    for point, there in lacking.items():
        rows = rows - (there / unit.scale if point == unit.skip else there)
    return rows


def _project(rows: torch.Tensor, cut) -> torch.Tensor:
    if cut is None:
        return rows
    if cut.index is not None:
        return rows[:, cut.index.to(rows.device)]
    encode = cut.encode.to(rows)
    if cut.blocks == 1:
        return rows @ encode
    heads = cut.blocks  # a product with all zeros between heads takes as many times as long
    each = encode.unflatten(0, (heads, -1)).unflatten(2, (heads, -1)).diagonal(dim1=0, dim2=2)  # (d / h, k / h, heads)
    return torch.einsum("nhd,dkh->nhk", rows.unflatten(1, (heads, -1)), each).flatten(1)


def _change_linear(module: nn.Module, fit: LeastSquares, path: str) -> None:
    last = _last(module)
    update, shift = fit.solve(path, f"Refit of {path}")
    with torch.no_grad():
        update = update.T if isinstance(last, Conv1D) else update.reshape(last.weight.shape)
        last.weight.copy_(last.weight.double() + update)
        if last.bias is not None:
            last.bias.copy_(last.bias.double() + shift)


def _set_norm(module: nn.Module, fit: NormFit, what: str) -> None:
    scale, shift, usable = fit.solve()
    check_finite(torch.stack([scale, shift]), what)
    with torch.no_grad():
        norm = norm_of(module)
        if norm is None:
            module.weight.copy_(torch.where(usable, scale, module.weight.double()))
        else:
            norm.set_scale(torch.where(usable, scale, norm.scale))
        if getattr(module, "bias", None) is not None:
            module.bias.copy_(torch.where(usable, shift, module.bias.double()))
