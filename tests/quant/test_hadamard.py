import pytest
import torch
from scipy.linalg import hadamard

from evalsuite.core.errors import UsageError
from evalsuite.quant.hadamard import walsh_hadamard

SIZES = (1, 2, 8, 64, 128, 256, 1024, 32768)


@pytest.mark.parametrize("size", SIZES[:-1])
def test_agrees_with_scipy(size):
    x = torch.randn(3, 2, size, dtype=torch.float32)
    expected = x.double() @ torch.from_numpy(hadamard(size)).double() / size**0.5
    torch.testing.assert_close(walsh_hadamard(x).double(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("size", SIZES)
def test_is_its_own_inverse_and_keeps_lengths(size):
    x = torch.randn(5, size)
    y = walsh_hadamard(x)
    torch.testing.assert_close(walsh_hadamard(y), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("size", [3, 96, 130])
def test_other_sizes_are_refused(size):
    with pytest.raises(UsageError, match="power of two"):
        walsh_hadamard(torch.zeros(size))
