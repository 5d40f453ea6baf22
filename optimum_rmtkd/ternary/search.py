"""The search for step functions with given functionals: optimizers over fp64 arrays.

A step function is (thresholds z in units of t, jumps at them); it starts at level 0, since only differences count.
"""

from __future__ import annotations

import math
from typing import Any

from ..errors import RMTKDError
from .functionals import ROOT_2_PI


__all__ = ["ACCEPTED", "RESTARTS", "SEED", "optimizers", "smallest_tau2", "steps_and_slopes"]

ACCEPTED = 1e-6  # largest scaled residual of g1, g2, g4
RESTARTS = 12
SEED = 0


def optimizers() -> Any:
    """scipy.optimize, which only matching needs."""
    try:
        from scipy import optimize
    except ImportError as error:
        raise RMTKDError('Matching activations needs scipy: pip install "optimum-rmtkd[ternary]".') from error
    return optimize


def _steps_of(u, levels: int) -> tuple:
    """Free parameters (fp64 array) -> (thresholds in units of t, jumps): first threshold, log gaps, jumps."""
    import numpy as np

    return u[0] + np.concatenate([[0.0], np.cumsum(np.exp(u[1 : levels - 1]))]), u[levels - 1 :]


def steps_and_slopes(z, jumps) -> tuple:
    """tau2, g1, g2, g4 of a step function at t = 1 that starts at level 0, with their derivatives.

    The same numbers as `functionals.step_functionals`, fifty times as fast: an optimizer asks for them thousands of
    times. Written with tails Q = Phi(-z) and q = v_{k+1}^2 - v_k^2: tau2 = sum q Q - m^2, g4 = sum q z phi / 2 - m g2,
    m = sum J Q.

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
    """tau2 and the constraints as functions of the free parameters, with their derivatives, each computed once a
    point."""

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


def smallest_tau2(goal, tau2: float, levels: int) -> tuple | None:
    """The step function with these g1, g2, g4 (at t = 1) whose tau2 is smallest but not below `tau2`.

    SLSQP from seeded random starts. Many levels can have less than `tau2`; then it is made an equation as well.

    Args:
        goal: (3,) fp64 array.

    Returns:
        (z, jumps), (levels - 1,) each. If no start came to a solution, where it came nearest; None if all steps of
        every start ran into each other or out of reach.
    """
    import numpy as np

    optimize, random = optimizers(), np.random.default_rng(SEED)
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
        return None
    if best is not None and best[0] < tau2 - ACCEPTED:
        best = (tau2, _raised(problem, best[1], tau2))
    return _steps_of((best or nearest)[1], levels)


def _raised(problem: _Problem, start, tau2: float):
    """Free parameters near `start` that keep the constraints and have this larger tau2; `start` where none are found.

    At a minimum of tau2 its slope depends on those of the constraints, so the search starts a little aside.
    """
    import numpy as np

    random = np.random.default_rng(SEED)
    for _ in range(RESTARTS):
        with np.errstate(all="ignore"):
            found = optimizers().least_squares(
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
