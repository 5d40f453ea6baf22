"""Which directions stay, and how they are laid along the new coordinates. Pure functions over fp64 tensors.

Every function returns a `Projection`: `encode` (d, k) takes an old activation x (..., d) to the new one x @ encode,
and `decode` (d, k) reconstructs x from it as new @ decode.T. A layer W (out, in) between two cut sites starts as
encode_out.T @ W @ decode_in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..models import Scratch
from .linalg import check_finite, cholesky, eigh, qr, svd


__all__ = [
    "Projection",
    "Rescaled",
    "Selection",
    "encoding",
    "fisher_directions",
    "head_projection",
    "identity_projection",
    "kept_in",
    "natural_gauge",
    "never_free",
    "neuron_order",
    "neuron_projection",
    "pivoted_cholesky",
    "polar_alignment",
    "query_key_directions",
    "rotate_onto_ones",
    "symmetric_root",
    "value_directions",
]

PANEL = 128  # pivots between two updates of all that is left; one by one they would each read the whole matrix
EIGENVALUE_FLOOR = 1e-9  # share of the largest eigenvalue below which a square root is not inverted
# Of a feature's own second moment: what is left of it under this share, once others have predicted it, is rounding of
# the fp32 products that moments are sums of (`linalg.JITTERS`).
RESOLUTION = 1e-5


@dataclass(frozen=True)
class Projection:
    """A cut of one site: encode and decode, each (d, k) fp64; `index` (k,) where the cut selects features; `offset`
    (d,) what a reconstruction adds where the cut was made around the mean; `scale` (k,) that of a norm whose output
    is cut so, where it is not the diagonal of the old one in the new coordinates; `blocks`: heads that are cut each by
    itself, one behind the other (block-diagonal matrices)."""

    encode: torch.Tensor
    decode: torch.Tensor
    index: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    blocks: int = 1


class Selection(Projection):
    """A cut that keeps the features `index` (k,) out of d: its encode, zeros and ones, is made whenever it is asked
    for; it would take as much memory as all the rest.

    Args:
        decode: (d, k) fp64.
        index: (k,).
        width: d.
        offset: see `Projection`.
    """

    def __init__(self, decode: torch.Tensor, index: torch.Tensor, width: int, offset: torch.Tensor | None = None):
        values = {"decode": decode, "index": index, "offset": offset, "scale": None, "width": width}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def encode(self) -> torch.Tensor:
        """(d, k) fp64."""
        encode = torch.zeros(self.width, len(self.index), dtype=self.decode.dtype)
        encode[self.index, torch.arange(len(self.index))] = 1.0
        return encode


class Rescaled(Projection):
    """The cut of what a norm makes into the stream: with s (d,) the scale of that norm and P (d, k) the basis of the
    stream, encode = diag(s) P / g, where g (k,) is the root of the sum of squares of each column of diag(s) P.

    Between a layer that gives u and the sum that it is added to, the norm makes s u / rms(u). A norm of scale g behind
    P' diag(s) u / g makes P' diag(s) u / rms(.): the right direction for any P, and of the right length as far as the
    two rms go together; exact where P permutes the axes. Of a norm that `centres` u is taken without its mean. Made
    whenever it is asked for, as `Selection`; it is not
    read from.
    """

    def __init__(self, basis: torch.Tensor, scale: torch.Tensor, centres: bool = False):
        size = (basis.square() * scale[:, None].square()).sum(0).sqrt()
        values = {"basis": basis, "rows": scale, "centres": centres, "scale": size, "decode": basis.new_empty(0)}
        for name, value in (values | {"index": None, "offset": None}).items():
            object.__setattr__(self, name, value)

    @property
    def encode(self) -> torch.Tensor:
        """(d, k) fp64."""
        tiny = torch.finfo(self.basis.dtype).tiny
        encode = self.rows[:, None] * self.basis / self.scale.clamp_min(tiny)
        return encode - encode.mean(0) if self.centres else encode


def kept_in(scratch: Scratch | None, cuts: Mapping[str, Projection]) -> dict[str, Projection]:
    """The same selections, their decodes in files; without `scratch` as they are."""

    def kept(cut: Projection) -> Projection:
        if not isinstance(cut, Selection) or not cut.decode.numel():
            return cut
        return Selection(scratch.keep(cut.decode), cut.index, cut.width, cut.offset)

    return dict(cuts) if scratch is None else {path: kept(cut) for path, cut in cuts.items()}


def encoding(cut: Projection) -> Projection:
    """A cut without its decode, which is read once, when layers are filled."""
    none = cut.decode.new_empty(0)
    if isinstance(cut, Rescaled):
        return cut
    if isinstance(cut, Selection):
        return Selection(none, cut.index, cut.width)
    return Projection(cut.encode, none, cut.index, blocks=cut.blocks)


def identity_projection(width: int) -> Projection:
    """The cut that changes nothing."""
    eye = torch.eye(width, dtype=torch.float64)
    return Projection(eye, eye)


def symmetric_root(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square root and inverse square root of a symmetric positive semi-definite matrix (..., d, d) fp64.

    Eigenvalues under EIGENVALUE_FLOOR of the largest are raised to it in both, so that the two stay inverse to each
    other.
    """
    values, vectors = eigh(matrix, "Square root of a second moment")
    top = values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    roots = values.clamp_min(0).maximum(EIGENVALUE_FLOOR * top).sqrt()
    return (vectors * roots[..., None, :]) @ vectors.mT, (vectors / roots[..., None, :]) @ vectors.mT


def fisher_directions(moment: torch.Tensor, gradient: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions of a stream by what removing them costs, best first, and that cost.

    With S the second moment of the activation and F that of the loss gradient, both (d, d) fp64, the directions are
    the eigenvectors of S^(1/2) F S^(1/2) mapped back by S^(1/2): removing one changes the loss by half its eigenvalue,
    to second order and per token. F is shrunk by 0.1 % towards a multiple of the identity, which orders what the loss
    does not see by variance. Without a gradient: the eigenvectors of S and its eigenvalues.

    Returns:
        (basis (d, d), not orthonormal, columns in order; scores (d,) descending).
    """
    if gradient is None:
        values, vectors = eigh(moment, "Directions of the stream")
        return vectors.flip(1), values.flip(0).clamp_min(0)
    root, _ = symmetric_root(moment)
    dim = len(moment)
    shrunk = gradient + 1e-3 * gradient.trace() / dim * torch.eye(dim, dtype=gradient.dtype)
    values, vectors = eigh(root @ shrunk @ root, "Directions of the stream")
    return root @ vectors.flip(1), values.flip(0).clamp_min(0)


def pivoted_cholesky(gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy choice of features that span the rest (Harbrecht, Peters and Schneider 2012), in panels of pivots (Lucas
    2004, LAPACK's dpstrf): products of matrices in place of passes over memory.

    Where those chosen span all others, to within RESOLUTION of each, what is left of them is rounding, which says
    nothing of what to choose: from there on the largest go first.

    Args:
        gram: (m, m) fp64, symmetric positive semi-definite.
        rank: number of pivots, at most m.

    Returns:
        (pivots (rank,) in order of choice, residual (rank + 1,): the trace of what 0, 1, ... rank pivots leave).
    """
    check_finite(gram, "Choice of features")
    own = gram.diagonal().clamp_min(0)
    left, there = own.clone(), torch.arange(len(gram))
    floor = 1e-12 * left.sum().clamp_min(torch.finfo(gram.dtype).tiny) / len(gram)
    pivots, residual = [], [left.sum().item()]
    while len(pivots) < rank:
        # `gram` is what the pivots so far leave of the features that are `there` still, `left` its diagonal
        panel = gram.new_zeros(min(PANEL, rank - len(pivots)), len(there))
        chosen = torch.zeros(len(there), dtype=torch.bool)
        for step in range(len(panel)):
            new = left.masked_fill(chosen | (left <= RESOLUTION * own), -1.0)
            pivot = int((new if bool((new > floor).any()) else own.masked_fill(chosen, -1.0)).argmax())
            chosen[pivot] = True
            if new[pivot] > floor:
                row = (gram[pivot] - panel[:step, pivot] @ panel[:step]) / left[pivot].sqrt()
                panel[step] = row
                left = (left - row.square()).clamp_min(0)
            pivots.append(int(there[pivot]))
            residual.append(left.masked_fill(chosen, 0.0).sum().item())
        kept = (~chosen).nonzero()[:, 0]
        panel, own, left, there = panel[:, kept], own[kept], left[kept], there[kept]
        gram = gram[kept[:, None], kept].addmm_(panel.T, panel, alpha=-1.0)
    return torch.tensor(pivots), torch.tensor(residual, dtype=torch.float64)


def polar_alignment(basis: torch.Tensor) -> torch.Tensor:
    """Rotate an orthonormal basis (d, k) inside its span so that it lies as close to k coordinate axes as it can.

    The rows are picked by pivoted Cholesky of basis @ basis.T (the pivots of a column-pivoted QR of basis.T) and kept
    in their original order; the orthogonal factor of the polar decomposition of those k rows is undone. At k = d the
    result is the identity.
    """
    pivots, _ = pivoted_cholesky(basis @ basis.T, basis.shape[1])
    left, _, right = svd(basis[pivots.sort().values], "Alignment of a basis")
    return basis @ (left @ right).T


def rotate_onto_ones(basis: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """The smallest rotation inside the span of `basis` (d, k) after which `direction` (k,) is the all-ones direction.

    `direction` is a unit vector in the coordinates of the basis. Its plane with the all-ones vector is turned, the
    rest stays where it is, so a layer norm of the new coordinates subtracts what lies along `direction`.
    """
    k = basis.shape[1]
    ones = torch.full((k,), k**-0.5, dtype=basis.dtype)
    direction = direction if direction @ ones >= 0 else -direction
    cosine = direction @ ones
    side = ones - cosine * direction
    sine = side.norm()
    if sine < 1e-12:
        return basis
    side = side / sine
    eye = torch.eye(k, dtype=basis.dtype)
    plane = torch.outer(direction, direction) + torch.outer(side, side)
    turn = torch.outer(side, direction) - torch.outer(direction, side)
    return basis @ (eye + (cosine - 1) * plane + sine * turn).T


def neuron_order(moment: torch.Tensor, weight_norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Neurons by how well they span the rest, seen through their consumer.

    Args:
        moment: (m, m) fp64 second moment of the activation.
        weight_norm: (m,) norm of the consumer's column of each neuron.

    Returns:
        (order (m,), residual (m + 1,)): see `pivoted_cholesky`; the residual is the consumer's lost output energy.
    """
    return pivoted_cholesky(moment * torch.outer(weight_norm, weight_norm), len(moment))


def never_free(moment: torch.Tensor, effect: torch.Tensor, samples: int) -> torch.Tensor:
    """The moment with a variance for features that never varied in `samples` samples.

    By the rule of succession such a feature varies in one of samples + 2 cases. So its energy, seen through its
    consumer, is taken for that share of the others' mean, and for half of the smallest one at most, because what was
    seen to vary comes first. No other feature can make up for it.

    Args:
        moment: (m, m) fp64 second moment, or covariance.
        effect: (m,) >= 0: what a unit of variance is worth to the consumer.
    """
    variance = moment.diagonal()
    silent = (variance <= 1e-12 * variance.mean()) & (effect > 0)
    energy = (variance * effect)[~silent]
    energy = energy[energy > 0]
    if not len(energy) or not bool(silent.any()):
        return moment
    guess = torch.minimum(energy.mean() / (samples + 2), energy.min() / 2)
    return torch.where(torch.diag(silent), torch.diag(guess / effect.clamp_min(1e-300)), moment)


def neuron_projection(moment: torch.Tensor, index: torch.Tensor, mean: torch.Tensor | None = None) -> Projection:
    """Keep the features `index` (k,); the consumer is compensated by the best linear prediction of all from those
    kept.

    decode = S[:, index] S[index, index]^-1 (Nystrom), with the first jitter under which the kept block is positive
    definite; it does not depend on the scale that each feature is measured in.

    Args:
        moment: (m, m) fp64 second moment, or covariance about `mean` (m,): what the prediction then lacks of the mean
            is the `offset`.

    Raises:
        CalibrationError: the moment is not finite, or not positive definite.
    """
    if len(index) == len(moment):
        return Selection(torch.eye(len(moment), dtype=moment.dtype)[:, index], index, len(moment))
    # in units of each feature's own size, so that jitter means the same to all of them
    size = moment.diagonal().clamp_min(0).sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    alike = moment / torch.outer(size, size)
    factor = cholesky(alike[index][:, index], f"Compensation of {len(moment)} features by {len(index)} of them")
    decode = torch.cholesky_solve(alike[:, index].T.contiguous(), factor).T * size[:, None] / size[index]
    # what is kept predicts itself, also where it was silent in the data and its moment is null
    decode[index] = torch.eye(len(index), dtype=moment.dtype)
    return Selection(decode, index, len(moment), None if mean is None else mean - decode @ mean[index])


def value_directions(context: torch.Tensor, effect: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per head: what of the values matters to the output projection.

    Args:
        context: (heads, w, w) fp64 second moments of the attention output, head by head.
        effect: (heads, w, w) Wo_h^T M Wo_h with M the metric of the stream (identity, or the loss gradient's moment).

    Returns:
        (encode (heads, w, w), decode (heads, w, w), scores (heads, w) descending), from the eigenvectors of
        S^(1/2) effect S^(1/2).
    """
    root, inverse = symmetric_root(context)
    values, vectors = eigh(root @ effect @ root, "Directions of values")
    vectors = vectors.flip(-1)
    return inverse @ vectors, root @ vectors, values.flip(-1).clamp_min(0)


def query_key_directions(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per head: the bilinear form q^T k in its best low rank.

    Args:
        query, key: (heads, w, w) fp64 second moments of queries and keys.

    Returns:
        (query encode (heads, w, w), key encode, scores (heads, w)): the SVD of Sq^(1/2) Sk^(1/2), its singular values
        split evenly; a score is the mean squared attention logit (before the softmax scale) that its direction
        carries.
    """
    query_root, query_inverse = symmetric_root(query)
    key_root, key_inverse = symmetric_root(key)
    left, singular, right = svd(query_root @ key_root, "Directions of queries and keys")
    split = singular.sqrt()[..., None, :]
    return query_inverse @ left * split, key_inverse @ right.mT * split, singular.square()


def natural_gauge(encode: torch.Tensor, decode: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same cut with orthonormal decoding: encode (..., d, k), decode (..., d, k) -> both again.

    decode @ encode.mT does not change. Whitened coordinates would give one factor entries a hundred times those of the
    other; an optimizer that moves all weights by the same step then destroys the small ones.
    """
    orthonormal, upper = qr(decode, "Gauge of two factors")
    return encode @ upper.mT, orthonormal


def head_projection(
    encode: torch.Tensor, decode: torch.Tensor, width: int, mean: torch.Tensor | None = None
) -> Projection:
    """Block-diagonal cut of all heads to `width` features each, from per-head (heads, w, w) directions; `mean`
    (heads * w,), where those are of what varies about it."""
    heads = len(encode)
    encode, decode = (torch.block_diag(*each[..., :width].unbind()) for each in (encode, decode))
    return Projection(encode, decode, offset=None if mean is None else mean - decode @ (mean @ encode), blocks=heads)
