"""Step functions whose kernels are those of a given activation.

The CK of a wide network sees a hidden activation only through g1^2, g2^2 and g4^2 at its own t, and through tau^2 in the last
layer, where it is a multiple of the identity (`kernels.py`). A step function that has the first three exactly therefore
keeps the kernel up to  delta I,  delta = tau~_L^2 - tau_L^2. Parseval bounds tau2 >= g1^2 t^2 + g2^2 t^4 / 2, and few levels cost
more: `min_shift` takes, among those that match, the step function with the smallest tau2 that is not below tau_L^2. For ReLU ten
levels reach it, and then nothing is shifted.

Ways to match a layer, by name in `MATCHERS`:

    min_shift   K levels, g1, g2, g4 exact, tau2 minimal, but not below the activation's own. K = 2 is infeasible for ReLU, K = 3 is not.
    two_level   a(1[x < s1] + 1[x > s2]), the paper's hidden activation: g1, g2, |g4| exact, tau2 as it comes
    paper       two_level, but in the last layer the paper's least-squares fit of five steps to tau2 as well. For ReLU that system has
                no solution: its minimum drops g1, the class means. For reproduction; warns with its residual.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import MatchingError, RMTKDError
from .functionals import ROOT_2_PI, Activation, Functionals, StepFunction
from .kernels import KernelCoefficients, dense_chain, kernel_coefficients


__all__ = ["MATCHERS", "LayerMatch", "NetworkMatch", "match_layer", "match_network", "surrogate_derivative"]

logger = logging.getLogger(__name__)

ACCEPTED = 1e-6  # largest scaled residual of g1, g2, g4
RESTARTS = 12
SEED = 0


@dataclass(frozen=True)
class LayerMatch:
    """A step function and the activation layer it stands for.

    Attributes:
        step: centred: its mean at `found.t` is 0.
        target: functionals of the activation, at the dense network's t.
        found: functionals of the step function, at the compressed network's t.
        residual: largest difference in g1 t, g2 t^2, g4 t^2 (t of the compressed network), over the scale of the target;
            signs are free, so |g| are compared.
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
        MatchingError: nothing found with a residual of at most 1e-6; the message holds the numbers. Not in mode "paper", which
            warns.
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
            f"{mode} match of {activation.name!r} at t={t:.4g} (dense {dense_t:.4g}): largest residual {residual:.3g}, at most "
            f"{ACCEPTED:g} expected; |g1|, |g2|, |g4| wanted {_numbers(target)}, found {_numbers(found)}"
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

    The step's own is 0 almost everywhere. h(x) = g1 - A/2 + A 1[x > 0] with A = g2 t sqrt(2 pi) has E h = g1 and E h' = g2; for a
    matched ReLU it is ReLU's own where both t agree.
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


def _optimize() -> Any:
    try:
        from scipy import optimize
    except ImportError as error:
        raise RMTKDError('Matching activations needs scipy: pip install "optimum-rmtkd[ternary]".') from error
    return optimize


# -- min_shift -------------------------------------------------------------------------------------------------------------


def _steps_of(u, levels: int) -> tuple:
    """Free parameters (fp64 array) -> (thresholds in units of t, jumps): first threshold, log gaps, jumps."""
    import numpy as np

    return u[0] + np.concatenate([[0.0], np.cumsum(np.exp(u[1 : levels - 1]))]), u[levels - 1 :]


def steps_and_slopes(z, jumps) -> tuple:
    """tau2, g1, g2, g4 of a step function at t = 1 that starts at level 0, with their derivatives.

    The same numbers as `functionals.step_functionals`, fifty times as fast: an optimizer asks for them thousands of times.
    Written with tails Q = Phi(-z) and q = v_{k+1}^2 - v_k^2: tau2 = sum q Q - m^2, g4 = sum q z phi / 2 - m g2, m = sum J Q.

    Args:
        z, jumps: (K - 1,) fp64 arrays.

    Returns:
        values (4,); slopes (4, 2, K - 1), by thresholds and by jumps.
    """
    import numpy as np

    density = np.exp(-z * z / 2) / ROOT_2_PI
    tail = np.array([0.5 * math.erfc(x / math.sqrt(2)) for x in z])
    after = np.cumsum(jumps)
    q = after**2 - (after - jumps) ** 2
    mean, g1, g2 = jumps @ tail, jumps @ density, jumps @ (z * density)
    values = np.array([q @ tail - mean**2, g1, g2, q @ (z * density) / 2 - mean * g2])

    def by_jump(weight):  # derivative of sum q weight / 2: own square, and every later one moves along
        later = np.cumsum((jumps * weight)[::-1])[::-1] - jumps * weight
        return after * weight + later

    bend = (1 - z * z) * density
    slopes = np.array(
        [
            [-q * density + 2 * mean * jumps * density, 2 * by_jump(tail) - 2 * mean * tail],
            [-jumps * z * density, density],
            [jumps * bend, z * density],
            [
                q * bend / 2 + jumps * density * g2 - mean * jumps * bend,
                by_jump(z * density) - tail * g2 - mean * z * density,
            ],
        ]
    )
    return values, slopes


class _Problem:
    """tau2 and the constraints as functions of the free parameters, with their derivatives, each computed once a point."""

    def __init__(self, goal, levels: int):
        self.goal, self.levels, self._point = goal, levels, None

    def _at(self, u) -> None:
        import numpy as np

        if self._point is not None and (u == self._point).all():
            return
        self._point = u.copy()
        z, jumps = _steps_of(u, self.levels)
        self._values, by = steps_and_slopes(z, jumps)
        gaps = np.cumsum(by[:, 0, ::-1], axis=1)[:, ::-1]  # moving a threshold moves those behind it
        gaps[:, 1:] *= np.exp(u[1 : self.levels - 1])
        self._slopes = np.concatenate([gaps, by[:, 1]], axis=1)

    def tau2(self, u) -> tuple[float, Any]:
        self._at(u)
        return self._values[0], self._slopes[0]

    def misses(self, u):
        self._at(u)
        return self._values[1:] - self.goal

    def misses_slope(self, u):
        self._at(u)
        return self._slopes[1:]


@matcher("min_shift")
def _min_shift(target: Functionals, t: float, levels: int, last: bool) -> StepFunction:
    """SLSQP from seeded random starts, in units where t = 1 and Parseval's bound on tau2 is 1.

    Many levels can have less tau2 than the activation itself, a negative shift: then it is made an equation as well.
    """
    if levels < 2:
        raise RMTKDError(f"levels={levels}: a step function has at least 2.")
    import numpy as np

    optimize, random = _optimize(), np.random.default_rng(SEED)
    unit = _unit(target, t)
    goal = np.array([target.g1 * t / unit, target.g2 * t**2 / unit, target.g4 * t**2 / unit**2])
    problem = _Problem(goal, levels)
    best, nearest = None, None
    for _ in range(RESTARTS):
        z = np.sort(random.normal(size=levels - 1))
        start = np.concatenate([z[:1], np.log(np.diff(z) + 0.1), np.abs(random.normal(size=levels - 1))])
        with np.errstate(all="ignore"):
            found = optimize.minimize(
                problem.tau2,
                start,
                jac=True,
                method="SLSQP",
                constraints={"type": "eq", "fun": problem.misses, "jac": problem.misses_slope},
                options={"maxiter": 300, "ftol": 1e-12},
            )
        if not np.isfinite(found.x).all() or not _is_proper(found.x, levels):
            continue
        miss = float(np.abs(problem.misses(found.x)).max())
        if nearest is None or miss < nearest[0]:
            nearest = (miss, found.x)
        if miss <= ACCEPTED / 2 and (best is None or found.fun < best[0]):
            best = (found.fun, found.x)
    if nearest is None:
        raise MatchingError(
            f"No step function of {levels} levels that are all of use was found at t={t:.4g}: try other levels, or weights_only."
        )
    if best is not None and best[0] < target.tau2 / unit**2 - ACCEPTED:
        best = (best[0], _raised(problem, best[1], target.tau2 / unit**2))
    z, jumps = _steps_of((best or nearest)[1], levels)
    return StepFunction((z * t).tolist(), (np.cumsum([0.0, *jumps]) * unit).tolist())


def _raised(problem: _Problem, start, tau2: float):
    """Free parameters near `start` that keep the constraints and have this larger tau2; `start` where none are found.

    At a minimum of tau2 its slope depends on those of the constraints, so the search starts a little aside.
    """
    import numpy as np

    random = np.random.default_rng(SEED)
    for _ in range(RESTARTS):
        with np.errstate(all="ignore"):
            found = _optimize().least_squares(
                lambda u: np.append(problem.misses(u), problem.tau2(u)[0] - tau2),
                start + 0.1 * random.normal(size=len(start)),
                jac=lambda u: np.vstack([problem.misses_slope(u), problem.tau2(u)[1]]),
                xtol=1e-15,
                ftol=1e-15,
                gtol=1e-15,
            )
        if np.abs(found.fun).max() <= ACCEPTED / 2 and _is_proper(found.x, problem.levels):
            return found.x
    return start


def _is_proper(u, levels: int) -> bool:
    """Thresholds apart and inside the bulk: a step nobody reaches, or of no width, is one level less."""
    import numpy as np

    with np.errstate(all="ignore"):
        z, _ = _steps_of(u, levels)
        return bool((z[1:] - z[:-1] > 1e-6).all()) and abs(z).max() < 8


# -- the paper's activations -------------------------------------------------------------------------------------------


@matcher("two_level")
def _two_level(target: Functionals, t: float, levels: int, last: bool) -> StepFunction:
    """a(1[x < s1] + 1[x > s2]) with g1, g2 and g4 up to its sign.

    With D1 = phi(z2) - phi(z1), D2 = z2 phi(z2) - z1 phi(z1) and P the probability of being outside, g1 t = a D1, g2 t^2 = a D2 and
    g4 t^2 = a^2 (1 - 2 P) D2 / 2. That leaves two equations for the thresholds; of their solutions, the one with positive g4 and the
    smallest tau2 is taken.
    """
    if abs(target.g1) * t < 1e-9 or abs(target.g2) * t * t < 1e-9:
        raise MatchingError(
            f"two_level needs g1 and g2 that are not 0, got {target.g1:.3g} and {target.g2:.3g} (an odd or even activation): use "
            "mode='min_shift'."
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

    optimize, found = _optimize(), {}

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
    """two_level, but in the last layer the least-squares fit of b(1[x < r1] + 1[r2 < x < r3] + 1[x > r4]), r4 = r3 + r2 - r1,
    to g1^2, g2^2, 2 g4 and tau2, with b^2 = (2 g4 / g2)^2 + 4 tau2."""
    if not last:
        return _two_level(target, t, levels, last)
    if abs(target.g2) * t * t < 1e-9:
        raise MatchingError(f"mode='paper' divides by g2={target.g2:.3g}: use mode='min_shift' for an odd activation.")
    import numpy as np

    optimize, random = _optimize(), np.random.default_rng(SEED)
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
