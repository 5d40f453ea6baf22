"""The likelihood that a model gives to labels drawn from itself: its gradients carry the Fisher information."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..batches import decoder_mask, first_samples, main_input, model_inputs, padding_mask, run
from ..models import shifts_labels


__all__ = ["Answers", "answers", "content_uniforms", "gives_likelihood", "log_likelihood"]


DRAWN_AT_ONCE = 2**23  # probabilities that are held in fp64 at a time


def gives_likelihood(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether the model's outputs define a likelihood that gradients can be taken of."""
    with torch.no_grad():
        outputs = run(model, first_samples(batch, 1))
    return "logits" in outputs or "start_logits" in outputs


def content_uniforms(batch: Mapping[str, Any], shape: torch.Size, seed: int) -> torch.Tensor:
    """Uniform random numbers (batch, *shape) fp64 in (0, 1), on the CPU, that depend on each sample's own content.

    So the same sample draws the same numbers in whatever batch, order or process it comes; padding at the right
    changes none of them.
    """
    inputs = model_inputs(batch)
    mask = inputs.pop("attention_mask", None)
    content = main_input(inputs).detach().cpu()
    whole = not isinstance(mask, torch.Tensor) or mask.shape != content.shape
    rows = []
    for i, sample in enumerate(content):
        kept = sample if whole else sample[mask[i].bool().cpu()]
        # torch's CPU generator takes 32 bits of a seed, so ours goes into the checksum
        key = zlib.crc32(kept.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), seed % 2**32)
        generator = torch.Generator().manual_seed(key)
        rows.append(torch.rand(shape, generator=generator, dtype=torch.float64))
    return torch.stack(rows).clamp(1e-12, 1 - 1e-12)


@dataclass(frozen=True)
class Answers:
    """What a model answers to a batch, in one form for every task.

    Attributes:
        kind: "classes" (a softmax over the last axis), "labels" (independent ones, along the last axis) or "numbers".
        logits: fp32: (batch, ..., classes); labels (batch, labels); numbers (batch, ...). A span is two answers,
            (batch, 2, length), with padding at the least number there is.
        mask: (batch, length) bool, the tokens that count as answers; None where all do.
    """

    kind: str
    logits: torch.Tensor
    mask: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """How many answers there are: samples of a classifier, tokens of a language model, two for each span."""
        if self.mask is not None:
            return int(self.mask.sum())
        return self.logits.numel() if self.kind == "numbers" else self.logits[..., 0].numel()


def answers(model: nn.Module, outputs: Any, batch: Mapping[str, Any]) -> Answers | None:
    """The answers of a model, told apart by the outputs' names and shapes and by `config.problem_type`; None where
    outputs define no likelihood."""
    if "start_logits" in outputs:
        spans = torch.stack([outputs[name].float() for name in ("start_logits", "end_logits")], dim=1)
        mask = padding_mask(batch)
        if mask is not None:  # no answer starts on padding
            spans = spans.masked_fill(~mask[:, None], torch.finfo(spans.dtype).min)
        return Answers("classes", spans)
    if "logits" not in outputs:
        return None
    logits = outputs["logits"].float()
    problem = getattr(model.config, "problem_type", None)
    if problem == "multi_label_classification":
        return Answers("labels", logits)
    if problem == "regression" or logits.shape[-1] == 1 or logits.dim() == 1:
        return Answers("numbers", logits)
    if logits.dim() != 3:
        return Answers("classes", logits)
    labels = batch.get("labels")
    labelled = isinstance(labels, torch.Tensor) and labels.shape == logits.shape[:-1]
    both = getattr(model.config, "is_encoder_decoder", False)
    mask = labels != -100 if labelled else decoder_mask(model, batch) if both else padding_mask(batch)
    if labelled and shifts_labels(model):  # a label is what the position before it should answer
        mask = mask.roll(-1, dims=1)
        mask[:, -1] = False
    return Answers("classes", logits, mask if mask is not None and mask.shape == logits.shape[:-1] else None)


def log_likelihood(model: nn.Module, outputs: Any, batch: Mapping[str, Any], seed: int) -> torch.Tensor:
    """Summed log-likelihood of labels drawn from the model's own predictions: its gradients have the Fisher
    information as second moment (Kunstner, Hennig and Balles 2019, the true and not the empirical one).

    Numbers have unit variance. Draws are those of `content_uniforms`.
    """
    given = answers(model, outputs, batch)
    logits = given.logits
    if given.kind == "labels":
        uniforms = content_uniforms(batch, logits.shape[1:], seed).to(logits.device)
        drawn = (uniforms < logits.detach().double().sigmoid()).to(logits)
        return -nn.functional.binary_cross_entropy_with_logits(logits, drawn, reduction="sum")
    if given.kind == "numbers":
        noise = torch.special.ndtri(content_uniforms(batch, logits.shape[1:], seed)).to(logits)
        return (noise * logits).sum()
    likelihood = _drawn(logits, content_uniforms(batch, logits.shape[1:-1], seed))
    return (likelihood if given.mask is None else likelihood.masked_fill(~given.mask, 0.0)).sum()


def _drawn(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Log-probability (...,) of the class that `uniforms` (...,) draw from each row of logits (..., classes)."""
    rows, uniforms = logits.detach().flatten(0, -2), uniforms.to(logits.device).flatten()
    drawn, sums, chunk = [], [], max(1, DRAWN_AT_ONCE // logits.shape[-1])
    for part, u in zip(rows.split(chunk), uniforms.split(chunk), strict=True):
        sums.append(part.logsumexp(-1))
        cumulative = part.log_softmax(-1).double().exp_()
        cumulative = torch.cumsum(cumulative, -1, out=cumulative)
        drawn.append((cumulative < u[:, None] * cumulative[:, -1:]).sum(-1))
    index = torch.cat(drawn).clamp(max=logits.shape[-1] - 1).reshape(logits.shape[:-1])
    return _LogProbability.apply(logits, index, torch.cat(sums).reshape(index.shape))


class _LogProbability(torch.autograd.Function):
    """logits[..., index] less their logsumexp, which is given. Beside the logits it needs one matrix of their size,
    the gradient; what torch makes of the two terms needs four."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, index: torch.Tensor, logsumexp: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits, index, logsumexp)
        return logits.gather(-1, index[..., None])[..., 0] - logsumexp

    @staticmethod
    def backward(ctx, given: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, index, logsumexp = ctx.saved_tensors
        gradient = (logits - logsumexp[..., None]).exp_().mul_(-given[..., None])
        return gradient.scatter_add_(-1, index[..., None], given[..., None]), None, None
