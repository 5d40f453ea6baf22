"""Conjugate kernel (CK) and neural tangent kernel (NTK) of wide random fully-connected networks.

Setting: h_0 = x, h_l = sigma_l^c(W_l h_{l-1}) / sqrt(d_l), entries of W_l independent with mean 0 and variance 1.
With K_0 = X X^T (rows are samples) and (u, v) ~ N(0, K_{l-1} restricted to i, j):

    CK    K_l(i, j) = E[sigma_l^c(u) sigma_l^c(v)]
    NTK   T_0 = K_0,  T_l = K_l + T_{l-1} o Kdot_l        (Kdot_l: the same with sigma')

For a Gaussian mixture in high dimension both are, up to a vanishing error in spectral norm, the matrices of
`equivalent`, which see the activations only through their functionals (`functionals.py`).
Source: arXiv 2403.00258, sections 2 and 3; recursions as in the authors' code.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import RMTKDError
from .functionals import LEAKY_SLOPE, Activation, Functionals, StepFunction, nodes


__all__ = [
    "GaussianMixture",
    "KernelCoefficients",
    "RandomLayer",
    "dense_chain",
    "equivalent",
    "exact_kernels",
    "kernel_coefficients",
    "without_shift",
]

logger = logging.getLogger(__name__)

SERIES = 40  # Hermite terms; correlations of distinct samples are small, their powers soon vanish
CUT_OFF = 1e-6  # what the terms left out may hold, relative to the kernel's diagonal, before a warning says so


@dataclass(frozen=True)
class KernelCoefficients:
    """Coefficients of the equivalents after the last layer.

    Attributes:
        a1, a2, a3, a4, tau2: of the CK (a4 is only needed by the next layer).
        b1, b2, b3, kappa2: of the NTK; kappa2 is infinite if an activation jumps.
    """

    a1: float
    a2: float
    a3: float
    a4: float
    tau2: float
    b1: float
    b2: float
    b3: float
    kappa2: float


def kernel_coefficients(layers: Sequence[Functionals], tau0: float = 1.0) -> KernelCoefficients:
    """Run the recursions over all layers.

    a1' = g1^2 a1,  a2' = g1^2 a2 + g2^2 a4^2 / 4,  a3' = g1^2 a3 + g2^2 a1^2 / 2,  a4' = g4 a4,
    b1' = a1' + b1 g1^2,  b2' = a2' + b2 g1^2,  b3' = a3' + b3 g1^2 + b1 g2^2 a1,  kappa'^2 = tau'^2 + kappa^2
    taudot^2.

    Args:
        layers: functionals of each layer at its own t.
        tau0: root mean squared norm of the inputs.
    """
    a1, a2, a3, a4, tau2 = 1.0, 0.0, 0.0, 1.0, tau0**2
    b1, b2, b3, kappa2 = 1.0, 0.0, 0.0, tau0**2
    for f in layers:
        slope, curve = f.g1**2, f.g2**2
        new = (slope * a1, slope * a2 + curve * a4**2 / 4, slope * a3 + curve * a1**2 / 2, f.g4 * a4)
        b1, b2, b3 = new[0] + b1 * slope, new[1] + b2 * slope, new[2] + b3 * slope + b1 * curve * a1
        a1, a2, a3, a4 = new
        tau2, kappa2 = f.tau2, f.tau2 + kappa2 * f.taudot2
    return KernelCoefficients(a1, a2, a3, a4, tau2, b1, b2, b3, kappa2)


def dense_chain(activation: Activation, depth: int, tau0: float = 1.0) -> list[Functionals]:
    """Functionals of `depth` layers of one activation: t of a layer is tau of the one before."""
    layers, t = [], tau0
    for _ in range(depth):
        layers.append(activation.functionals(t))
        t = math.sqrt(layers[-1].tau2)
    return layers


@dataclass(frozen=True)
class GaussianMixture:
    """Classes x = (mu_a + C_a^{1/2} z) / sqrt(p).

    Attributes:
        means: (classes, p) fp64.
        covariances: (classes, p, p) fp64.
    """

    means: torch.Tensor
    covariances: torch.Tensor

    def sample(self, counts: Sequence[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """(samples (n, p) fp64, labels (n,) int64), class after class."""
        p = self.means.shape[1]
        generator = torch.Generator().manual_seed(seed)
        rows = [
            mean + torch.randn(n, p, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(c).T
            for mean, c, n in zip(self.means, self.covariances, counts, strict=True)
        ]
        return torch.cat(rows) / math.sqrt(p), torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def equivalent(
    x: torch.Tensor,
    labels: torch.Tensor,
    mixture: GaussianMixture,
    coefficients: KernelCoefficients,
    tau0: float,
    kind: str = "ck",
) -> torch.Tensor:
    """The deterministic equivalent of a kernel on data of a Gaussian mixture.

    K ~ c1 X X^T + V A V^T + (diag - c1 tau0^2) I with V = [J / sqrt p, psi], J the one-hot labels,
    psi_i = ||x_i||^2 - tr C_a / p, A = [[c2 t t^T + c3 S, c2 t], [c2 t^T, c2]], t_a = sqrt p (tr C_a / p - tau0^2),
    S_ab = tr(C_a C_b) / p. The paper's psi takes the class mean out of x_i first, which differs by O(1 / p) and
    fits worse at p = 256. The authors' code takes another c3 tau0^4 off the identity,
    which the diagonal does not have (V A V^T adds O(1 / p) to it): an error of that size, however large p.

    Args:
        x: (n, p) fp64.
        labels: (n,) int64.
        kind: "ck" (c = a, diag = tau^2) or "ntk" (c = b, diag = kappa^2).

    Returns:
        (n, n) fp64
    """
    c = coefficients
    c1, c2, c3, diagonal = (c.a1, c.a2, c.a3, c.tau2) if kind == "ck" else (c.b1, c.b2, c.b3, c.kappa2)
    n, p = x.shape
    covariances = mixture.covariances
    trace = covariances.diagonal(dim1=1, dim2=2).sum(1) / p  # shape: (classes,)
    one_hot = torch.nn.functional.one_hot(labels, len(covariances)).to(x)
    psi = x.square().sum(1) - trace[labels]
    v = torch.cat((one_hot / math.sqrt(p), psi[:, None]), dim=1)
    t = math.sqrt(p) * (trace - tau0**2)
    overlaps = torch.einsum("aij,bji->ab", covariances, covariances) / p
    corner = c2 * torch.outer(t, t) + c3 * overlaps
    middle = torch.cat((torch.cat((corner, c2 * t[:, None]), 1), torch.cat((c2 * t, t.new_tensor([c2])))[None]), 0)
    shift = diagonal - c1 * tau0**2
    return c1 * x @ x.T + v @ middle @ v.T + shift * torch.eye(n, dtype=x.dtype)


@dataclass(frozen=True)
class RandomLayer:
    """One layer of an infinitely wide network.

    Attributes:
        activation: an `Activation` or a `StepFunction`.
        mean: what is subtracted from it.
        surrogate: derivative used by the NTK in place of the activation's own; needed for steps, whose own is zero.
    """

    activation: Activation | StepFunction
    mean: float = 0.0
    surrogate: StepFunction | None = None


def exact_kernels(x: torch.Tensor, layers: Sequence[RandomLayer]) -> tuple[torch.Tensor, torch.Tensor]:
    """(CK, NTK) of the infinitely wide network on these very samples, without Monte-Carlo noise.

    ReLU and leaky ReLU by their closed form (Cho & Saul 2009); every other activation by its Hermite series over the
    correlation of two samples (Mehler), 40 terms, coefficients at each sample's own norm; diagonals are exact. Samples
    that are almost the same need more terms: a warning says how much may be missing.

    Args:
        x: (n, p) fp64, the inputs as the first layer sees them.

    Returns:
        two (n, n) fp64 matrices. The NTK is all NaN if a jumping activation has no surrogate.
    """
    ck = x.double() @ x.double().T
    ntk = ck.clone()
    for layer in layers:
        new, slope = _layer_kernels(ck, layer)
        ck, ntk = new, new + ntk * slope
    return ck, ntk


def _layer_kernels(kernel: torch.Tensor, layer: RandomLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """(kernel of sigma - mean, kernel of its derivative) for pre-activations of covariance `kernel`, (n, n) each."""
    norm = kernel.diagonal().sqrt()
    if bool((norm <= 0).any()):
        raise RMTKDError("A sample of norm 0 has no direction: expected centred inputs none of which is zero.")
    rho = (kernel / torch.outer(norm, norm)).clamp(-1, 1)
    slope = _slope_kernel(norm, rho, layer)
    known = _PIECEWISE_LINEAR.get(layer.activation.name)
    if known is not None:
        return _piecewise_linear(norm, rho, known, layer.mean), slope
    coefficients, square = _hermite(layer.activation, norm)
    coefficients[0] -= layer.mean
    value = _mehler(coefficients, rho, square - (coefficients[0] + layer.mean).square() + coefficients[0].square())
    value.fill_diagonal_(0)
    # E (sigma - m)^2 = E sigma^2 - 2 m E sigma + m^2
    diagonal = square - 2 * layer.mean * (coefficients[0] + layer.mean) + layer.mean**2
    return value + torch.diag(diagonal), slope


_PIECEWISE_LINEAR = {"relu": 0.0, "leaky_relu": LEAKY_SLOPE, "linear": 1.0}


def _piecewise_linear(norm: torch.Tensor, rho: torch.Tensor, slope: float, mean: float) -> torch.Tensor:
    # sigma = b x + c |x|;  E|u||v| = 2/pi (sqrt(1 - r^2) + r asin r) |u||v|
    b, c = (1 + slope) / 2, (1 - slope) / 2
    scale = torch.outer(norm, norm)
    both = 2 / math.pi * ((1 - rho.square()).clamp_min(0).sqrt() + rho * torch.asin(rho))
    means = c * math.sqrt(2 / math.pi) * norm
    return scale * (b * b * rho + c * c * both) - mean * (means[:, None] + means[None, :]) + mean**2


def _slope_kernel(norm: torch.Tensor, rho: torch.Tensor, layer: RandomLayer) -> torch.Tensor:
    if layer.surrogate is not None:
        coefficients, square = _hermite(layer.surrogate, norm)
        kernel = _mehler(coefficients, rho, square)
        kernel.fill_diagonal_(0)
        return kernel + torch.diag(square)
    activation = layer.activation
    if isinstance(activation, StepFunction) or activation.jumps:
        return torch.full_like(rho, math.nan)
    known = _PIECEWISE_LINEAR.get(activation.name)
    if known is not None:
        b, c = (1 + known) / 2, (1 - known) / 2
        return b * b + c * c * 2 / math.pi * torch.asin(rho)
    coefficients, _ = _hermite(activation, norm)
    order = torch.arange(1, len(coefficients), dtype=rho.dtype)
    square = _square_of_slope(activation, norm)
    kernel = _mehler(coefficients[1:] * order.sqrt()[:, None] / norm, rho, square)
    kernel.fill_diagonal_(0)
    return kernel + torch.diag(square)


def _square_of_slope(activation: Activation, norm: torch.Tensor) -> torch.Tensor:
    return torch.tensor([activation.functionals(t).taudot2 for t in norm.tolist()], dtype=norm.dtype)


def _polynomials(z: torch.Tensor, terms: int) -> torch.Tensor:
    """Normalised Hermite polynomials He_m(z) / sqrt(m!): (terms, *z.shape)."""
    values = [torch.ones_like(z), z]
    for m in range(2, terms):
        values.append((z * values[-1] - math.sqrt(m - 1) * values[-2]) / math.sqrt(m))
    return torch.stack(values[:terms])


def _hermite(activation: Activation | StepFunction, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Hermite coefficients of xi -> sigma(norm_i xi), (terms, n); E sigma(norm_i xi)^2, (n,))."""
    if isinstance(activation, StepFunction):
        return _hermite_of_steps(activation, norm)
    if activation.knots not in ((), (0.0,)):
        columns = [_hermite_by_quadrature(activation, norm[i : i + 1]) for i in range(len(norm))]
        return torch.cat([c for c, _ in columns], 1), torch.cat([s for _, s in columns])
    return _hermite_by_quadrature(activation, norm)


def _hermite_by_quadrature(activation: Activation, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z, w = nodes(tuple(k / float(norm[0]) for k in activation.knots))
    values = activation(norm[:, None] * z)  # shape: (n, nodes)
    return (_polynomials(z, SERIES) * w) @ values.T, values.square() @ w


def _hermite_of_steps(step: StepFunction, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # c_m = sum_k J_k phi(z_k) He_{m-1}(z_k) / sqrt(m!)
    levels = torch.tensor(step.levels, dtype=norm.dtype)
    z = torch.tensor(step.thresholds, dtype=norm.dtype)[:, None] / norm  # shape: (K - 1, n)
    jumps = levels.diff()[:, None]
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    higher = (jumps * density * _polynomials(z, SERIES - 1)).sum(1)  # shape: (terms - 1, n)
    order = torch.arange(1, SERIES, dtype=norm.dtype)
    first = levels[0] + (jumps * torch.special.ndtr(-z)).sum(0)
    below = torch.cat((torch.zeros_like(z[:1]), torch.special.ndtr(z), torch.ones_like(z[:1])))
    square = (levels.square()[:, None] * below.diff(dim=0)).sum(0)
    return torch.cat((first[None], higher / order.sqrt()[:, None])), square


def _mehler(coefficients: torch.Tensor, rho: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """sum_m c_m(i) c_m(j) rho_ij^m: (n, n), valid off the diagonal. `square` (n,) is what all c_m(i)^2 add up to."""
    power = torch.ones_like(rho)
    total = torch.outer(coefficients[0], coefficients[0])
    apart = rho - torch.diag(rho.diagonal())
    closest = float(apart.abs().max())
    missing = closest ** len(coefficients) * float((1 - coefficients.square().sum(0) / square).max())
    if missing > CUT_OFF:
        logger.warning(
            "Two samples have a correlation of %.4f: the %d terms of the series may leave out %.1e of the kernel "
            "there.",
            closest,
            len(coefficients),
            missing,
        )
    for c in coefficients[1:]:
        power = power * apart
        total = total + torch.outer(c, c) * power
        if float(power.abs().max()) < 1e-16:
            break
    return total


def without_shift(kernel: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`kernel` less the multiple of the identity by which its mean diagonal differs from that of `reference`: (n,
    n)."""
    delta = (kernel.diagonal() - reference.diagonal()).mean()
    return kernel - delta * torch.eye(len(kernel), dtype=kernel.dtype)
