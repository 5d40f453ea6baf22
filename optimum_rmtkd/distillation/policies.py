"""Distillation of causal language models on text that they generate themselves. Thin: large-scale work belongs to
TRL."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..batches import evaluating, to_device
from ..errors import RMTKDError
from ..validation import Count, Interval
from .counts import IGNORED
from .objectives.answers import shifts_labels
from .transforms import BatchTransform, register_transform


__all__ = ["AdaptiveOffPolicy", "OnPolicy"]

logger = logging.getLogger(__name__)


@register_transform
class OnPolicy(BatchTransform):
    """With probability `fraction` the completions of a batch are replaced by samples of the student (or the teacher).

    A prompt is what precedes the first label that counts; in plain text, where all labels count, the first half of the
    shortest row. All rows are cut to the shortest prompt, so no row needs padding while generating. Samples are drawn
    at temperature 1 from the whole distribution; labels cover what was generated, up to the end-of-text token.

    For causal models. Generation is transformers' own, one token at a time: for large models use the trainers of TRL.

    Args:
        fraction: share of the batches, in [0, 1].
        max_new_tokens: tokens generated per row.
        source: "student" (on-policy distillation, GKD), or "teacher" (sequence-level distillation; the first of
            several).

    Reference: Agarwal et al., arXiv 2306.13649 (GKD); Kim & Rush, arXiv 1606.07947 (sequence-level).
    """

    name = "on_policy"

    def __init__(
        self,
        fraction: Annotated[float, Interval(0, 1, what="a share of the batches")] = 0.5,
        max_new_tokens: Count = 64,
        source: Literal["student", "teacher"] = "student",
    ):
        self.fraction, self.max_new_tokens, self.source = fraction, max_new_tokens, source

    def check(self, student: nn.Module, teacher: nn.Module | None) -> None:
        if not shifts_labels(student):
            raise RMTKDError(
                f"{type(self).__name__} with {type(student).__name__}: it generates text with a causal language "
                "model. Leave it out for other models."
            )
        if teacher is None:
            raise RMTKDError(f"{type(self).__name__}: cached answers do not fit generated text. Pass a teacher model.")

    def __call__(self, run: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        if float(torch.rand(())) >= self.fraction:
            return inputs
        model = run.model if self.source == "student" else run.teacher.model
        return generated(model, _on_device(inputs, run.model), self.max_new_tokens)


@register_transform
class AdaptiveOffPolicy(OnPolicy):
    """DistiLLM's adaptive off-policy approach: student samples become more frequent when validation stops improving.

    Each batch draws r uniformly. With probability phi (1 - t/T) (phi while the replay buffer is not full) the student
    generates, and the samples go into the buffer; else if r < phi a batch of the buffer is used; else the data. Phi
    starts at 0. After an evaluation whose loss exceeds the reference (the first one's) by `tolerance` or more, phi
    grows by `increase` and that loss becomes the reference. Without evaluations while training nothing happens: it
    warns.

    Args:
        capacity: batches in the replay buffer.
        increase, tolerance: of phi, and of the validation loss that triggers it.

    Reference: Ko et al., "DistiLLM", arXiv 2402.03898, section 3.2.
    """

    name = "adaptive_off_policy"

    def __init__(
        self,
        max_new_tokens: Count = 64,
        capacity: Count = 1000,
        increase: Annotated[float, Interval(0, 1)] = 0.1,
        tolerance: float = 0.1,
    ):
        super().__init__(0.0, max_new_tokens)
        self.capacity, self.increase, self.tolerance = capacity, increase, tolerance
        self.threshold, self.reference = 0.0, float("inf")
        self.buffer: list[dict[str, torch.Tensor]] = []
        self._warned = False

    def __call__(self, run: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        if not run.evaluates:
            self._warn("there are no evaluations while training (eval_strategy='no')")
        draw = float(torch.rand(()))
        full = len(self.buffer) >= self.capacity
        if draw < self.threshold * (1 - run.progress if full else 1.0):
            batch = generated(run.model, _on_device(inputs, run.model), self.max_new_tokens)
            if full:
                self.buffer.pop(0)
            self.buffer.append({name: tensor.cpu() for name, tensor in batch.items()})
            return batch
        if draw < self.threshold and self.buffer:
            return dict(self.buffer[int(torch.randint(len(self.buffer), ()))])
        return inputs

    def on_evaluate(self, metrics: Mapping[str, float], progress: float) -> None:
        loss = metrics.get("eval_loss")
        if loss is None:
            self._warn(f"the evaluation gave {', '.join(metrics) or 'nothing'}, no eval_loss")
            return
        if self.reference == float("inf"):
            self.reference = loss
        elif loss >= self.reference + self.tolerance:
            self.threshold, self.reference = min(1.0, self.threshold + self.increase), loss

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "AdaptiveOffPolicy: %s, so its threshold stays at %g. Set eval_strategy and one eval_dataset.",
                why,
                self.threshold,
            )

    def state_dict(self) -> dict[str, torch.Tensor]:
        values = torch.tensor([self.threshold, self.reference], dtype=torch.float64)
        rows = {f"{i}/{name}": tensor for i, batch in enumerate(self.buffer) for name, tensor in batch.items()}
        return {"values": values, **rows}

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.threshold, self.reference = tensors["values"].tolist()
        rows: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            number, _, name = key.partition("/")
            if name:
                rows.setdefault(int(number), {})[name] = tensor
        self.buffer = [rows[i] for i in sorted(rows)]


def _on_device(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    return to_device(dict(inputs), next(model.parameters()).device)


def prompt_length(inputs: Mapping[str, torch.Tensor]) -> int:
    """Tokens that every row of the batch offers as its prompt, at least 1.

    Raises:
        RMTKDError: padding inside the prompts.
    """
    ids, labels, mask = inputs["input_ids"], inputs.get("labels"), inputs.get("attention_mask")
    lengths = torch.full((len(ids),), ids.shape[1], device=ids.device) if mask is None else mask.sum(1)
    prompts = lengths // 2
    if labels is not None:
        leading = (labels != IGNORED).int().argmax(1)  # 0 where the first label counts, or none does
        prompts = torch.where(leading > 0, leading, prompts)
    length = max(1, int(prompts.min()))
    if mask is not None and not bool(mask[:, :length].bool().all()):
        raise RMTKDError(
            "On-policy batches need padding on the right: the first tokens are the prompt. Set padding_side."
        )
    return length


@torch.no_grad()
def generated(model: nn.Module, inputs: Mapping[str, torch.Tensor], max_new_tokens: int) -> dict[str, torch.Tensor]:
    """Prompts completed by `model`: input_ids, attention_mask and labels, (batch, prompt + new tokens) each."""
    from transformers import GenerationConfig

    length = prompt_length(inputs)
    prompts = inputs["input_ids"][:, :length]
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length + max_new_tokens
    end = model.generation_config.eos_token_id
    ends = torch.as_tensor([] if end is None else end, device=prompts.device).reshape(-1)
    pad = model.generation_config.pad_token_id
    pad = pad if pad is not None else int(ends[0]) if len(ends) else 0
    plain = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max(1, min(max_new_tokens, room - length)),
        eos_token_id=end,
        pad_token_id=pad,
    )
    with _generating(model, plain):
        ids = model.generate(prompts, attention_mask=torch.ones_like(prompts))
    new = ids[:, length:]
    ended = torch.isin(new, ends).int().cumsum(1)
    counts = torch.cat((torch.ones_like(prompts), ((ended == 0) | ((ended == 1) & torch.isin(new, ends))).long()), 1)
    labels = ids.masked_fill(counts == 0, IGNORED)
    labels[:, :length] = IGNORED
    return {"input_ids": ids, "attention_mask": counts, "labels": labels}


@contextmanager
def _generating(model: nn.Module, config: Any):
    """In evaluation mode, by `config` alone: what the model's own one holds (penalties, beams) would bend the
    distribution. Reparameterised weights are computed once, not for every token."""
    own, model.generation_config = model.generation_config, config
    try:
        with evaluating(model), parametrize.cached():
            yield
    finally:
        model.generation_config = own
