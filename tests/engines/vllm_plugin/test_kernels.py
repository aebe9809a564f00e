"""The kernels in Triton's interpreter, event for event against the policies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_cpu.install import TRITON_FOLDER, obstacle

ROOT = Path(__file__).resolve().parents[3]
MISSING = obstacle() or (None if TRITON_FOLDER.is_dir() else "tests/vllm_cpu/install.py was not run")


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_kernels_place_and_copy_as_the_policies_say():
    path = os.pathsep.join([str(ROOT), str(TRITON_FOLDER)])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("interpreted.py"))]
    run = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "the kernels follow the rules" in run.stdout
