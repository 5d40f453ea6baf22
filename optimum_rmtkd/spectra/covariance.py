"""Streaming second moments of activations: what every spectrum of this library is computed from.

Samples are never stored. Sums are kept in fp64 about a fixed pivot, so a large mean costs no precision: the pivot is
subtracted before the matrix product and undone by exact algebra afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, RMTKDError
from .autocorrelation import added, lagged_shapes, lagged_sums, longer, shift_lagged_sums
from .dependence import time_spectrum_of
from .laws import TimeSpectrum, spread
from .processes import sum_over_processes
from .products import BLOCKED_FROM, diagonal_of, eigh, exact_matmul, packed, packed_product, packed_size, unpacked
from .samples import check_finite, checked, select, work_dtype


__all__ = ["SecondMoments"]


class SecondMoments:
    """Streaming mean, covariance and (optionally) gradient and sign-flipped null moments of `dim` channels.

    Args:
        dim: number of channels d.
        null_moments: also accumulate the moments of randomly sign-flipped samples, which the `signflip` edge needs.
            Costs a second matrix product per update.
        device: where the fp64 sums live. Default: the device of the first batch (the CPU when that device has no
            fp64).
        halves: keep the sums of two halves apart, which the split-half diagnostic needs; it doubles the memory of the
            second moments.
        seed: of the random signs. Under torch.distributed the rank is added, so that ranks draw different signs.
        zeros: (shape, dtype) -> a tensor on the host, in which a sum is kept. None: in the memory of `device`.

    Notes:
        Precision. fp64 input: products in fp64; any chunking and any order of merges agree to about 1e-13. Other
        input: the product of one chunk is fp32 (relative error about 1e-7 of sqrt(S_ii S_jj)), sums over chunks are
        fp64.

        Halves. For the split-half diagnostic, sums are kept in two halves, unless `halves` is off. A chunk at least as
        large as everything before it is split, whole sequences alternating; a smaller one goes to the lighter half,
        which saves one d x d accumulation per update. Their sum, hence `covariance`, does not depend on the chunking.

        Weights. A weighted sample counts w times in every moment; `sample_size` is Kish's (sum w)^2 / sum w^2.
        The autocorrelation ignores weights.
    """

    def __init__(
        self,
        dim: int,
        *,
        null_moments: bool = False,
        device: Any = None,
        halves: bool = True,
        seed: int = 0,
        zeros: Callable[[tuple[int, ...], torch.dtype], Tensor] | None = None,
    ):
        if dim < 1:
            raise RMTKDError(f"SecondMoments(dim={dim}): expected at least one channel.")
        self.dim = int(dim)
        self.null_moments = bool(null_moments)
        self.halves = bool(halves)
        self.seed = int(seed)
        self.device = _fp64_device(device) if device is not None else None
        self._made_of = zeros
        if zeros is not None:
            self.device = torch.device("cpu")
        self._pivot: Tensor | None = None  # (dim,) fp64, values representable in fp32
        self._sums: dict[str, Tensor] = {}  # every entry is additive over samples, all fp64
        self._generator: torch.Generator | None = None

    # Accumulation

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Add samples.

        Args:
            x: (..., dim), any floating dtype. With three or more axes the first is the sequence, and those between
                form its positions, whose autocorrelation is tracked for `n_effective`.
            mask: (...,) bool or 0/1, the positions that count. Values elsewhere may be anything, NaN included.
            weight: (...,) non-negative weight per sample.

        Raises:
            CalibrationError: wrong shapes, non-finite or overflowing values, negative weights. The sums are untouched.
        """
        x, mask, weight = checked(x, mask, weight, self.dim)
        parts = [(half, select(*pieces)) for half, pieces in self._split(x, mask, weight)]
        parts = [(half, part) for half, part in parts if len(part[0])]
        if not parts:
            return
        pivot = self._pivot
        if pivot is None:
            pivot = parts[0][1][0].float().mean(0).double()
        with exact_matmul(x.device):
            moments = [(half, self._moments(*part, pivot)) for half, part in parts]
            lagged = lagged_sums(x, mask, pivot) if x.dim() > 2 else None
        # One non-finite value makes its diagonal entry non-finite: d numbers to look at instead of n x d. Nothing is
        # committed before that.
        squares = [diagonal_of(outer, self.dim) for _, (_, _, outer, _) in moments]
        check_finite(squares, [rows for _, (rows, _) in parts], "activations")
        self._prepare(pivot, x.device)
        for half, (scalars, total, outer, null) in moments:
            self._sums["scalars"][half] += scalars.to(self.device)
            self._sums["sum"][half] += total.to(self.device)
            self._sums["outer"][half] += outer.to(self.device)
            if null is not None:
                self._sums["null"] += null.to(self.device)
        for name, value in (lagged or {}).items():
            self._sums[name] = added(self._sums[name], value.to(self.device))

    @torch.no_grad()
    def update_gradient(self, g: Tensor, mask: Tensor | None = None) -> None:
        """Add loss gradients g (..., dim) at the positions of `mask` to the uncentred `gradient_moment`.

        Raises:
            CalibrationError: wrong shapes or non-finite values.
        """
        g, mask, _ = checked(g, mask, None, self.dim)
        rows, _ = select(g, mask, None)
        if not len(rows):
            return
        rows = rows.to(work_dtype(rows))
        with exact_matmul(rows.device):
            outer = packed_product(rows, rows)
        check_finite([diagonal_of(outer, self.dim)], [rows], "gradients")
        self._prepare(None, g.device)
        self._add_gradient(outer.to(self.device), len(rows))

    def _add_gradient(self, outer: Tensor | None, count: int) -> None:
        if "gradient" not in self._sums:
            self._sums["gradient"], self._sums["gradient_count"] = self._zeros(*self._shape), self._zeros(1)
        if outer is not None:
            self._sums["gradient"] += outer
        self._sums["gradient_count"] += count

    @property
    def _shape(self) -> tuple[int, ...]:
        """Of a symmetric matrix as it is held."""
        return (self.dim, self.dim) if self.dim < BLOCKED_FROM else (packed_size(self.dim),)

    def _split(self, x, mask, weight):
        counts = self._sums["scalars"][:, 0].tolist() if "scalars" in self._sums else [0.0, 0.0]
        if len(x) < 2 or x.numel() // self.dim < sum(counts):
            return [(int(self.halves and counts[1] < counts[0]), (x, mask, weight))]
        # also where both go to one sum: so that what is found does not depend on whether the halves are kept apart
        return [(h * self.halves, tuple(None if t is None else t[h::2] for t in (x, mask, weight))) for h in (0, 1)]

    def _moments(self, rows, weight, pivot):
        """Sums of one selection of rows (n, dim) about the pivot."""
        centred = rows.to(work_dtype(rows)) - pivot.to(rows.device, work_dtype(rows))
        weighted = centred if weight is None else centred * weight.to(centred)[:, None]
        outer = packed_product(weighted, centred)
        w = torch.ones(1, dtype=torch.float64) * len(rows) if weight is None else weight.double()
        w2 = w if weight is None else w.square()
        scalars = torch.stack(
            [torch.tensor(float(len(rows)), dtype=torch.float64, device=w.device), w.sum(), w2.sum()]
        )
        null = None
        if self.null_moments:
            signs = self._signs(centred)
            null = packed_product(weighted * signs, centred * signs)
        return scalars, weighted.sum(0, dtype=torch.float64), outer, null

    def _signs(self, like: Tensor) -> Tensor:
        if self._generator is None or self._generator.device != like.device:
            self._generator = torch.Generator(like.device).manual_seed(self.seed + 7919 * _rank())
        bits = torch.randint(0, 2, like.shape, generator=self._generator, device=like.device, dtype=torch.int8)
        return bits.mul_(2).sub_(1).to(like.dtype)

    def _prepare(self, pivot: Tensor | None, device: torch.device) -> None:
        if self.device is None:
            self.device = _fp64_device(device)
        if pivot is None or self._pivot is not None:
            return
        self._pivot = pivot.to(self.device, torch.float64)
        parts = 2 if self.halves else 1
        shapes = {"scalars": (parts, 3), "sum": (parts, self.dim), "outer": (parts, *self._shape)}
        shapes |= {"null": self._shape} if self.null_moments else {}
        self._sums |= {name: self._zeros(*shape) for name, shape in (shapes | lagged_shapes(self.dim)).items()}

    def _zeros(self, *shape: int) -> Tensor:
        if self._made_of is not None:
            return self._made_of(shape, torch.float64)
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    # What was learned

    def _require(self) -> dict[str, Tensor]:
        if self._pivot is None or not self._sums["scalars"][:, 1].sum() > 0:
            raise CalibrationError(
                f"No samples for {self.dim} channels: no batch came through, every position was masked, or every "
                "weight was 0."
            )
        return self._sums

    @property
    def count(self) -> int:
        """Number of samples seen (masked positions excluded, weights ignored)."""
        return int(self._sums["scalars"][:, 0].sum()) if "scalars" in self._sums else 0

    @property
    def weight_sum(self) -> float:
        """Sum of the weights; equals `count` when none were given."""
        return float(self._sums["scalars"][:, 1].sum()) if "scalars" in self._sums else 0.0

    @property
    def sample_size(self) -> float:
        """Kish's size (sum w)^2 / sum w^2; equals `count` without weights."""
        _, weight, squares = self._require()["scalars"].sum(0).tolist()
        return weight**2 / squares

    @property
    def mean(self) -> Tensor:
        """(dim,) fp64."""
        return self._offset() + self._pivot

    def _offset(self) -> Tensor:
        """Mean minus pivot, (dim,) fp64."""
        sums = self._require()
        return sums["sum"].sum(0) / sums["scalars"][:, 1].sum()

    @property
    def covariance(self) -> Tensor:
        """(dim, dim) fp64, centred, divided by the sum of weights (not by n - 1), exactly symmetric."""
        sums = self._require()
        return _covariance(sums["scalars"].sum(0)[1], sums["sum"].sum(0), self._outer())

    def _outer(self, half: int | None = None) -> Tensor:
        """(dim, dim) fp64: sum of outer products of all samples, or of one half."""
        sums = self._sums["outer"]
        if half is None and len(sums) > 1:
            return unpacked(sums.sum(0), self.dim)
        return unpacked(sums[half or 0], self.dim)

    def _diagonal(self) -> Tensor:
        return diagonal_of(self._sums["outer"].sum(0), self.dim)

    @property
    def variance(self) -> Tensor:
        """(dim,) fp64: the diagonal of `covariance`, without the rest."""
        sums = self._require()
        squares = self._diagonal() / sums["scalars"][:, 1].sum()
        return squares - self._offset().square()

    @property
    def second_moment(self) -> Tensor:
        """(dim, dim) fp64, uncentred: covariance + mean mean^T."""
        return self.covariance.addr_(self.mean, self.mean)

    def half_covariances(self) -> tuple[Tensor, Tensor] | None:
        """Centred covariances (dim, dim) fp64 of two disjoint halves of the samples, or None when one is empty, or
        where they are not kept apart."""
        sums = self._require()
        if not self.halves or not bool((sums["scalars"][:, 1] > 0).all()):
            return None
        first, second = (_covariance(sums["scalars"][h, 1], sums["sum"][h], self._outer(h)) for h in (0, 1))
        return first, second

    @property
    def null_covariance(self) -> Tensor | None:
        """(dim, dim) fp64: covariance of the sign-flipped samples, or None without `null_moments`.

        Notes:
            Signs are drawn for x - pivot, as the final mean is not yet known: its second moment per channel is var +
            (mean - pivot)^2. Rows and columns are rescaled so that the diagonal equals the covariance's exactly; off
            the diagonal the approximation is a random matrix of the same entry variances. The pivot is the mean of the
            first chunk.
        """
        if not self.null_moments:
            return None
        sums = self._require()
        null = self._made_symmetric(sums["null"] / sums["scalars"][:, 1].sum())
        variance, seen = self.covariance.diagonal(), null.diagonal().clone()
        scale = torch.where(seen > 0, variance / seen.clamp_min(torch.finfo(torch.float64).tiny), 0.0).sqrt()
        return null * scale[:, None] * scale[None, :]

    @property
    def gradient_count(self) -> int:
        """Number of gradients seen."""
        return int(self._sums["gradient_count"]) if "gradient_count" in self._sums else 0

    @property
    def gradient_moment(self) -> Tensor | None:
        """(dim, dim) fp64: E[g g^T], uncentred; None when no gradient was given."""
        if not self.gradient_count:
            return None
        return self._made_symmetric(self._sums["gradient"] / self.gradient_count)

    def _made_symmetric(self, strips: Tensor) -> Tensor:
        # what comes out of strips is symmetric as it is; another copy of the largest matrices costs seconds
        return _symmetric(strips) if self.dim < BLOCKED_FROM else unpacked(strips, self.dim)

    def time_spectrum(self, eigenvalues: Tensor, vectors: Tensor) -> TimeSpectrum | None:
        """(eigenvalues, shares) of the correlation between samples, mean 1; None if they count as independent.

        Measured on the bulk, the directions below a first edge (dependence.py).

        Args:
            eigenvalues: (dim,) of `covariance`, descending.
            vectors: (dim, dim) its eigenvectors.
        """
        return time_spectrum_of(self._require(), self._offset(), eigenvalues, vectors, self.count)

    @property
    def n_effective(self) -> float:
        """Number of independent samples whose covariance spreads its noise eigenvalues as these do.

        sample_size / (1 + 2 sum_k (1 - k/L) rho_k^2), rho_k the autocorrelation at lag k within sequences, of the
        directions that are no signal. (The size for a mean has rho_k in place of its square.) Samples given as
        (n, dim) count as independent. Costs an eigendecomposition.
        """
        times = self.time_spectrum(*eigh(self.covariance))
        return self.sample_size / (1.0 if times is None else spread(times))

    # Combination

    @torch.no_grad()
    def merge(self, other: SecondMoments) -> SecondMoments:
        """Add the samples of `other`, in place; returns self.

        Raises:
            RMTKDError: another number of channels, or only one of the two has null moments, or halves.
        """
        if other._made != self._made:
            raise RMTKDError(
                f"Cannot merge SecondMoments({other._made}) into ({self._made}): both must be made alike."
            )
        if self.device is None:
            self.device = other.device
        theirs = other._rebased(self._pivot) if other._pivot is not None else other._sums
        if self._pivot is None and other._pivot is not None:
            self._pivot = other._pivot.to(self.device, copy=True)
        for name, value in theirs.items():
            mine = self._sums.get(name)
            self._sums[name] = value.to(self.device, copy=True) if mine is None else added(mine, value.to(self.device))
        return self

    def _rebased(self, pivot: Tensor | None) -> dict[str, Tensor]:
        """The sums as they would be about another pivot: x - p' = (x - p) + delta, expanded in fp64."""
        if pivot is None or torch.equal(pivot.to(self.device), self._pivot):
            return self._sums
        delta = self._pivot - pivot.to(self.device)
        sums = dict(self._sums)
        weight, total = sums["scalars"][:, 1], sums["sum"]
        moved = []
        for outer, one, w in zip(sums["outer"], total, weight, strict=True):
            cross = torch.outer(one, delta)
            moved.append(outer + packed(cross + cross.T + w * torch.outer(delta, delta)))
        sums["outer"] = torch.stack(moved)
        sums["sum"] = total + weight[:, None] * delta
        return sums | shift_lagged_sums(sums, delta)

    @torch.no_grad()
    def all_reduce(self, accelerator_or_group: Any = None) -> SecondMoments:
        """Sum over all processes, in place; every process ends with the same moments. Returns self.

        Args:
            accelerator_or_group: an accelerate.Accelerator, a torch.distributed group, or None (the default group).
                With one process nothing happens.

        Notes:
            Call it once, on all processes, after the last update: a second call would count every sample again. A
            process without data takes part with zeros.
        """
        reduce = sum_over_processes(accelerator_or_group)
        if reduce is None:
            return self
        self._prepare(None, torch.device("cpu"))
        pivot = self._zeros(self.dim) if self._pivot is None else self._pivot
        weight = self.weight_sum
        votes = torch.cat([pivot * weight, pivot.new_tensor([weight, float("gradient" in self._sums)])])
        votes = reduce(votes)
        if votes[-1] > 0:
            self._add_gradient(None, 0)
        if votes[-2] > 0:
            common = (votes[:-2] / votes[-2]).float().double()
            self._prepare(common, common.device)
            self._sums, self._pivot = self._rebased(common), common.to(self.device)
        for name in sorted(self._sums):
            value = self._sums[name]
            self._sums[name] = reduce(longer(value) if name.startswith("lag_") else value)
        return self

    # Persistence

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers only; no samples. Everything needed to go on as if never interrupted."""
        state: dict[str, Any] = {"dim": self.dim, "null_moments": int(self.null_moments), "seed": self.seed}
        state["halves"] = int(self.halves)
        state |= {f"sums.{name}": value.clone() for name, value in self._sums.items()}
        if self._pivot is not None:
            state["pivot"] = self._pivot.clone()
        if self._generator is not None:
            state["generator"] = self._generator.get_state()
            state["generator_device"] = str(self._generator.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; replaces what was accumulated.

        Raises:
            RMTKDError: the state belongs to another `dim`, `null_moments` or `halves`.
        """
        made = _made(int(state["dim"]), bool(state["null_moments"]), bool(state.get("halves", True)))
        if made != self._made:
            raise RMTKDError(f"The state holds {made}; expected {self._made}.")
        sums = {name.removeprefix("sums."): value for name, value in state.items() if name.startswith("sums.")}
        if self.device is None and sums:
            self.device = next(iter(sums.values())).device
        self.seed = int(state["seed"])
        self._sums = {name: value.to(self.device, torch.float64, copy=True) for name, value in sums.items()}
        self._pivot = state["pivot"].to(self.device, copy=True) if "pivot" in state else None
        self._generator = None
        if "generator" in state:
            self._generator = torch.Generator(state["generator_device"])
            self._generator.set_state(state["generator"].cpu())

    @property
    def _made(self) -> str:
        return _made(self.dim, self.null_moments, self.halves)

    def __repr__(self) -> str:
        return f"SecondMoments(dim={self.dim}, count={self.count}, null_moments={self.null_moments})"


def _made(dim: int, null_moments: bool, halves: bool) -> str:
    return f"dim={dim}, null_moments={null_moments}" + ("" if halves else ", halves=False")


def _covariance(weight: Tensor, total: Tensor, outer: Tensor) -> Tensor:
    offset = total / weight
    found = outer / weight
    found -= torch.outer(offset, offset)
    return found if len(found) >= BLOCKED_FROM else _symmetric(found)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _fp64_device(device: Any) -> torch.device:
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
