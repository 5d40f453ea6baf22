"""Step functions whose kernels are those of a given activation.

The CK of a wide network sees a hidden activation only through g1^2, g2^2 and g4^2 at its own t, and through tau^2 in
the last layer, where it is a multiple of the identity (`kernels.py`). A step function that has the first three exactly
therefore keeps the kernel up to  delta I,  delta = tau~_L^2 - tau_L^2. Parseval bounds tau2 >=
g1^2 t^2 + g2^2 t^4 / 2, and few levels cost more: `min_shift` takes, among those that match, the step function with
the smallest tau2 that is not below tau_L^2. For ReLU ten levels reach it, and then nothing is shifted.

Ways to match a layer, by name in `MATCHERS`:

    min_shift   K levels, g1, g2, g4 exact, tau2 minimal, but not below the activation's own. K = 2 is infeasible for
                ReLU, K = 3 is not.
    two_level   a(1[x < s1] + 1[x > s2]), the paper's hidden activation: g1, g2, |g4| exact, tau2 as it comes
    paper       two_level, but in the last layer the paper's least-squares fit of five steps to tau2 as well. For ReLU
                that system has no solution: its minimum drops g1, the class means. For reproduction; warns with its
                residual.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from ..errors import MatchingError, RMTKDError
from .functionals import ROOT_2_PI, Activation, Functionals, StepFunction
from .kernels import KernelCoefficients, dense_chain, kernel_coefficients
from .search import ACCEPTED, RESTARTS, SEED, optimizers, smallest_tau2, steps_and_slopes


__all__ = ["MATCHERS", "LayerMatch", "NetworkMatch", "match_layer", "match_network", "surrogate_derivative"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerMatch:
    """A step function and the activation layer it stands for.

    Attributes:
        step: centred: its mean at `found.t` is 0.
        target: functionals of the activation, at the dense network's t.
        found: functionals of the step function, at the compressed network's t.
        residual: largest difference in g1 t, g2 t^2, g4 t^2 (t of the compressed network), over the scale of the
            target; signs are free, so |g| are compared.
    """

    step: StepFunction
    target: Functionals
    found: Functionals
    residual: float


@dataclass(frozen=True)
class NetworkMatch:
    """All layers of a network, and its kernels in theory.

    Attributes:
        layers: one match a layer.
        dense, compressed: kernel coefficients of both networks.
    """

    layers: tuple[LayerMatch, ...]
    dense: KernelCoefficients
    compressed: KernelCoefficients

    @property
    def residual(self) -> float:
        """The largest of all layers."""
        return max(layer.residual for layer in self.layers)

    @property
    def delta_ck(self) -> float:
        """What the compressed CK has more on its diagonal: an implicit ridge."""
        return self.compressed.tau2 - self.dense.tau2


Matcher = Callable[[Functionals, float, int, bool], StepFunction]
MATCHERS: dict[str, Matcher] = {}  # name -> function(target, t, levels, is_last) -> step function, any mean


def matcher(name: str) -> Callable[[Matcher], Matcher]:
    """Decorator: make a way to match a layer known by name."""

    def register(function: Matcher) -> Matcher:
        MATCHERS[name] = function
        return function

    return register


def match_layer(
    activation: Activation, dense_t: float, t: float, mode: str = "min_shift", levels: int = 3, last: bool = False
) -> LayerMatch:
    """The step function that replaces one layer's activation. Deterministic; repeated calls are answered from memory.

    Args:
        dense_t: standard deviation of the pre-activations in the dense network.
        t: the same in the compressed network, whose hidden activations have a larger tau.
        mode: a name in `MATCHERS`.
        levels: K, used by min_shift alone.
        last: whether it is the last layer, which `paper` treats differently.

    Raises:
        MatchingError: nothing found with a residual of at most 1e-6; the message holds the numbers. Not in mode
            "paper", which warns.
        RMTKDError: unknown mode.
    """
    if mode not in MATCHERS:
        raise RMTKDError(f"Unknown matching mode {mode!r}; expected one of {', '.join(sorted(MATCHERS))}.")
    return _match_layer(activation, float(dense_t), float(t), mode, levels, last)


@lru_cache(maxsize=256)
def _match_layer(activation: Activation, dense_t: float, t: float, mode: str, levels: int, last: bool) -> LayerMatch:
    target = activation.functionals(dense_t)
    step = MATCHERS[mode](target, t, levels, last)
    step = step.shifted(-step.functionals(t).mean)
    found = step.functionals(t)
    residual = _residual(target, found)
    if not residual <= ACCEPTED:
        text = (
            f"{mode} match of {activation.name!r} at t={t:.4g} (dense {dense_t:.4g}): largest residual "
            f"{residual:.3g}, at most {ACCEPTED:g} expected; |g1|, |g2|, |g4| wanted {_numbers(target)}, found "
            f"{_numbers(found)}"
        )
        if mode != "paper":
            raise MatchingError(text + ". Use mode='min_shift' with more levels, or mode='weights_only'.")
        logger.warning("%s. Its kernel is not the dense network's; use min_shift.", text)
    return LayerMatch(step, target, found, residual)


def match_network(
    activation: Activation, depth: int, tau0: float = 1.0, mode: str = "min_shift", levels: int = 3
) -> NetworkMatch:
    """Match `depth` layers one after the other, each at the tau that the compressed layer before it has in theory.

    Raises:
        MatchingError, RMTKDError: see `match_layer`.
    """
    dense = dense_chain(activation, depth, tau0)
    layers: list[LayerMatch] = []
    t = tau0
    for number, target in enumerate(dense, start=1):
        layers.append(match_layer(activation, target.t, t, mode, levels, number == depth))
        t = math.sqrt(layers[-1].found.tau2)
    found = [layer.found for layer in layers]
    return NetworkMatch(tuple(layers), kernel_coefficients(dense, tau0), kernel_coefficients(found, tau0))


def surrogate_derivative(match: LayerMatch) -> StepFunction:
    """The derivative to use for a matched step in the backward pass, so that the NTK matches, too.

    The step's own is 0 almost everywhere. h(x) = g1 - A/2 + A 1[x > 0] with A = g2 t sqrt(2 pi) has E h = g1 and E h'
    = g2; for a matched ReLU it is ReLU's own where both t agree.
    """
    f = match.found
    jump = f.g2 * f.t * ROOT_2_PI
    return StepFunction((0.0,), (f.g1 - jump / 2, f.g1 + jump / 2))


def _residual(target: Functionals, found: Functionals) -> float:
    t = found.t
    unit = _unit(target, t)
    pairs = (
        (target.g1, found.g1, t / unit),
        (target.g2, found.g2, t**2 / unit),
        (target.g4, found.g4, (t / unit) ** 2),
    )
    return max(abs(abs(wanted) - abs(got)) * scale for wanted, got, scale in pairs)


def _unit(target: Functionals, t: float) -> float:
    """Square root of Parseval's bound on tau2: the natural unit of the levels."""
    return math.sqrt(max(target.g1**2 * t**2 + target.g2**2 * t**4 / 2, 1e-300))


def _numbers(f: Functionals) -> str:
    return f"{abs(f.g1):.6g}, {abs(f.g2):.6g}, {abs(f.g4):.6g}"


# -- min_shift --------------------------------------------------------------------------------------------------------


@matcher("min_shift")
def _min_shift(target: Functionals, t: float, levels: int, last: bool) -> StepFunction:
    """In units where t = 1 and Parseval's bound on tau2 is 1."""
    if levels < 2:
        raise RMTKDError(f"levels={levels}: a step function has at least 2.")
    import numpy as np

    unit = _unit(target, t)
    goal = np.array([target.g1 * t / unit, target.g2 * t**2 / unit, target.g4 * t**2 / unit**2])
    found = smallest_tau2(goal, target.tau2 / unit**2, levels)
    if found is None:
        raise MatchingError(
            f"No step function of {levels} levels that are all of use was found at t={t:.4g}: try other levels, or "
            "weights_only."
        )
    z, jumps = found
    return StepFunction((z * t).tolist(), (np.cumsum([0.0, *jumps]) * unit).tolist())


# -- the paper's activations ------------------------------------------------------------------------------------------


@matcher("two_level")
def _two_level(target: Functionals, t: float, levels: int, last: bool) -> StepFunction:
    """a(1[x < s1] + 1[x > s2]) with g1, g2 and g4 up to its sign.

    With D1 = phi(z2) - phi(z1), D2 = z2 phi(z2) - z1 phi(z1) and P the probability of being outside, g1 t = a D1, g2
    t^2 = a D2 and g4 t^2 = a^2 (1 - 2 P) D2 / 2. That leaves two equations for the thresholds; of their solutions, the
    one with positive g4 and the smallest tau2 is taken.
    """
    if abs(target.g1) * t < 1e-9 or abs(target.g2) * t * t < 1e-9:
        raise MatchingError(
            f"two_level needs g1 and g2 that are not 0, got {target.g1:.3g} and {target.g2:.3g} (an odd or even "
            "activation): use mode='min_shift'."
        )
    solutions = _two_level_solutions(target.g2 * t / target.g1, 2 * target.g4 / (target.g1 * target.g2 * t))
    steps = []
    for low, high in solutions:
        a = target.g1 * t / (_phi(high) - _phi(low))
        steps.append(StepFunction((low * t, high * t), (a, 0.0, a)))
    if not steps:
        raise MatchingError(
            f"two_level has no solution for g1, g2, g4 = {_numbers(target)} at t={t:.4g}: use mode='min_shift'."
        )
    return min(steps, key=lambda step: (step.functionals(t).g4 * target.g4 < 0, step.functionals(t).tau2))


def _phi(z: float) -> float:
    return math.exp(-z * z / 2) / ROOT_2_PI


def _two_level_solutions(ratio: float, tilt: float) -> list[tuple[float, float]]:
    """(z1, z2) with D2 = ratio D1 and 1 - 2 P = +-tilt D1, from a grid of starts."""
    import numpy as np

    optimize, found = optimizers(), {}

    def equations(u, sign):
        low, high = u[0], u[0] + math.exp(min(u[1], 4.0))
        d1, d2 = _phi(high) - _phi(low), high * _phi(high) - low * _phi(low)
        inside = 0.5 * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))
        return [d2 - ratio * d1, (2 * inside - 1) - sign * tilt * d1]

    for sign in (1.0, -1.0):
        for start in np.linspace(-4, 4, 17):
            for width in np.linspace(-2, 2, 7):
                solution = optimize.root(equations, [start, width], args=(sign,), method="hybr", tol=1e-13)
                low, high = float(solution.x[0]), float(solution.x[0] + math.exp(min(solution.x[1], 4.0)))
                exact = max(map(abs, equations(solution.x, sign))) < 1e-10
                if exact and high - low > 1e-3 and abs(_phi(high) - _phi(low)) > 1e-4:
                    found[round(low, 6), round(high, 6)] = (low, high)
    return [found[key] for key in sorted(found)]


@matcher("paper")
def _paper(target: Functionals, t: float, levels: int, last: bool) -> StepFunction:
    """two_level, but in the last layer the least-squares fit of b(1[x < r1] + 1[r2 < x < r3] + 1[x > r4]), r4 = r3 +
    r2 - r1, to g1^2, g2^2, 2 g4 and tau2, with b^2 = (2 g4 / g2)^2 + 4 tau2."""
    if not last:
        return _two_level(target, t, levels, last)
    if abs(target.g2) * t * t < 1e-9:
        raise MatchingError(f"mode='paper' divides by g2={target.g2:.3g}: use mode='min_shift' for an odd activation.")
    import numpy as np

    optimize, random = optimizers(), np.random.default_rng(SEED)
    b = math.sqrt((2 * target.g4 / target.g2) ** 2 + 4 * target.tau2)

    def thresholds(u):
        gap, inner = math.exp(min(u[1], 3.0)), math.exp(min(u[2], 3.0))
        return np.array([u[0], u[0] + gap, u[0] + gap + inner, u[0] + 2 * gap + inner])

    def residuals(u):
        tau2, g1, g2, g4 = steps_and_slopes(thresholds(u), np.array([-b, b, -b, b]))[0] / [1, t, t**2, t**2]
        return np.array(
            [tau2 - target.tau2, g1**2 - target.g1**2, g2**2 - target.g2**2, 2 * (g4 - target.g4)],
        )

    fits = [optimize.least_squares(residuals, random.normal(size=3), max_nfev=100) for _ in range(3 * RESTARTS)]
    best = min(fits, key=lambda fit: fit.cost).x
    return StepFunction((thresholds(best) * t).tolist(), (b, 0.0, b, 0.0, b))
