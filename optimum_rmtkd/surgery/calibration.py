"""Moments of activations and of loss gradients, taken by removable hooks while data flows through a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..batches import batch_size, decoder_mask, evaluating, explained, padding_mask, run
from ..config import RMTKDConfig
from ..errors import CalibrationError, RMTKDError
from ..modeling_rmtkd import LowRankLinear, is_norm, resolve_path
from ..models import Scratch
from ..spectra import SecondMoments, sample_tokens
from ..spectra.edges import needs_null_moments
from .divergence import Remembered
from .likelihood import answers, gives_likelihood, log_likelihood
from .norms import turns_axes
from .sites import CHANNELS, Anatomy, Point, Site, Unit, get_module


__all__ = [
    "Calibration",
    "calibrate",
    "features_last",
    "gradient_points",
    "observed",
    "points_of",
    "token_mask",
]


FEATURES_LAST = (nn.Linear, Conv1D, LowRankLinear)
GOLDEN = (5**0.5 - 1) / 2  # the turn after which few others come near the same place


def points_of(anatomy: Anatomy, sites: Sequence[Site]) -> list[Point]:
    """Where activations are to be observed in order to cut `sites`. The stream is in any case, where there is one: its
    loss gradients price all other cuts. So are sums that units land in, of language models and where a norm stands
    between.
    """
    needed = [s for s in anatomy.sites.values() if s in sites or s.kind == "hidden"]
    points = {point for site in needed for point in site.points}
    points |= {u.lands for u in anatomy.units if u.lands is not None and lands_apart(u, anatomy)}
    return sorted(points, key=str)


def lands_apart(unit: Unit, anatomy: Anatomy) -> bool:
    """Whether a unit lands where the stream itself is not observed."""
    channels = any(site.kind in CHANNELS for site in anatomy.sites.values())
    return anatomy.answers or unit.behind is not None or ("hidden" not in anatomy.sites and not channels)


def gradient_points(model: nn.Module, anatomy: Anatomy, config: RMTKDConfig, batch: Mapping[str, Any]) -> list[Point]:
    """Where loss gradients are to be observed: along the stream, of language models also where sums land in it.

    Args:
        batch: one, on which the model shows whether it gives a likelihood.

    Raises:
        RMTKDError, CalibrationError: importance="fisher" for a model without a stream, or without logits.
    """
    hidden, importance = anatomy.sites.get("hidden"), config.importance
    channels = any(site.kind in CHANNELS for site in anatomy.sites.values())
    if importance == "fisher" and hidden is None and not channels:
        raise RMTKDError(
            f"importance='fisher' was asked for, but {type(model).__name__} in form {config.form!r} has no "
            "residual stream whose loss gradient could weigh directions; use 'auto' or 'variance'."
        )
    if importance == "variance" or (hidden is None and importance != "fisher"):
        return []
    if gives_likelihood(model, batch):
        if hidden is None:
            return []  # channels are priced where they are read (`channels`)
        lands = {u.lands for u in anatomy.units if u.lands is not None and lands_apart(u, anatomy)}
        return [*hidden.points, *sorted(lands - set(hidden.points), key=str)]
    if importance == "fisher":
        raise CalibrationError(
            f"importance='fisher' needs a model with logits to draw labels from; {type(model).__name__} returns none. "
            "Use importance='variance' for a bare encoder, or add a task head."
        )
    return []


def token_mask(batch: Mapping[str, Any], x: torch.Tensor, decoder: torch.Tensor | None = None) -> torch.Tensor | None:
    """Positions of x (batch, length, d) that hold real tokens, (batch, length) bool; None where nothing is padded. Of
    x (batch * length, d), as some classes lay it out (OPT), (batch * length) bool.

    Args:
        decoder: the mask of the decoder, see `decoder_mask`. Where sources and targets are of one length, positions
            have to be real in both: an activation does not say whose it is, and padding must never count.
    """
    masks = [padding_mask(batch), decoder]
    masks = [mask.flatten() if x.dim() == 2 else mask for mask in masks if mask is not None]
    fitting = [mask for mask in masks if x.dim() in (2, 3) and mask.shape == x.shape[:-1]]
    return torch.stack(fitting).all(0) if fitting else None


def _features_are_last(module: nn.Module | None) -> bool:
    return isinstance(module, FEATURES_LAST) or (is_norm(module) and not turns_axes(module))


def features_last(x: torch.Tensor, module: nn.Module | None = None) -> torch.Tensor:
    """(batch, channels, h, w) -> (batch, h * w, channels); everything else as it is.

    Args:
        module: what made or reads x; behind a linear layer the features of four axes are last already, and all
            positions come on one axis.
    """
    if x.dim() != 4:
        return x
    return x.flatten(1, 2) if _features_are_last(module) else x.flatten(2).mT


def turned(x: torch.Tensor, module: nn.Module | None = None) -> torch.Tensor:
    """As `features_last`, each row of an image turned further than the one above, by the golden ratio of its width:
    evenly spaced positions then lie in many columns and not all in one, which would be the border of most images."""
    if x.dim() != 4 or _features_are_last(module):
        return features_last(x, module)
    height, width = x.shape[2:]
    rows = torch.arange(height, device=x.device)[:, None]
    columns = (torch.arange(width, device=x.device) + (rows * (width * GOLDEN)).long()) % width
    return features_last(x.flatten(2)[..., (rows * width + columns).flatten()].unflatten(2, (height, width)))


@contextlib.contextmanager
def observed(model: nn.Module, points: Iterable[Point], see: Callable[[Point, torch.Tensor], None]) -> Iterator[None]:
    """Call `see(point, activation)` at each point of every forward pass; the hooks are gone afterwards."""
    handles = []
    for point in points:
        module = get_module(model, point.path)

        def on_output(_module, _args, output, point=point):
            see(point, output if isinstance(output, torch.Tensor) else output[0])

        def on_input(_module, args, kwargs, point=point):
            see(point, args[0] if args else next(iter(kwargs.values())))

        if point.side == "output":
            handles.append(module.register_forward_hook(on_output))
        else:
            handles.append(module.register_forward_pre_hook(on_input, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Calibration:
    """Accumulates moments at points of a model, batch by batch; resumable.

    Args:
        points: where activations are observed.
        gradients: the subset where loss gradients are, too.
        config: sample_unit, tokens_per_sequence, edge_estimator and seed are read.
        null_moments: also accumulate the moments of sign-flipped data, which the estimator "signflip" needs; always
            done where it is the recipe's.
        halves: keep the moments of two halves of the data apart, see `SecondMoments`.
        remembered: told what the model answers to each batch, where gradients are asked for.
        scratch: where the sums are put. None: in memory.

    Attributes:
        moments: {point: SecondMoments}; those of the gradient are in `gradient_moment`.
        effects: {point: what a unit of variance of each channel costs there}, see `channels`; kept here, not made.
        batches_seen, samples_seen: what has flowed through.
    """

    def __init__(
        self,
        points: Iterable[Point],
        gradients: Iterable[Point],
        config: RMTKDConfig,
        null_moments: bool = False,
        halves: bool = True,
        remembered: Remembered | None = None,
        scratch: Scratch | None = None,
    ):
        self.scratch = scratch
        self.points, self.gradients, self.config = tuple(points), frozenset(gradients), config
        self.halves, self.remembered = halves, remembered
        self.null_moments = null_moments or needs_null_moments(config.edge_estimator)
        self.moments: dict[Point, SecondMoments] = {}
        self.effects: dict[Point, torch.Tensor] = {}
        self.batches_seen = self.samples_seen = 0

    def positions_per_sample(self, point: Point) -> float:
        """Mean number of unmasked positions of a sample at a point where gradients are observed, of all calls of its
        module: sources and targets differ in it, and what a head selects."""
        return self.moments[point].gradient_count / max(self.samples_seen, 1)

    def _moments_at(self, point: Point, dim: int, device: torch.device) -> SecondMoments:
        if point not in self.moments:
            self.moments[point] = SecondMoments(
                dim,
                null_moments=self.null_moments and not point.whole,
                device=device,
                halves=self.halves,
                seed=self.config.seed,
                zeros=None if self.scratch is None else self.scratch.zeros,
            )
        return self.moments[point]

    def update(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """One forward pass (and one backward pass where gradients are asked for).

        Raises:
            CalibrationError: non-finite activations or gradients; names the module, the batch and how many. A batch
                that the model cannot run on.
        """
        decoder, forward = decoder_mask(model, batch), True

        def see(point: Point, x: torch.Tensor) -> None:
            if point in self.gradients and not x.requires_grad:
                x.requires_grad_()
            if not forward:
                return  # a block that is recomputed for its gradients
            mask, module = token_mask(batch, x, decoder), get_module(model, point.path)
            unit = "token" if point.whole else self.config.sample_unit
            flat, kept = sample_tokens(turned(x.detach(), module), mask, unit, self.config.tokens_per_sequence)
            if point.whole and mask is None:
                flat = flat.flatten(0, -2)  # positions as rows: their autocorrelation is of no use here
            moments = self._moments_at(point, flat.shape[-1], flat.device)
            with self._naming(model, point):
                moments.update(flat, kept)
            if point in self.gradients:
                x.register_hook(lambda g: self._see_gradient(model, point, g, mask))

        with observed(model, self.points, see), explained(model, batch, self.batches_seen):
            if self.gradients:
                with torch.enable_grad(), frozen(model):
                    outputs = run(model, batch)
                    likelihood = log_likelihood(model, outputs, batch, self.config.seed)
                    forward = False
                    likelihood.backward()
                    if self.remembered is not None:
                        self.remembered.keep(self.batches_seen, answers(model, outputs, batch))
            else:
                with torch.no_grad():
                    run(model, batch)
        self.batches_seen += 1
        self.samples_seen += batch_size(batch)

    def _see_gradient(self, model: nn.Module, point: Point, g: torch.Tensor, mask: torch.Tensor | None) -> None:
        # all positions: a head may read one token alone, and only that one then has a gradient in the last block
        with self._naming(model, point):
            module = get_module(model, point.path)
            self.moments[point].update_gradient(features_last(g.detach(), module), mask)

    @contextlib.contextmanager
    def _naming(self, model: nn.Module, point: Point) -> Iterator[None]:
        try:
            yield
        except CalibrationError as error:
            raise CalibrationError(
                f"The {point.side} of module {resolve_path(model, point.path)!r} is not finite in calibration batch "
                f"{self.batches_seen}: {error}"
            ) from error

    def keep(self, points: Iterable[Point]) -> None:
        """Let go of the moments at all other points."""
        kept = set(points)
        self.moments = {point: moments for point, moments in self.moments.items() if point in kept}

    def rest(self) -> None:
        """Give back the memory of sums that lie in files and were read."""
        if self.scratch is not None:
            self.scratch.release()

    def all_reduce(self, accelerator: Any) -> None:
        """Sum over processes; every process ends with the same moments."""
        for point in self.points:
            self.moments[point].all_reduce(accelerator)
        count = torch.tensor([self.samples_seen], dtype=torch.float64, device=accelerator.device)
        self.samples_seen = int(accelerator.reduce(count, reduction="sum").item())

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on with the next batch."""
        return {
            "batches_seen": self.batches_seen,
            "samples_seen": self.samples_seen,
            "moments": {f"{p.path}|{p.side}" + "|whole" * p.whole: m.state_dict() for p, m in self.moments.items()},
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Inverse of `state_dict`, for the same points; `device`: that of the model, where sums go on."""
        self.batches_seen, self.samples_seen = state["batches_seen"], state["samples_seen"]
        for key, moments in state["moments"].items():
            path, side, *whole = key.split("|")
            dim = moments["dim"] if isinstance(moments["dim"], int) else int(moments["dim"])
            restored = self._moments_at(Point(path, side, bool(whole)), dim, torch.device(device))
            restored.load_state_dict(moments)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for parameters: those of activations are enough, and cheaper."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def calibrate(
    model: nn.Module, batches: Sequence[dict[str, Any]], calibration: Calibration, *, progress: bool = True
) -> Calibration:
    """Let `batches` flow through `model` (eval mode), going on where `calibration` stands.

    Raises:
        CalibrationError: see `Calibration.update`.
    """
    with evaluating(model):
        todo = batches[calibration.batches_seen :]
        for batch in tqdm(todo, desc="Calibrating", unit="batch", disable=not progress, leave=False):
            calibration.update(model, batch)
    return calibration
