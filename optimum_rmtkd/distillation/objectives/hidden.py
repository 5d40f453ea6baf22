"""Hidden states of the student against the projected hidden states of the teacher."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import nn

from ...errors import RMTKDError, UnsupportedArchitectureError
from ..layers import blocks_of, own_blocks
from ..projections import projection_for
from ..step import DistillationStep
from .base import DistillationObjective, FeatureRequest, register_objective
from .schedules import Weight


__all__ = ["HiddenStateLoss"]

logger = logging.getLogger(__name__)


@register_objective
class HiddenStateLoss(DistillationObjective):
    """Residual stream of the student against the teacher's, projected by the very basis the student was cut with.

    Mean over the blocks of  mean((h_student - h_teacher P)^2) / var(h_teacher P),  mean and variance over unmasked
    tokens (pixels) and features, in fp32. There is no adapter: P is known. Where the stream was not cut it is the
    identity.

    The variance is that of the calibration data, seen once after each cut (`observe`): a constant, so the loss does
    not depend on how a batch is split over accumulation steps or processes. Without observation it is that of the
    batch.
    """

    name = "hidden"
    logits = "none"
    needs_projection = True
    observes = True

    def __init__(self, weight: Weight = 1.0):
        super().__init__(weight)
        self._blocks: tuple[tuple[str, str], ...] = ()
        self._left_out: set[str] = set()
        self.register_buffer("variance", torch.empty(0), persistent=True)  # shape: (n_blocks,), empty: not observed

    def setup(self, student: nn.Module, teacher: nn.Module | None, projections: Mapping[str, torch.Tensor]) -> None:
        from ... import surgery

        try:
            ours, theirs = surgery.block_paths(student), blocks_of(teacher)
            self.active = True
        except UnsupportedArchitectureError as error:
            logger.warning("HiddenStateLoss drops out, the other objectives stay: %s", error)
            self._blocks, self.active = (), False
            return
        if (own := own_blocks(student, teacher)) is not None:
            theirs = tuple(theirs[number] for number in own)
        if len(ours) != len(theirs):
            raise RMTKDError(
                f"The student has {len(ours)} residual blocks, the teacher {len(theirs)}; HiddenStateLoss pairs them "
                "one to one. Use a teacher of the same depth, or leave HiddenStateLoss out of the objectives."
            )
        self._blocks = tuple(zip(ours, theirs, strict=True))
        self._left_out = set()
        device = next(student.parameters()).device
        self._projections = {
            path: matrix.to(device=device, dtype=torch.float32)
            for path in theirs
            if (matrix := projection_for(projections, path)) is not None
        }
        self.variance = torch.empty(0, device=device)
        self._sums = torch.zeros(len(ours), 3, dtype=torch.float64, device=device)

    def features(self) -> FeatureRequest:
        return FeatureRequest(tuple(s for s, _ in self._blocks), tuple(t for _, t in self._blocks))

    def observe(self, step: DistillationStep) -> None:
        for index, (_, path) in enumerate(self._blocks):
            target = self._target(step, path)
            count = torch.full((), target.numel(), dtype=torch.float64, device=target.device)
            wide = target.double()
            self._sums[index] += torch.stack((count, wide.sum(), wide.square().sum()))

    def finish(self, reduce_sum: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> None:
        count, total, squares = reduce_sum(self._sums).unbind(dim=1)  # shape: (n_blocks,) each
        if bool((count > 1).all()):
            self.variance = (squares / count - (total / count).square()).clamp_min(1e-12).float()

    def forward(self, step: DistillationStep) -> torch.Tensor:
        terms = []
        for index, (ours, theirs) in enumerate(self._blocks):
            target = self._target(step, theirs)
            values = positions(step.student_features[ours], step.mask).float()
            if values.shape != target.shape:
                self._leave_out(ours, values, target, theirs in self._projections)
                continue
            variance = self.variance[index] if self.variance.numel() else target.var().clamp_min(1e-12)
            # Empty in a batch without a single unmasked token: the sum is 0 where a mean would be NaN.
            mean = (values - target).square().sum() / max(values.numel(), 1)
            terms.append(mean / variance * step.share(unit_of(step.student_features[ours], step.mask)))
        if not terms:
            return self._sums.new_zeros((), dtype=torch.float32)
        return torch.stack(terms).sum() / len(terms)

    def _target(self, step: DistillationStep, path: str) -> torch.Tensor:
        """Projected stream of the teacher at unmasked positions: (n_positions, d_student), fp32."""
        target = positions(step.teacher_features[path], step.mask).float()
        matrix = self._projections.get(path)
        if matrix is None:
            return target
        if matrix.shape[0] != target.shape[-1]:
            raise RMTKDError(
                f"The teacher's stream at {path!r} is {target.shape[-1]} wide, the student's projection expects "
                f"{matrix.shape[0]}: this is not the teacher that the bases were computed on. Leave HiddenStateLoss "
                "out."
            )
        # Outside autocast: a bf16 product would add its own error to the target.
        with torch.autocast(target.device.type, enabled=False):
            return target @ matrix

    def _leave_out(self, path: str, values: torch.Tensor, target: torch.Tensor, known: bool) -> None:
        if known:
            raise RMTKDError(
                f"The student's stream at {path!r} is {values.shape[-1]} wide, the projected teacher "
                f"{target.shape[-1]}: the projection does not belong to this student."
            )
        if path not in self._left_out:
            self._left_out.add(path)
            logger.warning(
                "HiddenStateLoss leaves out block %r: student %s, teacher %s, and no projection is known between "
                "them.",
                path,
                tuple(values.shape),
                tuple(target.shape),
            )


def unit_of(feature: torch.Tensor, mask: torch.Tensor | None, unit: str = "tokens") -> str:
    """What `positions` of this feature are counted in: `unit` where the mask fits, samples where all are alike."""
    return unit if feature.dim() == 3 and mask is not None and mask.shape == feature.shape[:2] else "samples"


def positions(feature: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A module's output as samples of features, padding dropped.

    Args:
        feature: (batch, tokens, d), a feature map (batch, channels, height, width), or (batch, d).
        mask: bool (batch, tokens) or None; used where it matches the first two dimensions of three.

    Returns:
        (n_positions, d); for a feature map the pixels are the positions and the channels the features.
    """
    if feature.dim() == 4:
        feature = feature.movedim(1, -1)
    elif feature.dim() == 3 and mask is not None and mask.shape == feature.shape[:2]:
        return feature[mask]
    return feature.reshape(-1, feature.shape[-1])
