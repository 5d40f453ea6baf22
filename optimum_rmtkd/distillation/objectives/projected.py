"""RdimKD: features compared in a low-dimensional subspace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import RMTKDError
from ...spectra import SecondMoments, sample_tokens
from ...validation import Count, Seed
from ..layers import Layers, check_layers, in_decoder, layer_pairs
from ..projections import projection_for
from ..step import DistillationStep
from ..subspaces import build_projection
from .base import DistillationObjective, FeatureRequest, register_objective
from .hidden import positions, unit_of
from .schedules import Weight


__all__ = ["ProjectedFeatureLoss"]

KEPT_SAMPLES = 16384  # positions held for projections that are trained on them


@register_objective
class ProjectedFeatureLoss(DistillationObjective):
    """Mean over the layer pairs of  ||(F_s - F_t) K||^2 / (N d)  over the teacher's own variance in the subspace.

    F are the outputs of the compared modules at the N unmasked positions (tokens, pixels of a feature map with the
    channels as features), K (p, d) the basis of `projection`, fitted once on the frozen teacher over the calibration
    data, the variance tr(K^T C K) / d. So weight 1 means the same for every projection: 1 is the loss of a student
    that knows only the mean.

    Widths that differ: a student that was narrowed by a known basis P is compared with F_t P, in whose space K is
    fitted, without any adapter. Otherwise one linear map A without bias is trained, F_s A against F_t K; it is
    optimised beside the student and not saved with it. (An adapter to p features followed by K would be the same maps
    with more parameters.)

    Args:
        projection: "marchenko_pastur", "pca", "random", "autoencoder", a dict with arguments, or an instance; None:
            full features (plain L2).
        layers: "last", "uniform" or {student module or block: teacher's}.
        normalize: None, or "layernorm": features are normalised position by position first (pre-norm streams, where a
            few huge dimensions rule).
        tokens_per_sequence: evenly spaced positions of each sample that the fit sees; neighbours are correlated.

    Reference: Guo et al., "RdimKD", arXiv 2312.08700 (random, PCA, autoencoder); the Marchenko-Pastur form is this
    library's.
    """

    name = "projected_feature"
    logits = "none"
    observes = True

    def __init__(
        self,
        projection: Any = "marchenko_pastur",
        layers: Layers = "last",
        weight: Weight = 1.0,
        normalize: Literal["layernorm"] | None = None,
        tokens_per_sequence: Count = 8,
        seed: Seed = 0,
    ):
        super().__init__(weight)
        self.projection, self.layers, self.normalize = build_projection(projection), check_layers(layers), normalize
        self.tokens_per_sequence, self.seed = tokens_per_sequence, seed
        self._pairs: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        projection = None if self.projection is None else self.projection.to_dict()
        layers = dict(self.layers) if isinstance(self.layers, Mapping) else self.layers
        return super().to_dict() | {"projection": projection, "layers": layers}

    # -- fit ----------------------------------------------------------------------------------------------------------

    def check(self, student: nn.Module, teacher: nn.Module | None) -> None:
        if teacher is None:
            raise RMTKDError(
                "ProjectedFeatureLoss needs a teacher whose features can be read; cached answers have none."
            )
        layer_pairs(student, teacher, self.layers)

    def setup(self, student: nn.Module, teacher: nn.Module | None, projections: Mapping[str, torch.Tensor]) -> None:
        self.check(student, teacher)
        self._device = next(student.parameters()).device
        self._pairs = layer_pairs(student, teacher, self.layers)
        self._decoding = [in_decoder(student, path) for path, _ in self._pairs]
        blocks = set(layer_pairs(student, teacher, "uniform")) if projections else set()
        # The known basis is that of the residual stream: of blocks' outputs at equal depth, and of nothing else.
        self._known = {
            theirs: matrix.to(self._device, torch.float32)
            for ours, theirs in self._pairs
            if (ours, theirs) in blocks and (matrix := projection_for(projections, theirs)) is not None
        }
        self._widths: dict[int, int] = {}
        self._moments: dict[int, SecondMoments] = {}
        self._samples: dict[int, list[torch.Tensor]] = {}
        self.adapters = nn.ParameterDict()
        for name in [n for n in self._buffers if n.startswith(("basis_", "variance_"))]:
            del self._buffers[name]
        self._ready = False

    def features(self) -> FeatureRequest:
        return FeatureRequest(tuple(s for s, _ in self._pairs), tuple(t for _, t in self._pairs))

    def observe(self, step: DistillationStep) -> None:
        for index, (_, path) in enumerate(self._pairs):
            mask, _ = step.counted(self._decoding[index])
            target, mask = self._laid_out(step.teacher_features[path], mask)
            target = self._aimed(target, path)
            samples, mask = sample_tokens(target, mask, "spaced", self.tokens_per_sequence)
            if index not in self._moments:
                self._moments[index] = SecondMoments(
                    samples.shape[-1],
                    null_moments=(self.projection is not None and self.projection.null_moments),
                    seed=self.seed,
                )
            self._moments[index].update(samples, mask)
            if self.projection is not None and self.projection.keeps_samples:
                rows = samples.flatten(0, -2) if mask is None else samples[mask]
                held = self._samples.setdefault(index, [])
                if sum(map(len, held)) < KEPT_SAMPLES:
                    held.append(rows.float().cpu())

    def finish(self, reduce_sum: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> None:
        for index in range(len(self._pairs)):
            moments = self._moments.get(index)
            if moments is None:
                raise RMTKDError("ProjectedFeatureLoss saw no calibration data on this process; pass more of it.")
            moments.all_reduce()
            basis = torch.eye(moments.dim, dtype=torch.float64, device=self._device)
            if self.projection is not None:
                held = self._samples.get(index)
                basis = self.projection.fit(moments, torch.cat(held) if held else None)
                basis = _from_first_process(basis.to(self._device), reduce_sum)
            covariance = moments.covariance.to(basis.device)
            variance = (basis.T @ covariance @ basis).trace() / basis.shape[1]
            self._keep(index, basis, variance)
        self._moments, self._samples, self._ready = {}, {}, True

    def _keep(self, index: int, basis: torch.Tensor, variance: torch.Tensor) -> None:
        # contiguous, as a checkpoint gives it back: another layout is summed in another order
        self.register_buffer(f"basis_{index}", basis.to(self._device, torch.float32).contiguous())
        self.register_buffer(f"variance_{index}", variance.clamp_min(1e-12).to(self._device, torch.float32))

    def prepare(self, step: DistillationStep) -> None:
        """Create the adapters that this pair of models needs, from one batch's student features (no gradient)."""
        for index, (ours, theirs) in enumerate(self._pairs):
            width = self._laid_out(step.student_features[ours], None)[0].shape[-1]
            basis = getattr(self, f"basis_{index}")
            if width == basis.shape[0]:
                continue
            if theirs in self._known:
                raise RMTKDError(
                    f"The student's stream at {ours!r} is {width} wide, the projected teacher {basis.shape[0]}: the "
                    "projection does not belong to this student."
                )
            generator = torch.Generator().manual_seed(self.seed + index)
            start = torch.randn(width, basis.shape[1], generator=generator) / width**0.5
            self.adapters[str(index)] = nn.Parameter(start.to(self._device))

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            head, _, tail = name.partition(".")
            if tail:
                self.adapters[tail] = nn.Parameter(tensor.to(self._device))
            else:
                self.register_buffer(head, tensor.to(self._device))
        self._ready = True

    # -- loss ---------------------------------------------------------------------------------------------------------

    def forward(self, step: DistillationStep) -> torch.Tensor:
        if not self._ready:
            raise RMTKDError(
                "ProjectedFeatureLoss was not fitted: call observe on calibration batches and finish first."
            )
        terms = [self._term(index, step, *pair) for index, pair in enumerate(self._pairs)]
        return torch.stack(terms).mean()

    def _term(self, index: int, step: DistillationStep, ours: str, theirs: str) -> torch.Tensor:
        student, teacher = step.student_features[ours], step.teacher_features[theirs].detach()
        teacher = _resized(teacher, student, ours, theirs)
        mask, unit = step.counted(self._decoding[index])
        values = self._normalised(positions(student.float(), mask), maps=False)
        target = positions(self._aimed(teacher.float(), theirs, maps=teacher.dim() == 4), mask)
        basis, variance = getattr(self, f"basis_{index}"), getattr(self, f"variance_{index}")
        adapter = self.adapters[str(index)] if str(index) in self.adapters else None
        with torch.autocast(values.device.type, enabled=False):
            if adapter is not None:
                gap = values @ adapter - target @ basis
            elif values.shape[-1] == basis.shape[0]:
                gap = (values - target) @ basis
            else:
                raise RMTKDError(
                    f"{ours!r} is {values.shape[-1]} wide, {theirs!r} {basis.shape[0]}, and no adapter was made for "
                    "them."
                )
        mean = gap.square().sum() / max(gap.numel(), 1)
        return mean / variance * step.share(unit_of(student, mask, unit))

    def _laid_out(self, feature: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, positions, features) and its mask, if it has one."""
        if feature.dim() == 4:
            return feature.flatten(2).transpose(1, 2), None
        if feature.dim() == 2:
            feature = feature[:, None]
        fits = mask is not None and mask.shape == feature.shape[:2]
        return feature, mask if fits else None

    def _aimed(self, feature: torch.Tensor, path: str, maps: bool = False) -> torch.Tensor:
        """Teacher's feature as the student should have it: through the known basis, normalised."""
        matrix = self._known.get(path)
        if matrix is not None:
            if matrix.shape[0] != feature.shape[1 if maps else -1]:
                raise RMTKDError(
                    f"The teacher's stream at {path!r} is {feature.shape[-1]} wide, the student's projection expects "
                    f"{matrix.shape[0]}: this is not the teacher that the bases were computed on."
                )
            with torch.autocast(feature.device.type, enabled=False):
                feature = torch.einsum("bphw,pk->bkhw" if maps else "...p,pk->...k", feature.float(), matrix)
        return self._normalised(feature.float(), maps)

    def _normalised(self, feature: torch.Tensor, maps: bool) -> torch.Tensor:
        if self.normalize is None:
            return feature
        if maps:
            return F.layer_norm(feature.movedim(1, -1), feature.shape[1:2]).movedim(-1, 1)
        return F.layer_norm(feature, feature.shape[-1:])


def _resized(teacher: torch.Tensor, student: torch.Tensor, ours: str, theirs: str) -> torch.Tensor:
    """The teacher's feature map at the student's resolution; features of tokens have to agree in length."""
    if teacher.dim() == 4 and student.dim() == 4:
        if teacher.shape[2:] == student.shape[2:]:
            return teacher
        return F.interpolate(teacher.float(), size=student.shape[2:], mode="bilinear", align_corners=False)
    if teacher.dim() != student.dim() or teacher.shape[:-1] != student.shape[:-1]:
        raise RMTKDError(
            f"Features {tuple(student.shape)} of the student's {ours!r} and {tuple(teacher.shape)} of the teacher's "
            f"{theirs!r}: expected the same positions. Choose modules that see the same tokens or feature maps."
        )
    return teacher


def _from_first_process(basis: torch.Tensor, reduce_sum: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The basis of process 0 on every process: rounding, and samples that only one process saw, must not divide
    them."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return basis
    width = torch.tensor([basis.shape[1] if dist.get_rank() == 0 else 0], dtype=torch.float64, device=basis.device)
    shape = (basis.shape[0], int(reduce_sum(width)[0]))
    mine = basis if dist.get_rank() == 0 else torch.zeros(shape, dtype=basis.dtype, device=basis.device)
    return reduce_sum(mine.contiguous())
