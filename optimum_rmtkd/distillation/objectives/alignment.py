"""OPDF's tensor alignment: the tensors of an over-parameterised student near those of its teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from ...errors import RMTKDError
from ...models import is_narrowed
from ...reparameterization.mpo import MPOWeight, mpo_decompose
from ...reparameterization.targets import block_lists
from ..layers import blocks_of, own_blocks, uniform_map
from ..step import DistillationStep
from .base import DistillationObjective, register_objective
from .schedules import Weight


__all__ = ["TensorAlignment", "fix_gauge"]

logger = logging.getLogger(__name__)


@torch.no_grad()
def fix_gauge(moving: list[torch.Tensor], fixed: list[torch.Tensor]) -> list[torch.Tensor]:
    """Turn the bonds of `moving` so that its tensors lie as near as they can to those of `fixed`; its product stays.

    Bond by bond from the left: Q = U V^T with U, _, V^T the SVD of mat(moving_k)^T mat(fixed_k), moving_k <- moving_k
    Q, moving_(k+1) <- Q^T moving_(k+1) (orthogonal Procrustes). Without it the tensors of two nearly equal matrices
    are as far apart as those of two random ones: each bond is free up to an invertible matrix.

    Args:
        moving, fixed: tensors (d_(k-1), i_k, j_k, d_k) of equal shapes.
    """
    turned = [tensor.double().clone() for tensor in moving]
    for k in range(len(turned) - 1):
        bond = turned[k].shape[-1]
        u, _, vt = torch.linalg.svd(turned[k].reshape(-1, bond).T @ fixed[k].double().reshape(-1, bond))
        q = u @ vt
        turned[k] = turned[k] @ q
        turned[k + 1] = torch.tensordot(q.T, turned[k + 1], dims=1)
    return [tensor.float() for tensor in turned]


@register_objective
class TensorAlignment(DistillationObjective):
    """Mean over modules, and over their chosen tensors, of ||T_student - T_reference||^2 / ||T_reference||^2.

    Needs `reparameterization=MatrixProductOperator(...)`. The reference weight is decomposed with the student's modes,
    its gauge fixed once to the student's tensors (`fix_gauge`), and frozen. With the gauge fixed the loss of two
    weights at relative distance e is at most about e^2 (of order e where bonds have null directions); without, it is
    of order 1 for any two.

    The reference is the teacher's weight where both have the same shape. For a student that was narrowed from its
    teacher it is the student's own weight right after each cut: the projected and refitted teacher, at later cuts with
    what was learnt between them. The loss then starts at 0 and is an anchor (L2-SP), and weights move so little, in
    relation, that the default weight of 1e-3 is not felt; about 1e3 is of L2-SP's order. So it is, from the start of
    the run on and with a warning, for a student that came narrowed and a teacher of other shapes. Any other shapes are
    refused; nothing is cropped.

    Args:
        tensors: "auxiliary" (all but the central one, index (n-1)//2; OPDF's choice), "outer", or "all". With unit
            modes the inner tensors start as identities on both sides, so the outer ones carry the information.

    References: OPDF, arXiv 2411.06448 (in the released code this term carries no gradient); L2-SP: arXiv 1802.01483.
    """

    name = "tensor_alignment"
    logits = "none"
    needs_teacher = False  # its weights are read in setup, its answers never

    def __init__(self, tensors: Literal["auxiliary", "outer", "all"] = "auxiliary", weight: Weight = 1e-3):
        super().__init__(weight)
        self.tensors = tensors
        self._aligned: dict[str, nn.Module] = {}  # path -> its chain of tensors

    def setup(self, student: nn.Module, teacher: nn.Module | None, projections: Mapping[str, torch.Tensor]) -> None:
        self._aligned, self._device = {}, next(student.parameters()).device
        for name in list(self._buffers):
            del self._buffers[name]
        counterpart = _counterparts(student, teacher)
        self._anchored: list[str] = []
        cut = is_narrowed(getattr(student.config, "model_type", None))
        for path, module in student.named_modules():
            if not parametrize.is_parametrized(module, "weight"):
                continue
            chain = module.parametrizations["weight"]
            if not isinstance(chain[0], MPOWeight):
                continue
            own = [getattr(chain, f"original{k}") for k in range(len(chain[0].modes[0]))]
            found = counterpart(path)
            reference = self._reference(
                path, module.weight, found, cut and bool(projections), cut, teacher is not None
            )
            fixed = fix_gauge(mpo_decompose(reference, chain[0].modes), own)
            number = len(self._aligned)
            self._aligned[path] = chain
            for k in self._chosen(len(own)):
                self.register_buffer(f"reference_{number}_{k}", fixed[k].to(self._device))
        if self._anchored and not projections:
            logger.warning(
                "TensorAlignment: no weight of the teacher fits %d of %d weights of the narrowed student (%s, ...); "
                "they are anchored to what they are now.",
                len(self._anchored),
                len(self._aligned),
                self._anchored[0],
            )
        if not self._aligned:
            raise RMTKDError(
                "TensorAlignment compares the tensors of a matrix product operator, and the student has none. Pass "
                "reparameterization=MatrixProductOperator(...), or leave TensorAlignment out."
            )

    def _reference(self, path, weight, theirs, projected: bool, cut: bool, teacher: bool) -> torch.Tensor:
        if theirs is not None and theirs.shape == weight.shape and not projected:
            return theirs.detach().to(weight.device)
        if cut:
            self._anchored.append(path)
            return weight.detach()
        if not teacher:
            raise RMTKDError(
                "TensorAlignment needs a teacher whose weights can be read; cached answers have none. Pass the model "
                "itself, or leave TensorAlignment out."
            )
        shape = "no such module" if theirs is None else f"a weight {tuple(theirs.shape)}"
        raise RMTKDError(
            f"TensorAlignment: the student's {path!r} has a weight {tuple(weight.shape)}, the teacher {shape} there. "
            "Expected equal shapes, or a student that was narrowed from the teacher. Leave TensorAlignment out for a "
            "student of other widths."
        )

    def _chosen(self, number: int) -> list[int]:
        centre = (number - 1) // 2
        choice = {
            "all": range(number),
            "outer": (0, number - 1),
            "auxiliary": (k for k in range(number) if k != centre),
        }
        return list(choice[self.tensors])

    def forward(self, step: DistillationStep) -> torch.Tensor:
        terms = []
        for number, chain in enumerate(self._aligned.values()):
            for k in self._chosen(len(chain[0].modes[0])):
                reference = getattr(self, f"reference_{number}_{k}")
                gap = getattr(chain, f"original{k}").float() - reference
                terms.append(gap.square().sum() / reference.square().sum().clamp_min(1e-12))
        return torch.stack(terms).mean()


def _counterparts(student: nn.Module, teacher: nn.Module | None):
    """path in the student -> the teacher's weight there or None, blocks by what they were made from, else
    uniformly where depths differ."""
    if teacher is None:
        return lambda path: None
    stacks, others = block_lists(student), block_lists(teacher)
    same = [(blocks, others[path]) for path, blocks in stacks.items() if path in others]
    matched = [(blocks_of(student), blocks_of(teacher)), *same]
    own = own_blocks(student, teacher)

    def numbers(ours: tuple[str, ...], theirs: tuple[str, ...]) -> list[int]:
        return own if own and ours == blocks_of(student) else uniform_map(len(ours), len(theirs))

    pairs = {
        a: theirs[j]
        for ours, theirs in matched
        if theirs
        for a, j in zip(ours, numbers(tuple(ours), tuple(theirs)), strict=True)
    }

    def find(path: str) -> torch.Tensor | None:
        for block, other in pairs.items():
            if path.startswith(block + "."):
                path = other + path[len(block) :]
                break
        try:
            return getattr(teacher.get_submodule(path), "weight", None)
        except AttributeError:
            return None

    return find
