"""Moments of activations and of loss gradients, taken by removable hooks while data flows through a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..config import RMTKDConfig
from ..errors import CalibrationError
from ..modeling_rmtkd import resolve_path
from ..models import model_inputs
from ..spectra import SecondMoments, sample_tokens
from ..spectra.edges import needs_null_moments
from .likelihood import log_likelihood
from .sites import Point, get_module


__all__ = [
    "Calibration",
    "calibrate",
    "collect_batches",
    "features_last",
    "observed",
    "token_mask",
]


GOLDEN = (5**0.5 - 1) / 2  # the turn after which few others come near the same place


def collect_batches(dataloader: Iterable, samples: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """The first batches of a dataloader that hold `samples` samples together, on `device`.

    They are kept, because surgery goes over the same data more than once and a dataloader may shuffle.

    Raises:
        CalibrationError: no batch, a batch that is no mapping, token ids outside the vocabulary being the model's
            business.
    """
    batches, seen = [], 0
    for batch in dataloader:
        if not isinstance(batch, Mapping):
            raise CalibrationError(
                f"A calibration batch is a {type(batch).__name__}; expected a mapping of model inputs, as a "
                "transformers data collator returns."
            )
        tensors = {k: v.to(device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        if not tensors or not len(next(iter(tensors.values()))):
            continue
        size = len(next(iter(tensors.values())))
        if seen + size > samples:
            tensors = {k: v[: samples - seen] if v.dim() and len(v) == size else v for k, v in tensors.items()}
        batches.append(tensors)
        seen += min(size, samples - seen)
        if seen >= samples:
            break
    if not batches:
        raise CalibrationError(
            "The calibration data is empty: expected at least one batch. Check the dataset and its filters."
        )
    masks = [batch["attention_mask"] for batch in batches if "attention_mask" in batch]
    if masks and not any(bool(mask.any()) for mask in masks):
        raise CalibrationError(
            f"All tokens of the {len(batches)} calibration batches are padding (attention_mask is 0 everywhere): "
            "expected real tokens. Check the tokenizer and the collator."
        )
    return _by_length(batches)


def _by_length(batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The same samples in batches of like length, without the padding that those then have in common; no batch has
    more positions than the largest had before, so short sentences come in larger batches.

    Only for text padded on the right: elsewhere absolute positions would move. On short sentences in random order this
    halves the work, and more.
    """
    mask = batches[0].get("attention_mask")
    if mask is None or mask.dim() != 2 or not all(_is_plain_text(batch) for batch in batches):
        return batches
    samples = [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(len(batch["attention_mask"]))]
    lengths = [int(sample["attention_mask"].sum()) for sample in samples]
    if any(not bool(s["attention_mask"][:n].all()) for s, n in zip(samples, lengths, strict=True)):
        return batches
    room = max(batch["attention_mask"].numel() for batch in batches)
    chunks: list[list[int]] = [[]]
    for i in sorted(range(len(samples)), key=lengths.__getitem__):
        if chunks[-1] and (len(chunks[-1]) + 1) * lengths[i] > room:
            chunks.append([])
        chunks[-1].append(i)
    return [_stack([samples[i] for i in chunk], lengths[chunk[-1]]) for chunk in chunks]


def _is_plain_text(batch: dict[str, torch.Tensor]) -> bool:
    """Nothing but tensors over the positions of the attention mask, or over the samples."""
    mask = batch.get("attention_mask")
    return mask is not None and all(
        v.shape[:2] == mask.shape or (v.dim() == 1 and len(v) == len(mask)) for v in batch.values()
    )


def _stack(samples: list[dict[str, torch.Tensor]], length: int) -> dict[str, torch.Tensor]:
    """Samples as one batch of `length` positions; what is added is masked, in the labels too."""
    length = max(length, 1)

    def fitted(name: str, x: torch.Tensor) -> torch.Tensor:
        if not x.dim():
            return x
        missing = length - min(len(x), length)
        return nn.functional.pad(
            x[:length], (0, 0) * (x.dim() - 1) + (0, missing), value=-100 if name == "labels" else 0
        )

    return {name: torch.stack([fitted(name, sample[name]) for sample in samples]) for name in samples[0]}


def with_decoder_inputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch of an encoder-decoder as surgery runs it, without labels: what its decoder reads is made from them."""
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if "labels" not in batch or "decoder_input_ids" in batch or make is None or not model.config.is_encoder_decoder:
        return batch
    return {**batch, "decoder_input_ids": make(labels=batch["labels"])}


def token_mask(batch: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor | None:
    """Positions of x (batch, length, d) that hold real tokens, (batch, length) bool; None where nothing is padded.

    Multiple choice has masks (batch, choices, length) and runs its backbone on (batch * choices, length, d).
    """
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 3 and mask.shape[:2].numel() == len(x):
        mask = mask.flatten(0, 1)
    return mask.bool() if mask is not None and mask.dim() == 2 and x.dim() == 3 and mask.shape == x.shape[:2] else None


def features_last(x: torch.Tensor) -> torch.Tensor:
    """(batch, channels, h, w) -> (batch, h * w, channels); everything else as it is."""
    return x.flatten(2).mT if x.dim() == 4 else x


def turned(x: torch.Tensor) -> torch.Tensor:
    """As `features_last`, each row of an image turned further than the one above, by the golden ratio of its width:
    evenly spaced positions then lie in many columns and not all in one, which would be the border of most images."""
    if x.dim() != 4:
        return x
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

    Attributes:
        moments: {point: SecondMoments}; those of the gradient are in `gradient_moment`.
        batches_seen, samples_seen, tokens_seen: what has flowed through; tokens are unmasked positions.
    """

    def __init__(
        self,
        points: Iterable[Point],
        gradients: Iterable[Point],
        config: RMTKDConfig,
        null_moments: bool = False,
    ):
        self.points, self.gradients, self.config = tuple(points), frozenset(gradients), config
        self.null_moments = null_moments or needs_null_moments(config.edge_estimator)
        self.moments: dict[Point, SecondMoments] = {}
        self.batches_seen = self.samples_seen = 0
        self.tokens_seen = 0.0

    @property
    def tokens_per_sample(self) -> float:
        """Mean number of unmasked positions of a sample."""
        return self.tokens_seen / max(self.samples_seen, 1)

    def _moments_at(self, point: Point, dim: int, device: torch.device) -> SecondMoments:
        if point not in self.moments:
            self.moments[point] = SecondMoments(
                dim, null_moments=self.null_moments and not point.whole, device=device, seed=self.config.seed
            )
        return self.moments[point]

    def update(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> None:
        """One forward pass (and one backward pass where gradients are asked for).

        Raises:
            CalibrationError: non-finite activations or gradients; names the module, the batch and how many.
        """
        tokens = 0.0

        def see(point: Point, x: torch.Tensor) -> None:
            nonlocal tokens
            if point in self.gradients and not x.requires_grad:
                x.requires_grad_()
            mask = token_mask(batch, x)
            positions = mask.sum().item() if mask is not None else features_last(x)[..., 0].numel()
            tokens = max(tokens, float(positions))
            unit = "token" if point.whole else self.config.sample_unit
            flat, kept = sample_tokens(turned(x.detach()), mask, unit, self.config.tokens_per_sequence)
            if point.whole and mask is None:
                flat = flat.flatten(0, -2)  # positions as rows: their autocorrelation is of no use here
            moments = self._moments_at(point, flat.shape[-1], flat.device)
            with self._naming(model, point):
                moments.update(flat, kept)
            if point in self.gradients:
                x.register_hook(lambda g: self._see_gradient(model, point, g, mask))

        with observed(model, self.points, see):
            if self.gradients:
                with torch.enable_grad(), frozen(model):
                    outputs = model(**model_inputs(batch))
                    log_likelihood(model, outputs, batch, self.config.seed).backward()
            else:
                with torch.no_grad():
                    model(**model_inputs(batch))
        self.batches_seen += 1
        self.samples_seen += len(next(iter(batch.values())))
        self.tokens_seen += tokens

    def _see_gradient(self, model: nn.Module, point: Point, g: torch.Tensor, mask: torch.Tensor | None) -> None:
        # all positions: a head may read one token alone, and only that one then has a gradient in the last block
        with self._naming(model, point):
            self.moments[point].update_gradient(features_last(g.detach()), mask)

    @contextlib.contextmanager
    def _naming(self, model: nn.Module, point: Point) -> Iterator[None]:
        try:
            yield
        except CalibrationError as error:
            raise CalibrationError(
                f"The {point.side} of module {resolve_path(model, point.path)!r} is not finite in calibration batch "
                f"{self.batches_seen}: {error}"
            ) from error

    def all_reduce(self, accelerator: Any) -> None:
        """Sum over processes; every process ends with the same moments."""
        for point in self.points:
            self.moments[point].all_reduce(accelerator)
        counts = torch.tensor([self.samples_seen, self.tokens_seen], dtype=torch.float64, device=accelerator.device)
        samples, tokens = accelerator.reduce(counts, reduction="sum").tolist()
        self.samples_seen, self.tokens_seen = int(samples), tokens

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on with the next batch."""
        return {
            "batches_seen": self.batches_seen,
            "samples_seen": self.samples_seen,
            "tokens_seen": self.tokens_seen,
            "moments": {f"{p.path}|{p.side}" + "|whole" * p.whole: m.state_dict() for p, m in self.moments.items()},
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Inverse of `state_dict`, for the same points; `device`: that of the model, where sums go on."""
        self.batches_seen, self.samples_seen = state["batches_seen"], state["samples_seen"]
        self.tokens_seen = state["tokens_seen"]
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
    model: nn.Module, batches: list[dict[str, torch.Tensor]], calibration: Calibration, *, progress: bool = True
) -> Calibration:
    """Let `batches` flow through `model` (eval mode), going on where `calibration` stands.

    Raises:
        CalibrationError: see `Calibration.update`.
    """
    training = model.training
    model.eval()
    try:
        todo = batches[calibration.batches_seen :]
        for batch in tqdm(todo, desc="Calibrating", unit="batch", disable=not progress, leave=False):
            calibration.update(model, batch)
    finally:
        model.train(training)
    return calibration
