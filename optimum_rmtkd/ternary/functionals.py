"""Gaussian functionals of an activation: the few numbers through which it enters the kernels of a wide random network.

Notation, for xi ~ N(0, 1), t > 0 the standard deviation of a pre-activation, and sigma^c = sigma - E sigma(t xi):

    mean     E sigma(t xi)
    tau2     E sigma^c(t xi)^2
    g1       E sigma'(t xi)               = E[xi sigma(t xi)] / t
    g2       E sigma''(t xi)              = E[(xi^2 - 1) sigma(t xi)] / t^2
    g4       E ((sigma^c)^2)''(t xi) / 2  = E[(xi^2 - 1) sigma^c(t xi)^2] / (2 t^2)
    taudot2  E sigma'(t xi)^2

The right-hand sides (Stein) need no derivative, so they hold for steps as well. With s = t^2 they obey g2 = 2 d mean /
d s and g4 = d E[sigma^2] / d s - mean g2, which gives the closed forms below.
Source of the set: Gu et al., "Lossless compression of deep neural networks: a high-dimensional neural tangent kernel
approach" (NeurIPS 2022, arXiv 2403.00258), and its code; the closed forms were derived here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..errors import RMTKDError


__all__ = [
    "Activation",
    "Functionals",
    "StepFunction",
    "activation_names",
    "get_activation",
    "quadrature",
    "register_activation",
    "step_functionals",
]

ROOT_2_PI = math.sqrt(2 * math.pi)
REACH = 12.0  # standard deviations covered by the quadrature: the Gaussian tail beyond is 1e-32
NODES, PANEL = 24, 0.5  # Gauss-Legendre nodes in each panel of at most half a standard deviation


@dataclass(frozen=True)
class Functionals:
    """The six numbers of one activation at one t; see the module's text. All are plain floats.

    `taudot2` is infinite where the activation jumps.
    """

    t: float
    mean: float
    tau2: float
    g1: float
    g2: float
    g4: float
    taudot2: float


@dataclass(frozen=True)
class StepFunction:
    """Piecewise constant: `levels[k]` between `thresholds[k - 1]` (excluded) and `thresholds[k]` (included).

    Args:
        thresholds: ascending, K - 1 of them.
        levels: K numbers.

    Raises:
        RMTKDError: other counts, or thresholds that do not ascend.
    """

    thresholds: tuple[float, ...]
    levels: tuple[float, ...]

    def __post_init__(self):
        object.__setattr__(self, "thresholds", tuple(float(s) for s in self.thresholds))
        object.__setattr__(self, "levels", tuple(float(v) for v in self.levels))
        ascending = all(a < b for a, b in zip(self.thresholds, self.thresholds[1:]))
        if len(self.levels) != len(self.thresholds) + 1 or not self.thresholds or not ascending:
            raise RMTKDError(
                f"A step function with thresholds {self.thresholds} and levels {self.levels}: expected ascending "
                "thresholds and one level more."
            )

    name = "step"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Applied to each element; same shape and dtype."""
        at = torch.bucketize(x, torch.tensor(self.thresholds, dtype=x.dtype, device=x.device))
        return torch.tensor(self.levels, dtype=x.dtype, device=x.device)[at]

    def functionals(self, t: float) -> Functionals:
        """Its functionals at pre-activation standard deviation t, in closed form."""
        z = torch.tensor(self.thresholds, dtype=torch.float64) / t
        mean, tau2, g1, g2, g4 = step_functionals(z, torch.tensor(self.levels, dtype=torch.float64)).tolist()
        return Functionals(t, mean, tau2, g1 / t, g2 / t**2, g4 / t**2, math.inf)

    def shifted(self, amount: float) -> StepFunction:
        """The same steps with `amount` added to every level."""
        return StepFunction(self.thresholds, tuple(v + amount for v in self.levels))


def step_functionals(z: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """mean, tau2, g1, g2, g4 of a step function at t = 1; differentiable.

    With jumps J_k = v_{k+1} - v_k and S_k = (v_{k+1} - m)^2 - (v_k - m)^2 at the thresholds z_k, phi the normal
    density: g1 = sum J phi(z), g2 = sum J z phi(z), g4 = sum S z phi(z) / 2.

    Args:
        z: (K - 1,) fp64, thresholds in units of t.
        levels: (K,) fp64.

    Returns:
        (5,) fp64
    """
    edge = z.new_zeros(1)
    below = torch.cat((edge, torch.special.ndtr(z), edge + 1))
    weight = below.diff()
    mean = (levels * weight).sum()
    centred = levels - mean
    density = torch.exp(-z.square() / 2) / ROOT_2_PI
    jumps, squares = centred.diff(), centred.square().diff()
    return torch.stack(
        (
            mean,
            (centred.square() * weight).sum(),
            (jumps * density).sum(),
            (jumps * z * density).sum(),
            0.5 * (squares * z * density).sum(),
        )
    )


@lru_cache(maxsize=64)
def nodes(knots: tuple[float, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Points z and weights w, fp64, with sum w f(z) = E f(xi): Gauss-Legendre in panels that end at the knots (units
    of t)."""
    import numpy as np

    inside = sorted(k for k in knots if -REACH < k < REACH)
    ends = [-REACH, *inside, REACH]
    edges = [ends[0]]
    for low, high in zip(ends, ends[1:]):
        pieces = max(1, math.ceil((high - low) / PANEL))
        edges += [low + (high - low) * i / pieces for i in range(1, pieces + 1)]
    points, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(NODES))
    edge = torch.tensor(edges, dtype=torch.float64)
    half, middle = edge.diff() / 2, (edge[1:] + edge[:-1]) / 2
    z = (middle[:, None] + half[:, None] * points).reshape(-1)
    w = (half[:, None] * weights).reshape(-1) * torch.exp(-z.square() / 2) / ROOT_2_PI
    return z, w


def _narrow_panels(t: float) -> tuple[float, ...]:
    """Panel ends (units of t) around 0 for a large t: an activation bends where its input is of order 1, which is then
    narrow."""
    if t * PANEL <= 4:
        return ()
    ends = [2.0**k / t for k in range(-1, math.ceil(math.log2(t)))]
    return (0.0, *ends, *(-end for end in ends))


def quadrature(function: Callable[[torch.Tensor], torch.Tensor], t: float, knots: Sequence[float] = ()) -> Functionals:
    """Functionals of any element-wise function by piecewise Gauss-Legendre quadrature.

    Args:
        function: fp64 tensor -> tensor of the same shape; differentiable by autograd between its knots.
        t: standard deviation of the pre-activation, > 0.
        knots: places where the function or its derivative jumps. Those left out cost accuracy.

    Raises:
        RMTKDError: values that are not finite.
    """
    z, w = nodes((*(k / t for k in knots), *_narrow_panels(t)))
    x = (z * t).requires_grad_()
    y = function(x)
    slope = torch.autograd.grad(y.sum(), x)[0] if y.requires_grad else torch.zeros_like(x)
    y = y.detach()
    if not bool(torch.isfinite(y).all()):
        raise RMTKDError(
            f"The activation is not finite on [-{REACH * t:g}, {REACH * t:g}]: it has no Gaussian functionals."
        )
    mean = float((w * y).sum())
    centred = y - mean
    return Functionals(
        t,
        mean,
        tau2=float((w * centred.square()).sum()),
        g1=float((w * z * centred).sum()) / t,
        g2=float((w * (z.square() - 1) * centred).sum()) / t**2,
        g4=float((w * (z.square() - 1) * centred.square()).sum()) / (2 * t**2),
        taudot2=float((w * slope.square()).sum()),
    )


@dataclass(frozen=True)
class Activation:
    """An element-wise activation and what is known of it in closed form.

    Attributes:
        name: as transformers calls it.
        function: tensor -> tensor.
        knots: where it or its derivative jumps.
        closed: t -> Functionals; None: by quadrature.
        jumps: whether it is discontinuous: its derivative then has no second moment.
    """

    name: str
    function: Callable[[torch.Tensor], torch.Tensor]
    knots: tuple[float, ...] = ()
    closed: Callable[[float], Functionals] | None = None
    jumps: bool = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)

    def functionals(self, t: float) -> Functionals:
        """Its functionals at pre-activation standard deviation t: closed form where there is one, else quadrature.

        Raises:
            RMTKDError: t is not a positive number.
        """
        if not (t > 0 and math.isfinite(t)):
            raise RMTKDError(
                f"Functionals at t={t}: expected a positive standard deviation. The layer before is constant."
            )
        if self.closed is not None:
            return self.closed(t)
        found = quadrature(self.function, t, self.knots)
        return dataclasses.replace(found, taudot2=math.inf) if self.jumps else found


def _leaky(slope: float) -> Callable[[float], Functionals]:
    # sigma(x) = b x + c |x|
    b, c = (1 + slope) / 2, (1 - slope) / 2

    def closed(t: float) -> Functionals:
        mean = c * t * math.sqrt(2 / math.pi)
        spread = b * b + c * c * (1 - 2 / math.pi)
        return Functionals(t, mean, t * t * spread, b, c * math.sqrt(2 / math.pi) / t, spread, (1 + slope**2) / 2)

    return closed


def _erf(t: float) -> Functionals:
    s = t * t
    return Functionals(
        t,
        mean=0.0,
        tau2=2 / math.pi * math.asin(2 * s / (1 + 2 * s)),
        g1=2 / math.sqrt(math.pi * (1 + 2 * s)),
        g2=0.0,
        g4=4 / (math.pi * (1 + 2 * s) * math.sqrt(1 + 4 * s)),
        taudot2=4 / (math.pi * math.sqrt(1 + 4 * s)),
    )


def _cos(t: float) -> Functionals:
    s = t * t
    once, twice = math.exp(-s), math.exp(-2 * s)
    return Functionals(
        t,
        mean=math.exp(-s / 2),
        tau2=(1 + twice) / 2 - once,
        g1=0.0,
        g2=-math.exp(-s / 2),
        g4=once - twice,
        taudot2=(1 - twice) / 2,
    )


def _sign(t: float) -> Functionals:
    return Functionals(t, 0.0, 1.0, math.sqrt(2 / math.pi) / t, 0.0, 0.0, math.inf)


_REGISTRY: dict[str, Activation] = {}


def register_activation(activation: Activation) -> Activation:
    """Make an activation known by its name; a later one of the same name replaces it.

    Models are rebuilt from names, so for `TernaryMLP` the name must be one that `transformers.activations.ACT2FN` has,
    too.
    """
    _REGISTRY[activation.name] = activation
    return activation


LEAKY_SLOPE = 0.01  # of torch's and transformers' leaky_relu
for _activation in (
    Activation("relu", torch.relu, (0.0,), _leaky(0.0)),
    Activation("leaky_relu", lambda x: torch.nn.functional.leaky_relu(x, LEAKY_SLOPE), (0.0,), _leaky(LEAKY_SLOPE)),
    Activation("linear", lambda x: 1.0 * x, (), _leaky(1.0)),
    Activation("erf", torch.erf, (), _erf),
    Activation("cos", torch.cos, (), _cos),
    Activation("sign", torch.sign, (0.0,), _sign, jumps=True),
    Activation("tanh", torch.tanh),
    Activation("sigmoid", torch.sigmoid),
    Activation("gelu", torch.nn.functional.gelu),
    Activation("gelu_new", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    Activation("silu", torch.nn.functional.silu),
    Activation("relu6", torch.nn.functional.relu6, (0.0, 6.0)),
):
    register_activation(_activation)


def activation_names() -> tuple[str, ...]:
    """Names of all registered activations, sorted."""
    return tuple(sorted(_REGISTRY))


def get_activation(name: str) -> Activation:
    """The activation registered under `name`.

    Raises:
        RMTKDError: unknown; the message lists the known names.
    """
    if name not in _REGISTRY:
        raise RMTKDError(
            f"Unknown activation {name!r}; expected one of {', '.join(activation_names())}, or one made known with "
            "optimum_rmtkd.ternary.register_activation."
        )
    return _REGISTRY[name]
