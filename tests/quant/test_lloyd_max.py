import itertools
import math

import numpy as np
import pytest
from scipy import integrate, stats

from evalsuite.core.errors import UsageError
from evalsuite.quant.lloyd_max import lloyd_max

# Bits, mean squared error and outer level, as tabulated by Max (1960) and recomputed to more digits.
PUBLISHED = [
    (2, 0.1174818, 1.510418),
    (3, 0.0345478, 2.151946),
    (4, 0.0095010, 2.732590),
    (5, 0.00250467, 3.260732),
    (6, 0.00064424, 3.744101),
]


@pytest.mark.parametrize(("bits", "mse", "outer"), PUBLISHED)
def test_published_values(bits, mse, outer):
    codebook = lloyd_max(bits)
    assert len(codebook.levels) == 2**bits
    assert codebook.mse == pytest.approx(mse, rel=1e-5)
    assert codebook.levels[-1] == pytest.approx(outer, abs=6e-7)


@pytest.mark.parametrize("bits", range(2, 7))
def test_every_level_is_the_mean_of_its_cell(bits):
    """The residual of the stationarity equations, with scipy's distribution instead of our closed forms."""
    levels = np.array(lloyd_max(bits).levels)
    edges = np.concatenate([[-np.inf], lloyd_max(bits).midpoints, [np.inf]])
    for level, low, high in zip(levels, edges[:-1], edges[1:], strict=True):
        # truncnorm loses digits far out; integrate the upper half only, the rest is symmetric.
        if level > 0:
            moment, _ = integrate.quad(lambda z: z * stats.norm.pdf(z), low, high, epsabs=1e-15)
            mass = stats.norm.sf(low) - stats.norm.sf(high)
            assert moment / mass == pytest.approx(level, abs=1e-11)


@pytest.mark.parametrize("bits", range(2, 7))
def test_symmetric_and_ascending(bits):
    levels = lloyd_max(bits).levels
    assert all(a < b for a, b in itertools.pairwise(levels))
    assert levels == tuple(-level for level in reversed(levels))


def test_error_agrees_with_sampling():
    z = np.random.default_rng(0).standard_normal(1_000_000)
    codebook = lloyd_max(4)
    nearest = np.array(codebook.levels)[np.searchsorted(codebook.midpoints, z)]
    errors = (z - nearest) ** 2
    assert abs(errors.mean() - codebook.mse) < 5 * errors.std() / math.sqrt(len(z))


@pytest.mark.parametrize("bits", [0, 1, 7])
def test_other_widths_are_refused(bits):
    with pytest.raises(UsageError, match="codebook"):
        lloyd_max(bits)
