"""Bandwidths are measured in a process of their own; on a CPU nothing is transferred."""

import pytest

from evalsuite.core.errors import EngineDied
from evalsuite.engines import bandwidth


def test_the_cpu():
    found = bandwidth.measure_bandwidth(None)
    assert found.device == "cpu"
    assert 1e8 < found.copy_bytes_per_s < 1e13
    assert found.matrix_flop_per_s > 1e8
    assert found.transfer_bytes_per_s is None


def test_a_device_that_is_not_there():
    with pytest.raises(EngineDied, match="could not be measured"):
        bandwidth.measure_bandwidth(99)
