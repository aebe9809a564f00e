"""Whether the real vLLM can be tested here, and the environment in which it is."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from vllm_cpu.install import obstacle

MISSING = obstacle() or (None if find_spec("vllm") else "tests/vllm_cpu/install.py was not run")
ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip

needs_vllm = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def run_two_ranks(program: str, *arguments: object) -> None:
    """A program of this folder, with tensor parallelism over two CPU processes.

    In a process of its own, whose children import it again.
    """
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(program)), *map(str, arguments)],
        env=os.environ | ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": "0|0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
