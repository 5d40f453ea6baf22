"""Sequential least squares: every narrowed layer is fitted to the teacher's output from the student's own inputs.

Shallow to deep, block by block: the teacher's activations inside one block are held for the calibration data, the
student's are computed anew after each fit, so that a layer repairs what the layers before it lost. Of each activation
at most MAX_TOKENS positions are held, evenly spaced, whatever the resolution of the images; beside them, the stream of
both networks between two blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import Cache

from ..batches import batch_size, padding_mask, run, unchunked
from .calibration import features_last, observed, token_mask
from .linalg import JITTERS, check_finite, cholesky
from .narrowing import Cuts
from .sites import Anatomy, Point, Unit, get_module, is_layer


__all__ = ["least_squares_update", "norm_fit", "refit"]

MAX_TOKENS = 32768  # rows of a regression; ten times the widest input that is common
FP32 = torch.finfo(torch.float32).eps  # share of a matrix's size under which fp32 products tell nothing


class _Stop(Exception):
    """Raised inside a forward pass once everything asked for has been seen."""


@dataclass
class Scope:
    """Something that can be run on the data again and again: a block, or the whole model.

    Attributes:
        run: index of a batch -> output.
        masks: per batch (batch, length) bool or None.
    """

    module: nn.Module
    run: Callable[[int], Any]
    masks: list[torch.Tensor | None]

    def watch(self, index: int, points: list[Point]) -> dict[Point, torch.Tensor]:
        """Activations at `points` in batch `index`; the pass ends as soon as all are seen."""
        seen: dict[Point, torch.Tensor] = {}

        def see(point: Point, x: torch.Tensor) -> None:
            seen[point] = x.detach()
            if len(seen) == len(set(points)):
                raise _Stop

        with observed(self.module, points, see), torch.no_grad():
            try:
                self.run(index)
            except _Stop:
                pass
        return seen


def least_squares_update(
    inputs: list[torch.Tensor],
    residuals: list[torch.Tensor],
    ridge: float,
    intercept: bool,
    unit: int | None = None,
    what: str = "Refit",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The change of a linear layer that best explains what it still misses.

    Solves min |R - X D^T - 1 e^T|^2 + n lambda |D|^2, lambda = ridge * mean variance of X; ridge regression shrinks
    towards the layer as it is, not towards zero, so a layer that fits exactly is left exactly as it is. Products are
    fp32, so a ridge that is too small for what they can tell apart is raised, with a warning that says to what.

    Args:
        inputs: chunks (n_i, a); residuals: chunks (n_i, o), any float dtype. Products in fp32, sums in fp64.
        unit: this many neighbouring columns of X are measured in one unit, and lambda is taken from their variance
            alone: the result then does not depend on the units. None: all of them are.
        what: what is fitted, for messages.

    Returns:
        D (o, a) and e (o,), fp64; e is zero without `intercept`.

    Raises:
        CalibrationError: inputs or residuals that are not finite.
    """
    count = sum(len(x) for x in inputs)
    zero = torch.zeros((), dtype=torch.float64, device=inputs[0].device)
    mean_x = sum(x.double().sum(0) for x in inputs) / count if intercept else zero
    mean_r = sum(r.double().sum(0) for r in residuals) / count if intercept else zero
    gram = cross = 0.0
    for x, r in zip(inputs, residuals, strict=True):
        x = (x.float() - mean_x.float()) if intercept else x.float()
        r = (r.float() - mean_r.float()) if intercept else r.float()
        gram = gram + (x.T @ x).double()
        cross = cross + (x.T @ r).double()
    check_finite(cross, what)
    size = _sizes(gram.diagonal(), unit)
    gram = gram / torch.outer(size, size) + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    jitters = (0.0, *[jitter for jitter in JITTERS if jitter > max(ridge, FP32)])
    factor = cholesky(gram, f"{what}, ridge={ridge:g}", jitters, resolution=FP32)
    update = (torch.cholesky_solve(cross / size[:, None], factor) / size[:, None]).T
    return update, (mean_r - update @ mean_x) if intercept else update.new_zeros(len(update))


def _sizes(squares: torch.Tensor, unit: int | None) -> torch.Tensor:
    """(a,) root of the mean of the sums of squares (a,), over each `unit` columns; of all where they are silent."""
    mean = squares.mean().clamp_min(torch.finfo(torch.float64).tiny)
    if unit is None:
        return mean.sqrt().expand(len(squares))
    each = squares.reshape(-1, unit).mean(1).repeat_interleave(unit)
    return torch.where(each > 0, each, mean).sqrt()


def norm_fit(normalised: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale and shift per coordinate by least squares.

    Args:
        normalised, target: (n, k).

    Returns:
        scale (k,), shift (k,) fp64, and usable (k,) bool: coordinates that vary enough to be fitted.
    """
    u, t = normalised.double(), target.double()
    mean_u, mean_t = u.mean(0), t.mean(0)
    variance = (u - mean_u).square().mean(0)
    scale = ((u - mean_u) * (t - mean_t)).mean(0) / variance.clamp_min(1e-12)
    return scale, mean_t - scale * mean_u, variance > 1e-9


def refit(
    student: nn.Module,
    teacher: nn.Module,
    anatomy: Anatomy,
    cuts: Cuts,
    batches: list[dict[str, Any]],
    ridge: float,
    progress: bool = True,
) -> None:
    """Fit all units of `student` that a cut touches, in place, in forward order."""
    batches = _cap(batches)
    masks = [padding_mask(batch) for batch in batches]
    with tqdm(total=len(anatomy.blocks) + 2, desc="Refitting", unit="block", disable=not progress, leave=False) as bar:
        scopes = _scopes(student, teacher, anatomy, batches, masks)
        for units, student_scope, teacher_scope in scopes:
            _fit_scope(units, student_scope, teacher_scope, cuts, ridge)
            bar.update()


def _cap(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evenly spaced batches that hold about MAX_TOKENS positions: batches are sorted by length, and all lengths
    count."""
    masks = [padding_mask(batch) for batch in batches]
    tokens = sum(
        batch_size(batch) if mask is None else int(mask.sum()) for batch, mask in zip(batches, masks, strict=True)
    )
    return batches[:: max(1, -(-tokens // MAX_TOKENS))]


def _scopes(student, teacher, anatomy, batches, masks) -> Iterator[tuple[list[Unit], Scope, Scope]]:
    """What comes before the blocks, each block, and what comes after, with both networks ready to run."""
    whole = [Scope(model, lambda i, model=model: run(model, batches[i]), masks) for model in (student, teacher)]
    positions = [i for i, unit in enumerate(anatomy.units) if unit.block is not None]
    first, last = (positions[0], positions[-1] + 1) if positions else (len(anatomy.units), len(anatomy.units))
    yield list(anatomy.units[:first]), *whole
    if anatomy.blocks:
        replays = [
            Replay(model, anatomy.blocks, scope) for model, scope in zip((student, teacher), whole, strict=True)
        ]
        for block, units in itertools.groupby(anatomy.units[first:last], key=lambda unit: unit.block):
            scopes = [replay.scope(block) for replay in replays]
            yield list(units), *scopes
            for replay in replays:
                replay.advance(block)
    yield list(anatomy.units[last:]), *whole


class Replay:
    """Runs the blocks of one model one at a time, from hidden states held between them."""

    def __init__(self, model: nn.Module, blocks: tuple[str, ...], whole: Scope):
        self.model, self.masks, self.at = model, whole.masks, 0
        self.blocks = blocks
        self.calls = [self._first_call(whole, i) for i in range(len(whole.masks))]

    def _first_call(self, whole: Scope, index: int) -> tuple[tuple, dict]:
        caught = []

        def stop(_module, args, kwargs):
            caught.append(_without_cache(args, kwargs))
            raise _Stop

        handle = get_module(self.model, self.blocks[0]).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad():
                whole.run(index)
        except _Stop:
            pass
        finally:
            handle.remove()
        return caught[0]

    def _call(self, index: int) -> torch.Tensor:
        args, kwargs = self.calls[index]
        with unchunked(self.model):
            output = get_module(self.model, self.blocks[self.at])(*args, **kwargs)
        return output if isinstance(output, torch.Tensor) else output[0]

    def scope(self, block: str) -> Scope:
        """The scope of one block; those before it are advanced over."""
        while self.blocks[self.at] != block:
            self.advance(self.blocks[self.at])
        return Scope(self.model, self._call, self.masks)

    def advance(self, block: str) -> None:
        """Push the hidden states through a block."""
        with torch.no_grad():
            outputs = [self._call(i) for i in range(len(self.calls))]
        self.calls = [
            ((output, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): output})
            for output, (args, kwargs) in zip(outputs, self.calls, strict=True)
        ]
        self.at += 1


def _without_cache(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a block's call without a cache, which would grow with every replay."""

    def bare(value: Any) -> Any:
        return None if isinstance(value, Cache) else value

    kwargs = {name: False if name == "use_cache" else bare(value) for name, value in kwargs.items()}
    return tuple(bare(value) for value in args), kwargs


def _touched(unit: Unit, scope: Scope, cuts: Cuts) -> bool:
    """Whether least squares has anything to do: tables and what reads nothing cut are exact already."""
    if not is_layer(scope.module, unit.path):
        return False
    module = get_module(scope.module, unit.path)
    if isinstance(module, (nn.Parameter, nn.Embedding)) or unit.factor is not None:
        return False
    if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
        return unit.writes in cuts or (isinstance(module, nn.BatchNorm2d) and bool(cuts.projections))
    inside = unit.reads is not None or unit.block is not None
    return hasattr(module, "weight") and (unit.reads in cuts or (inside and unit.writes in cuts))


def _fit_scope(units: list[Unit], student: Scope, teacher: Scope, cuts: Cuts, ridge: float) -> None:
    units = [unit for unit in units if _touched(unit, student, cuts)]
    if not units:
        return
    points = [Point(u.path) for u in units] + [u.skip for u in units if u.skip is not None]
    count = len(teacher.masks)
    targets = [
        {p: _spaced(_rows(x, mask), count) for p, x in teacher.watch(i, points).items()}
        for i, mask in enumerate(teacher.masks)
    ]
    for _, group in itertools.groupby(units, key=lambda u: (u.reads, u.skip, _reads_alone(student, u) and u.path)):
        group = list(group)
        wanted = [Point(group[0].path, "input")] + ([group[0].skip] if group[0].skip is not None else [])
        modules = [get_module(student.module, unit.path) for unit in group]
        entries, skips = [], []
        for i, mask in enumerate(student.masks):
            seen = student.watch(i, wanted)
            with torch.no_grad():
                entry = _entry(modules[0], seen[wanted[0]], mask)
            entries.append(_spaced(entry, count))
            skips.append(_spaced(_rows(seen[wanted[1]], mask), count) if len(wanted) > 1 else None)
        for unit, module in zip(group, modules, strict=True):
            wants = [_wanted(unit, target, skip, cuts) for target, skip in zip(targets, skips, strict=True)]
            if _is_norm(student, unit):
                _fit_norm(module, entries, wants, f"Refit of {unit.path}")
            else:
                _fit_linear(module, entries, wants, ridge, f"Refit of {unit.path}")


def _reads_alone(scope: Scope, unit: Unit) -> bool:
    """Norms and factored layers have an entry of their own; the others share that of their site."""
    return _is_norm(scope, unit) or hasattr(get_module(scope.module, unit.path), "down")


def _is_norm(scope: Scope, unit: Unit) -> bool:
    return isinstance(get_module(scope.module, unit.path), (nn.LayerNorm, nn.BatchNorm2d))


def _rows(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(n, d) of the unmasked positions of (batch, length, d), (batch, d) or (batch, d, h, w)."""
    keep = token_mask({"attention_mask": mask}, x) if mask is not None else None
    x = features_last(x)
    return x[keep] if keep is not None else x.reshape(-1, x.shape[-1])


def _spaced(rows: torch.Tensor, batches: int) -> torch.Tensor:
    """At most MAX_TOKENS / batches of the rows, one drawn from each of as many equal stretches: the same ones of every
    activation of a batch. Rows at a constant stride would be one column of the images, mostly their border."""
    most = max(1, MAX_TOKENS // batches)
    if len(rows) <= most:
        return rows
    within = torch.rand(most, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return rows[((torch.arange(most) + within) * (len(rows) / most)).long().to(rows.device)]


def _entry(module: nn.Module, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What the weight of a layer is multiplied with, (n, in): patches (n, in * kernel) of a convolution, normalised
    features of a norm, the thin features of a factored layer."""
    if hasattr(module, "down"):
        return _entry(module.up, module.down(x), mask)
    if isinstance(module, nn.LayerNorm):
        return _rows(F.layer_norm(x, module.normalized_shape, eps=module.eps), mask)
    if isinstance(module, nn.BatchNorm2d):
        return _rows(F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps), mask)
    if isinstance(module, nn.Conv2d):
        patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        return patches.mT.reshape(-1, patches.shape[1])
    return _rows(x, mask)


def _wanted(unit: Unit, target: dict[Point, torch.Tensor], skip: torch.Tensor | None, cuts: Cuts) -> torch.Tensor:
    """(n, out): what the layer should give. Where its output is added to a skip path, the sum must be right: what the
    student's own skip path lacks is asked for, too."""
    writes, y = cuts.of(unit.writes, unit.path), target[Point(unit.path)]
    if skip is None:
        return _project(y, writes)
    return _project(y + target[unit.skip], writes) - skip


def _project(rows: torch.Tensor, cut) -> torch.Tensor:
    if cut is None:
        return rows
    if cut.index is not None:
        return rows[:, cut.index.to(rows.device)]
    return rows @ cut.encode.to(rows)


def _fit_linear(
    module: nn.Module, entries: list[torch.Tensor], wants: list[torch.Tensor], ridge: float, what: str
) -> None:
    last = module.up if hasattr(module, "down") else module
    # each channel of a convolution has a scale of its own, which the norms around it make arbitrary
    unit = last.kernel_size[0] * last.kernel_size[1] if isinstance(last, nn.Conv2d) else None
    with torch.no_grad():
        residuals = [y - F.linear(x, last.weight.flatten(1), last.bias) for x, y in zip(entries, wants, strict=True)]
        update, shift = least_squares_update(entries, residuals, ridge, last.bias is not None, unit, what)
        last.weight.copy_(last.weight.double() + update.reshape(last.weight.shape))
        if last.bias is not None:
            last.bias.copy_(last.bias.double() + shift)


def _fit_norm(module: nn.Module, entries: list[torch.Tensor], wants: list[torch.Tensor], what: str) -> None:
    scale, shift, usable = norm_fit(torch.cat(entries), torch.cat(wants))
    check_finite(torch.stack([scale, shift]), what)
    with torch.no_grad():
        module.weight.copy_(torch.where(usable, scale, module.weight.double()))
        if module.bias is not None:
            module.bias.copy_(torch.where(usable, shift, module.bias.double()))
