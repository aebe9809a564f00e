"""The Lloyd–Max quantizer of the standard normal distribution, converged.

Levels c₁ < … < c_L and midpoints bᵢ = (cᵢ + cᵢ₊₁)/2 are stationary for the mean squared error when every
level is the mean of its cell, cᵢ = E[z | bᵢ₋₁ < z < bᵢ] = (φ(bᵢ₋₁) − φ(bᵢ)) / (Φ(bᵢ) − Φ(bᵢ₋₁)). Lloyd's
iteration cᵢ ← E[…] needs about 2,700 rounds at 5 bits and 10,000 at 6; Newton's method on the same equations
takes about ten. A cell's mean depends on its two ends alone, so the Jacobian is tridiagonal.

S. P. Lloyd, Least squares quantization in PCM, https://doi.org/10.1109/TIT.1982.1056489
J. Max, Quantizing for minimum distortion, https://doi.org/10.1109/TIT.1960.1057548
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from evalsuite.core.errors import UsageError

Array = NDArray[np.floating]
BITS = range(2, 7)
TOLERANCE = 1e-13
ROUNDS = 100


@dataclass(frozen=True)
class Codebook:
    """Levels in ascending order, symmetric about 0, and their mean squared error for N(0,1)."""

    levels: tuple[float, ...]
    mse: float

    @property
    def midpoints(self) -> tuple[float, ...]:
        """The boundaries of nearest-level coding, one fewer than levels."""
        return tuple((a + b) / 2 for a, b in zip(self.levels, self.levels[1:], strict=False))


@lru_cache(maxsize=len(BITS))
def lloyd_max(bits: int) -> Codebook:
    """The optimal quantizer of N(0,1) with 2^bits levels, each level exact to about 1e-12.

    Raises:
        UsageError: bits is not 2 to 6.
    """
    if bits not in BITS:
        raise UsageError(f"There is no {bits}-bit codebook.", todo="choose 2, 3, 4, 5 or 6 bits.")
    half = 2 ** (bits - 1)
    # Start where the asymptotically optimal point density, φ^(1/3), would put the levels.
    start = NormalDist(sigma=math.sqrt(3))
    levels = np.array([start.inv_cdf(0.5 + (i + 0.5) / (2 * half)) for i in range(half)])
    for _ in range(ROUNDS):
        means, jacobian = _cell_means(levels)
        step = np.linalg.solve(np.eye(half) - jacobian, means - levels)
        levels = _shortened(levels, step)
        if np.abs(step).max() < TOLERANCE:
            break
    else:
        raise ArithmeticError(f"the {bits}-bit Lloyd–Max levels did not converge")
    positive = [float(level) for level in levels]
    return Codebook((*(-level for level in reversed(positive)), *positive), _mse(levels))


def _edges(levels: Array) -> Array:
    """The cells' ends on the positive half axis, from 0 to infinity."""
    return np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [math.inf]])


def _density(x: Array) -> Array:
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _mass(edges: Array) -> Array:
    """Probability of each cell, from erfc so that the outermost keeps its digits."""
    tail = np.array([math.erfc(edge / math.sqrt(2)) / 2 for edge in edges])
    return tail[:-1] - tail[1:]


def _cell_means(levels: Array) -> tuple[Array, Array]:
    """Each cell's mean, and its derivative by the levels: ∂m/∂b = ±φ(b)(b − m)/mass, ∂b/∂c = 1/2."""
    edges = _edges(levels)
    mass, density = _mass(edges), _density(edges)
    means = (density[:-1] - density[1:]) / mass
    lower, upper = edges[1:-1] - means[1:], edges[1:-1] - means[:-1]
    by_lower = -density[1:-1] * lower / mass[1:] / 2  # cell i+1 by the edge below it
    by_upper = density[1:-1] * upper / mass[:-1] / 2  # cell i by the edge above it
    diagonal = np.concatenate([by_upper, [0.0]]) + np.concatenate([[0.0], by_lower])
    return means, np.diag(diagonal) + np.diag(by_upper, 1) + np.diag(by_lower, -1)


def _shortened(levels: Array, step: Array) -> Array:
    """A Newton step, halved until the levels stay positive and in order."""
    while (levels + step)[0] <= 0 or (np.diff(levels + step) <= 0).any():
        step = step / 2
    return levels + step


def _mse(levels: Array) -> float:
    """E(z − c)² = 1 − 2·Σ c·∫zφ + Σ c²·mass, both halves of the axis."""
    edges = _edges(levels)
    density, mass = _density(edges), _mass(edges)
    first_moments = density[:-1] - density[1:]
    return float(1 - 4 * (levels @ first_moments) + 2 * (levels * levels @ mass))
