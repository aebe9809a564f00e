"""What ran it, without a word about whose machine it is."""

# ruff: noqa: N801, N802 (the names are pynvml's)

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

import evalsuite
from evalsuite.core.record import Gpu, Machine
from evalsuite.telemetry import machine
from evalsuite.telemetry.machine import package_version, read_gpus, read_machine, set_by_the_user
from evalsuite.telemetry.probes import free_disk_bytes, gpu_device_used_bytes, rss_peak_bytes


@pytest.fixture(scope="module")
def here() -> Machine:
    return read_machine()


def test_nothing_names_the_host_the_user_or_a_path(here: Machine):
    text = here.model_dump_json()
    host = socket.gethostname()
    if len(host) > 3 and not host.startswith("localhost"):
        assert host not in text
        assert host.split(".")[0] not in text
    user = getpass.getuser()
    assert f"/{user}" not in text
    assert not re.search(r"(?<![\w ])/[\w.]+", text), text
    assert str(Path.home()) not in text
    for path in (Path.cwd(), Path(evalsuite.__file__).parent):
        assert str(path) not in text


def test_the_numbers_are_this_machines(here: Machine):
    assert here.python == ".".join(map(str, sys.version_info[:3]))
    assert here.ram_bytes == psutil.virtual_memory().total
    assert 1 <= here.cpu_cores <= (os.cpu_count() or 1)
    assert here.platform.split()[0] in ("Linux", "Darwin")
    assert here.cpu


def test_versions_of_what_can_change_a_number(here: Machine):
    import numpy
    import tokenizers

    assert here.packages["numpy"] == numpy.__version__
    assert here.packages["tokenizers"] == tokenizers.__version__
    assert here.packages["hlwq-eval"] == evalsuite.__version__
    assert {"torch", "transformers"} <= set(here.packages)
    assert package_version("no-such-distribution") is None


def test_variables_that_change_a_number_and_none_that_tells_of_the_user():
    told = {
        "VLLM_DISABLED_KERNELS": "MacheteLinearKernel", "NCCL_P2P_DISABLE": "1",
        "NCCL_IB_PCI_RELAXED_ORDERING": "1", "VLLM_KV_CACHE_LAYOUT": "HND",
        "VLLM_MULTI_STREAM_GEMM_TOKEN_THRESHOLD": "64", "VLLM_SPARSE_INDEXER_MAX_LOGITS_MB": "512",
    }  # fmt: skip
    private = {
        "VLLM_API_KEY": "s3cret", "VLLM_CACHE_ROOT": "/home/me/c", "VLLM_HOST_IP": "10.0.0.1",
        "TRITON_CACHE_DIR": "/home/me/t", "CUDA_VISIBLE_DEVICES": "GPU-1", "HOME": "/home/me",
        "VLLM_TUNED_CONFIG_FOLDER": "/home/me/f", "VLLM_LOGGING_LEVEL": "DEBUG",
        "VLLM_DP_MASTER_IP": "10.0.0.1", "NCCL_COMM_ID": "10.0.0.1:99", "TORCH_CUDA_ARCH_LIST": "9.0",
        "VLLM_GPT_OSS_HARMONY_SYSTEM_INSTRUCTIONS": "be kind", "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }  # fmt: skip
    assert set_by_the_user(told | private) == told


def test_reading_it_imports_no_torch():
    code = (
        "import sys; from evalsuite.telemetry.machine import read_machine; read_machine(); "
        "print('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )


class TestCommit:
    @pytest.fixture
    def checkout(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder laid out as ours; what a git hook sets for its own repository does not reach it."""
        if shutil.which("git") is None:
            pytest.skip("git is not installed")
        for name in [name for name in os.environ if name.startswith("GIT_")]:
            monkeypatch.delenv(name)
        place = tmp_path / "evalsuite" / "telemetry" / "machine.py"
        place.parent.mkdir(parents=True)
        place.write_text("x")
        monkeypatch.setattr(machine, "__file__", str(place))
        return tmp_path

    def git(self, root: Path, *args: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", str(root), *identity, *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    def test_an_installed_wheel_has_none(self, checkout: Path):
        found = read_machine()
        assert (found.git_commit, found.git_dirty) == (None, None)

    def test_clean_and_dirty(self, checkout: Path):
        self.git(checkout, "init", "-q")
        self.git(checkout, "add", ".")
        self.git(checkout, "commit", "-qm", "x", "--no-verify")
        head = self.git(checkout, "rev-parse", "HEAD")
        found = read_machine()
        assert (found.git_commit, found.git_dirty) == (head, False)
        (checkout / "untracked").write_text("results and notes are no change of the code")
        assert read_machine().git_dirty is False
        (checkout / "evalsuite" / "telemetry" / "machine.py").write_text("y")
        assert read_machine().git_dirty is True

    def test_without_git_it_is_unknown(self, checkout: Path, monkeypatch: pytest.MonkeyPatch):
        (checkout / ".git").mkdir()
        monkeypatch.setenv("PATH", "")
        found = read_machine()
        assert (found.git_commit, found.git_dirty) == (None, None)

    def test_a_broken_repository_is_unknown(self, checkout: Path):
        (checkout / ".git").mkdir()
        assert read_machine().git_commit is None


class FakeNvml:
    """pynvml of a machine with GPUs, as far as it is asked."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def __init__(self, sizes: tuple[int | None, ...]) -> None:
        self.sizes, self.opened = sizes, 0

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.sizes)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"GPU model {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        size = self.sizes[handle]
        if size is None:
            raise self.NVMLError_NotSupported("Not Supported")

        class Info:
            total, used = size, size // 4

        return Info

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 13020

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.95.05"


class TestGpus:
    def test_none_without_a_driver(self, monkeypatch: pytest.MonkeyPatch):
        nvml = FakeNvml(())

        def nothing() -> None:
            raise nvml.NVMLError("Driver Not Loaded")

        monkeypatch.setattr(nvml, "nvmlInit", nothing)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        assert read_gpus() == ((), None, None)

    def test_two_of_them(self, monkeypatch: pytest.MonkeyPatch):
        nvml = FakeNvml((80 * 2**30, 141 * 2**30))
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        gpus, driver, cuda = read_gpus()
        assert gpus == (
            Gpu(name="GPU model 0", memory_bytes=80 * 2**30),
            Gpu(name="GPU model 1", memory_bytes=141 * 2**30),
        )
        assert (driver, cuda) == ("580.95.05", "13.2")
        assert nvml.opened == 0
        assert gpu_device_used_bytes(1) == 141 * 2**28
        assert nvml.opened == 0

    def test_a_gpu_that_shares_the_hosts_memory(self, monkeypatch: pytest.MonkeyPatch):
        """GB10 and Jetson answer "not supported" when asked for their memory: no reason to fail a run."""
        nvml = FakeNvml((None,))
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        gpus, _, _ = read_gpus()
        assert nvml.opened == 0
        assert [gpu.name for gpu in gpus] in ([], ["GPU model 0"])


class TestProbes:
    def test_the_peak_is_in_bytes_and_never_falls(self):
        now = psutil.Process().memory_info().rss
        peak = rss_peak_bytes()
        assert 0.9 * now <= peak < 100 * now
        block = bytearray(os.urandom(1) * 80_000_000)
        grown = rss_peak_bytes()
        assert grown >= max(peak, psutil.Process().memory_info().rss * 0.9)
        del block
        assert rss_peak_bytes() >= grown

    def test_free_space_of_a_folder_that_is_not_there_yet(self, tmp_path: Path):
        free = free_disk_bytes(tmp_path / "a" / "b" / "c")
        assert free == pytest.approx(psutil.disk_usage(str(tmp_path)).free, rel=0.05)
        assert not (tmp_path / "a").exists()
