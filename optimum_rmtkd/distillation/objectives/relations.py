"""Attention relations: which tokens look at which, compared between networks of any width (MiniLM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import RMTKDError
from ...validation import Count, Length
from ..layers import Layers, check_layers, in_decoder, layer_pairs
from ..step import DistillationStep
from .answers import shifts_labels
from .base import DistillationObjective, FeatureRequest, register_objective
from .divergences import kl_divergence
from .schedules import Weight


__all__ = ["AttentionRelationLoss"]

# Last words of the projections' paths, as transformers' models call them.
WORDS = {
    "q": ("query", "q_proj", "q_lin", "query_proj"),
    "k": ("key", "k_proj", "k_lin", "key_proj"),
    "v": ("value", "v_proj", "v_lin", "value_proj"),
}


@register_objective
class AttentionRelationLoss(DistillationObjective):
    """KL between relation distributions of teacher and student, mean over relations, heads and unmasked tokens.

    A relation of a and b is softmax(A B^T / sqrt(d_r)), for each head a (tokens, tokens) matrix. "qk" is the attention
    distribution itself (before position terms), "vv" MiniLM's value relation, "qq", "kk" and "vv" MiniLMv2's. No
    adapter: the matrices have the same shape whatever the widths. Padded tokens are no keys and are not averaged over;
    causal models look back only.

    Args:
        relations: pairs of q, k and v.
        layers: "last" (as the papers), "uniform", or {student block: teacher block}.
        heads: relation heads into which all heads together are cut anew; None: the student's attention heads.

    References: Wang et al., "MiniLM", arXiv 2002.10957; "MiniLMv2", arXiv 2012.15828.
    """

    name = "attention_relation"
    logits = "none"

    def __init__(
        self,
        relations: Annotated[Sequence[str], Length(1)] = ("qk", "vv"),
        layers: Layers = "last",
        heads: Count | None = None,
        weight: Weight = 1.0,
    ):
        super().__init__(weight)
        relations = list(relations)
        if any(len(r) != 2 or set(r) - set(WORDS) for r in relations):
            raise RMTKDError(
                f"AttentionRelationLoss(relations={relations}): expected pairs of q, k and v, for example 'qk'."
            )
        self.relations, self.layers, self.heads = relations, check_layers(layers), heads
        self._pairs: list[tuple[dict[str, str], dict[str, str]]] = []

    def check(self, student: nn.Module, teacher: nn.Module | None) -> None:
        self._paired(student, teacher)

    def _paired(self, student: nn.Module, teacher: nn.Module | None) -> list[tuple[dict[str, str], dict[str, str]]]:
        """Paths of the projections by letter, of the student's block and the teacher's, pair by pair."""
        if teacher is None:
            raise RMTKDError(
                "AttentionRelationLoss needs a teacher whose attention can be read; cached answers have none."
            )
        letters = sorted(set("".join(self.relations)))
        pairs = [
            (_projections_in(student, ours, letters), _projections_in(teacher, theirs, letters))
            for ours, theirs in layer_pairs(student, teacher, self.layers)
        ]
        for model, paths in ((model, pair[side]) for pair in pairs for side, model in enumerate((student, teacher))):
            for path in paths.values():
                width = getattr(model.get_submodule(path), "out_features", None)
                if self.heads is not None and width is not None and width % self.heads:
                    raise RMTKDError(
                        f"AttentionRelationLoss(heads={self.heads}): {path!r} of {type(model).__name__} is {width} "
                        "wide; expected a multiple of heads."
                    )
        return pairs

    def setup(self, student: nn.Module, teacher: nn.Module | None, projections: Mapping[str, torch.Tensor]) -> None:
        self._pairs = self._paired(student, teacher)
        self._decoding = [in_decoder(student, next(iter(paths.values()))) for paths, _ in self._pairs]
        self._causal = [
            any(_looks_back(model, pair[side]) for side, model in enumerate((student, teacher)))
            for pair in self._pairs
        ]
        self._heads = self.heads or getattr(student.config, "num_attention_heads", None)
        self._scaling = {
            (side, path): getattr(model.get_submodule(path.rpartition(".")[0]), "scaling", None)
            for model, side in ((student, 0), (teacher, 1))
            for path in (pair[side].get("q") for pair in self._pairs)
            if path is not None and getattr(model.config, "num_attention_heads", None) == self._heads
        }
        if not isinstance(self._heads, int):
            raise RMTKDError(
                f"AttentionRelationLoss: {type(student).__name__} does not say how many attention heads it has; give "
                "heads=."
            )

    def features(self) -> FeatureRequest:
        return FeatureRequest(
            *(tuple(path for pair in self._pairs for path in pair[side].values()) for side in (0, 1))
        )

    def forward(self, step: DistillationStep) -> torch.Tensor:
        return torch.stack([self._term(step, index) for index in range(len(self._pairs))]).mean()

    def _term(self, step: DistillationStep, index: int) -> torch.Tensor:
        (ours, theirs), decoding, divergences = self._pairs[index], self._decoding[index], []
        for a, b in self.relations:
            log_q = self._relation(step, 0, index, a + b)
            log_p = self._relation(step, 1, index, a + b).detach()
            if log_p.shape != log_q.shape:
                raise RMTKDError(
                    f"Relations {tuple(log_q.shape)} of the student's {ours[a]!r}, {tuple(log_p.shape)} of the "
                    f"teacher's {theirs[a]!r}: expected the same tokens."
                )
            divergences.append(kl_divergence(log_p, log_q))  # (batch, heads, tokens)
        divergence = torch.stack(divergences).mean((0, 2))
        counted = self._mask(step, divergence, decoding)
        if counted is None:
            return divergence.mean() * step.share("samples")
        kept = divergence[counted]
        return kept.sum() / max(kept.numel(), 1) * step.share(step.counted(decoding)[1])

    def _relation(self, step: DistillationStep, side: int, index: int, pair: str) -> torch.Tensor:
        """Log-probabilities (batch, heads, tokens, tokens), fp32, of one block's projections (batch, tokens, width).

        Args:
            side: 0 student, 1 teacher.
            index: of the pair of blocks.
        """
        paths, decoding = self._pairs[index][side], self._decoding[index]
        features = step.teacher_features if side else step.student_features
        a, b = (features[paths[letter]] for letter in pair)
        if a.dim() != 3 or a.shape[-1] != b.shape[-1] or a.shape[-1] % self._heads:
            raise RMTKDError(
                f"AttentionRelationLoss: projections of shapes {tuple(a.shape)} and {tuple(b.shape)} into "
                f"{self._heads} heads; expected (batch, tokens, width) of one width, a multiple of heads. Choose "
                "heads=, or relations of one projection ('vv') where keys are shared between heads."
            )
        mask = self._mask(step, a[..., 0], decoding)
        if mask is not None:  # before the product: 0 * NaN would enter the gradients of real tokens
            a, b = (x.masked_fill(~mask[..., None], 0.0) for x in (a, b))
        a, b = (x.float().unflatten(-1, (self._heads, -1)).transpose(1, 2) for x in (a, b))
        with torch.autocast(a.device.type, enabled=False):
            scores = a @ b.transpose(-1, -2) * self._scale(side, paths, pair, a.shape[-1])
        low = torch.finfo(scores.dtype).min / 4  # finite: -inf - -inf is NaN
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], low)
        if self._causal[index] or decoding:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, low)
        return F.log_softmax(scores, -1)

    def _scale(self, side: int, paths: dict[str, str], pair: str, width: int) -> float:
        """1 / sqrt(d_r); for attention itself, in the model's own heads, what it scales by: a cut head keeps its
        scale."""
        own = self._scaling.get((side, paths[pair[0]])) if pair == "qk" else None
        return own or width**-0.5

    def _mask(self, step: DistillationStep, values: torch.Tensor, decoding: bool) -> torch.Tensor | None:
        mask, _ = step.counted(decoding)
        fits = mask is not None and mask.shape == (len(values), values.shape[-1])
        return mask if fits else None


def _looks_back(model: nn.Module, paths: Mapping[str, str]) -> bool:
    """Is it causal attention that these projections belong to? Models that do not say are, where they predict the
    next token."""
    owner = model.get_submodule(next(iter(paths.values())).rpartition(".")[0])
    says = getattr(owner, "is_causal", None)
    return shifts_labels(model) if says is None else bool(says)


def _projections_in(model: nn.Module, block: str, letters: list[str]) -> dict[str, str]:
    """Paths of the wanted projections of one block, by letter; the first of each (self-attention comes before
    cross)."""
    found = {}
    for path, _ in model.get_submodule(block).named_modules():
        for letter in letters:
            if path.rpartition(".")[2] in WORDS[letter]:
                found.setdefault(letter, f"{block}.{path}")
    if missing := [letter for letter in letters if letter not in found]:
        raise RMTKDError(
            f"AttentionRelationLoss: no {' or '.join('/'.join(WORDS[letter]) for letter in missing)} in {block!r} of "
            f"{type(model).__name__}. It needs attention with separate query, key and value projections; leave it out."
        )
    return found
