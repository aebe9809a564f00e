"""What ran it: hardware, driver, library versions and the commit, read without importing torch."""

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

import evalsuite
from evalsuite.core.record import Gpu, Machine

PACKAGES = (
    "hlwq-eval", "torch", "transformers", "tokenizers", "safetensors", "compressed-tensors", "datasets",
    "numpy", "gguf", "vllm", "triton",
)  # fmt: skip
READ = ("VLLM_", "NCCL_", "CUBLAS", "CUDA_", "NVIDIA_", "PYTORCH_", "TORCH", "TRITON_")
# words of names that say which GPUs, where files are, what is said and to whom, and how something was built:
# recorded otherwise, of no effect, or private
LEFT_OUT = {
    "VISIBLE", "DIR", "PATH", "ROOT", "HOME", "FILE", "FOLDER", "MANAGER", "LOG", "LOGGING", "DEBUG", "TRACE",
    "USAGE", "HOST", "PORT", "URL", "ADDR", "IP", "IPS", "ID", "KEY", "SECRET", "PASSWORD", "INSTRUCTIONS",
    "PLUGINS", "VERSION", "REQUIRE", "CAPABILITIES", "BUILD", "TAG", "COMMIT", "PRODUCT", "ARCH",
}  # fmt: skip
_AT_START = dict(os.environ)  # engines in this process set some of these later


def set_by_the_user(environment: Mapping[str, str] = _AT_START) -> dict[str, str]:
    """Variables of vLLM and of what it stands on that can change what is computed, or how fast."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(READ)
        and not LEFT_OUT & set(name.split("_"))
        and not name.endswith(("_TOKEN", "_DEVICE_ORDER"))
        and "/" not in value
    }


def package_version(name: str) -> str | None:
    """The installed version of a distribution, None where it is missing."""
    if name == "hlwq-eval":
        return evalsuite.__version__
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def read_gpus() -> tuple[tuple[Gpu, ...], str | None, str | None]:
    """GPUs in NVML order, driver version, and the CUDA version that the driver supports.

    Empty and None where there is no NVIDIA driver.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return (), None, None

    def memory(handle: Any) -> int:
        try:
            return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        except pynvml.NVMLError:  # not supported: the GPU shares the host's
            return psutil.virtual_memory().total

    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        gpus = tuple(Gpu(name=pynvml.nvmlDeviceGetName(h), memory_bytes=memory(h)) for h in handles)
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        return gpus, pynvml.nvmlSystemGetDriverVersion(), f"{cuda // 1000}.{cuda % 1000 // 10}"
    finally:
        pynvml.nvmlShutdown()


def read_machine() -> Machine:
    """The machine this process runs on. Holds no host name, user name or path."""
    gpus, driver, cuda = read_gpus()
    commit, dirty = _git_state()
    return Machine(
        platform=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_name(),
        cpu_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        ram_bytes=psutil.virtual_memory().total,
        gpus=gpus,
        gpu_driver=driver,
        cuda=cuda,
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := package_version(name))},
        environment=set_by_the_user(),
        git_commit=commit,
        git_dirty=dirty,
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_state() -> tuple[str | None, bool | None]:
    """Commit of the checkout that this package runs from; None for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None, None

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *args],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
            # a git hook points these at another repository
            env={key: value for key, value in os.environ.items() if not key.startswith("GIT_")},
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None
