"""The kernels in an interpreter, where Triton can be had: installed, or in the folder HLWQ_EVAL_TRITON."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TRITON = os.environ.get("HLWQ_EVAL_TRITON", "")
MISSING = "triton is not installed, and HLWQ_EVAL_TRITON names no folder that has it"


@pytest.mark.skipif(not find_spec("triton") and not (Path(TRITON) / "triton").is_dir(), reason=MISSING)
def test_kernels_place_and_copy_as_the_policies_say():
    path = os.pathsep.join(filter(None, [str(ROOT), TRITON]))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("interpreted.py"))]
    run = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "the kernels follow the rules" in run.stdout
