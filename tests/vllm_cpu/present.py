"""Whether the real vLLM can be tested here, and the environment in which it is."""

from importlib.util import find_spec

import pytest
from vllm_cpu.install import obstacle

MISSING = obstacle() or (None if find_spec("vllm") else "tests/vllm_cpu/install.py was not run")
ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip

needs_vllm = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
