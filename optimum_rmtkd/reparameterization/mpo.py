"""Matrix product operators with full bonds: the over-parameterised weights of OPDF."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..errors import RMTKDError
from .base import Reparameterization, register_reparameterization


__all__ = [
    "MPOWeight",
    "MatrixProductOperator",
    "Modes",
    "choose_modes",
    "mpo_contract",
    "mpo_decompose",
    "mpo_factor",
]

NULL_SHARE = 0.01  # of the mean root of the singular values: below it a direction is as good as null

Modes = tuple[tuple[int, ...], tuple[int, ...]]  # (i_1..i_n) of the rows, (j_1..j_n) of the columns


def divisors_near_root(size: int) -> tuple[int, int]:
    """The most square factorisation a * b = size with a >= b: 768 -> (32, 24)."""
    small = next(b for b in range(math.isqrt(size), 0, -1) if size % b == 0)
    return size // small, small


def balanced_modes(size: int, number: int) -> tuple[int, ...]:
    """`number` factors of `size`, as equal as its prime factors allow, large ones first."""
    modes, rest, prime, primes = [1] * number, size, 2, []
    while rest > 1:
        if prime * prime > rest:
            prime = rest
        if rest % prime:
            prime += 1
            continue
        primes.append(prime)
        rest //= prime
    for prime in sorted(primes, reverse=True):
        modes[modes.index(min(modes))] *= prime
    return tuple(sorted(modes, reverse=True))


def check_modes(size: int, number: int, given: Sequence[int]) -> tuple[int, ...]:
    """Modes given by the user.

    Raises:
        RMTKDError: not `number` whole numbers above 0 whose product is `size`.
    """
    fit = isinstance(given, Sequence) and all(isinstance(mode, int) and mode > 0 for mode in given)
    if not fit or math.prod(given) != size or len(given) != number:
        raise RMTKDError(f"modes {given!r} for a side of {size}: expected {number} factors whose product is {size}.")
    return tuple(given)


def choose_modes(size: int, number: int, kind: str | Mapping = "unit") -> tuple[int, ...]:
    """Modes of one side of a matrix.

    Args:
        kind: "unit": two large modes with ones between them (OPDF); "balanced": nearly equal ones; or a mapping of
            sizes to modes, "unit" for the sizes it does not hold.

    Raises:
        RMTKDError: modes whose product is not the size, or of another number.
    """
    if isinstance(kind, Mapping):
        given = kind.get(size, kind.get(str(size)))  # JSON knows no integer keys
        if given is None:
            return choose_modes(size, number)
        return check_modes(size, number, given)
    if kind == "balanced":
        return balanced_modes(size, number)
    large, small = divisors_near_root(size)
    return (large,) + (1,) * (number - 2) + (small,)


def mpo_factor(modes: Modes) -> float:
    """Parameters of the tensors with full bonds over those of the matrix.

    For unit modes, with L = i_1 j_1, R = i_n j_n and d = min(L, R), it is d (L + R + (n - 2) d) / (L R).
    """
    bonds = full_bonds(modes)
    tensors = sum(bonds[k] * i * j * bonds[k + 1] for k, (i, j) in enumerate(zip(*modes, strict=True)))
    return tensors / (math.prod(modes[0]) * math.prod(modes[1]))


def full_bonds(modes: Modes) -> list[int]:
    """d_0..d_n with d_k the smaller of the products of i j before and behind the bond: nothing is lost."""
    pairs = [i * j for i, j in zip(*modes, strict=True)]
    return [min(math.prod(pairs[:k]), math.prod(pairs[k:])) for k in range(len(pairs) + 1)]


def mpo_decompose(weight: torch.Tensor, modes: Modes) -> list[torch.Tensor]:
    """Tensors T_k of shape (d_{k-1}, i_k, j_k, d_k), fp32, whose contraction is the matrix.

    W[(i_1..i_n), (j_1..j_n)] = sum over the bonds of T_1[1, i_1, j_1, a_1] T_2[a_1, i_2, j_2, a_2] ... T_n[.., i_n,
    j_n, 1].

    A sweep of SVDs in fp64 from the left, in the symmetric gauge: the square roots of the singular values of each bond
    go to both of its sides. With s those of the matrix unfolded there, L the product of the tensors before the bond
    and R of those behind, L^T L = diag(s) = R R^T. A bond next to a unit mode is not decomposed again: its tensor is
    exactly the identity. A null direction is 0 on the right only: were it 0 on both sides, neither would have a
    gradient, and it could never be trained.

    Args:
        weight: (rows, columns), rows and columns the products of the modes.
    """
    outs, ins = modes
    number = len(outs)
    interleaved = [axis for k in range(number) for axis in (k, number + k)]
    rest = weight.detach().double().reshape(*outs, *ins).permute(*interleaved).reshape(1, -1)  # (d, what is left)
    tensors, left = [], rest.new_ones(1)  # what the left side of the bond before has taken of the singular values
    for k in range(number - 1):
        bond, mode = rest.shape[0], outs[k] * ins[k]
        unfolded = rest.reshape(bond * mode, -1)
        if mode == 1 and bond <= unfolded.shape[1]:
            tensors.append(torch.eye(bond, dtype=rest.dtype, device=rest.device).reshape(bond, 1, 1, bond))
            continue
        u, s, vt = torch.linalg.svd(unfolded, full_matrices=False)
        former, left = left, _left_share(s)
        isometry = u.reshape(bond, mode, -1) / former[:, None, None]
        tensors.append((isometry * left).reshape(bond, outs[k], ins[k], -1))
        rest = s[:, None] * vt
    tensors.append((rest / left[:, None]).reshape(-1, outs[-1], ins[-1], 1))
    return [tensor.float().contiguous() for tensor in tensors]


def _left_share(singular: torch.Tensor) -> torch.Tensor:
    """What goes to the left of a bond: sqrt(s_i), at least a hundredth of the mean of those roots (1 if all are 0)."""
    root = singular.sqrt()
    least = NULL_SHARE * root.mean()
    return root.clamp_min(least if least > 0 else 1.0)


def mpo_contract(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The matrix (rows, columns) of `mpo_decompose`'s tensors, from the smaller outer side inwards: square tensors of
    the middle meet the small one first."""
    outs, ins = [t.shape[1] for t in tensors], [t.shape[2] for t in tensors]
    if outs[0] * ins[0] >= outs[-1] * ins[-1]:
        product = tensors[-1].reshape(tensors[-1].shape[0], -1)
        for tensor in reversed(tensors[:-1]):
            product = (tensor.reshape(-1, tensor.shape[-1]) @ product).reshape(tensor.shape[0], -1)
    else:
        product = tensors[0].reshape(-1, tensors[0].shape[-1])
        for tensor in tensors[1:]:
            product = (product @ tensor.reshape(tensor.shape[0], -1)).reshape(-1, tensor.shape[-1])
    number = len(tensors)
    pairs = [size for pair in zip(outs, ins, strict=True) for size in pair]
    order = [*range(0, 2 * number, 2), *range(1, 2 * number, 2)]
    return product.reshape(pairs).permute(order).reshape(math.prod(outs), math.prod(ins))


class MPOWeight(nn.Module):
    """The parametrization: tensors -> weight. Contracted in fp32 outside autocast (bf16 costs 4e-3), cast
    afterwards."""

    def __init__(self, modes: Modes, dtype: torch.dtype):
        super().__init__()
        self.modes, self.dtype = modes, dtype

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        with torch.autocast(tensors[0].device.type, enabled=False):
            return mpo_contract(tensors).to(self.dtype)

    def right_inverse(self, weight: torch.Tensor) -> list[torch.Tensor]:
        return mpo_decompose(weight, self.modes)


@register_reparameterization
class MatrixProductOperator(Reparameterization):
    """OPDF: each weight is trained as a product of `num_tensors` tensors with full bonds, and folded back afterwards.

    With "unit" modes, OPDF's own, that is a deep linear factorisation of the index-permuted weight: two outer tensors
    and `num_tensors - 2` square ones, which start as identities. The function class does not grow; what changes is the
    step: at equal learning rate Adam moves the weight 1.6 to 4 times further (n = 3 to 7), hence `lr_scale`. Training
    memory and optimizer state grow by `mpo_factor`, time by about d / (tokens per batch); the saved model is the plain
    one.

    Args:
        num_tensors: n, at least 2.
        modes: "unit", "balanced" (hardly more parameters), or {side: modes}, for example the authors' {768: [32, 1, 1,
            1, 24], 3072: [64, 1, 1, 1, 48]}, which "unit" chooses by itself.
        lr_scale: None: 1 / (n - 1). That more than undoes the larger step: a random 256 x 192 matrix moved 1.63, 2.53
            and 3.49 times as far as under the plain rate (n = 3, 5, 7), so 0.82, 0.63 and 0.58 times remain.

    Reference: Zhan et al., "Over-parameterized distillation framework" (OPDF), arXiv 2411.06448.
    """

    name = "mpo"

    def __init__(
        self,
        num_tensors: int = 3,
        modes: str | Mapping = "unit",
        target_modules: str | Sequence[str] | None = None,
        lr_scale: float | None = None,
    ):
        if isinstance(num_tensors, bool) or not isinstance(num_tensors, int) or num_tensors < 2:
            raise RMTKDError(
                f"MatrixProductOperator(num_tensors={num_tensors!r}): expected a whole number of at least 2."
            )
        if not isinstance(modes, Mapping) and modes not in ("unit", "balanced"):
            raise RMTKDError(
                f"MatrixProductOperator(modes={modes!r}): expected 'unit', 'balanced' or a mapping of sizes to modes."
            )
        if isinstance(modes, Mapping):
            for size, given in modes.items():
                check_modes(int(size), num_tensors, given)
        super().__init__(target_modules, 1 / (num_tensors - 1) if lr_scale is None else lr_scale)
        self.num_tensors, self.modes = num_tensors, modes

    def parametrization(self, weight: torch.Tensor) -> nn.Module:
        return MPOWeight(self.modes_of(weight), weight.dtype)

    def modes_of(self, weight: torch.Tensor) -> Modes:
        """Modes of a (rows, columns) weight."""
        rows, columns = (choose_modes(side, self.num_tensors, self.modes) for side in weight.shape)
        return rows, columns
