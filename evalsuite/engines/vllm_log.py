"""What vLLM reports only in its log: seconds of loading, graph capture, memory, kernels.

Messages as vLLM 0.26 to 0.33 write them. With several workers each writes its own line: of times the longest
counts, and of bytes the sum.
"""

import re
from pathlib import Path

from evalsuite.core.speed import LoadTimes
from evalsuite.engines.vllm_failures import PREFIX

WEIGHTS = re.compile(r"Loading weights took ([\d.]+) seconds")
MODEL = re.compile(r"Model loading took ([\d.]+) GiB(?: memory)? and ([\d.]+) seconds")
CAPTURE = re.compile(r"Graph capturing finished in ([\d.]+) secs, took (-?[\d.]+) GiB")
BAR = re.compile(r"(Capturing CUDA graphs[^:\n\r]*):[^\n\r]*?\b(\d+)/\d+")
DTYPE = re.compile(r"\bdtype=torch\.(\w+)")
COMPILE = re.compile(r"torch\.compile took ([\d.]+) s in total")
READY = re.compile(r"init engine \(profile, create kv cache, warmup model\) took ([\d.]+) s")
CACHE = re.compile(r"Available KV cache memory: ([\d.]+) GiB|Explicitly set \(([\d.]+)/|Auto set \(([\d.]+)/")
KERNEL = re.compile(r"^Using (?!.* vit )(.*?\b(?:backend|kernel|for CompressedTensors\w+))\b")


def load_times(text: str, total_s: float) -> LoadTimes:
    """Seconds until ready as the log splits them; what it does not say is None.

    `weights_s` of dummy weights, which are not read, is the time of making them. `warmup_s` is what remains
    of the engine's own start after compiling and capturing.
    """
    weights = _longest(WEIGHTS, text)
    if weights is None:
        weights = max((float(seconds) for _, seconds in MODEL.findall(text)), default=None)
    captures = [float(seconds) for seconds, _ in CAPTURE.findall(text)]
    parts = [_longest(COMPILE, text), max(captures, default=None)]
    reported = [part for part in parts if part is not None]
    ready = _longest(READY, text)
    return LoadTimes(
        total_s=total_s,
        weights_s=weights,
        compile_s=sum(reported) if reported else None,
        warmup_s=None if ready is None else max(0.0, ready - sum(reported)),
    )


def weights_bytes(text: str) -> int | None:
    """Device memory that loading took, as the log says it: GiB with two decimals, all workers together."""
    sizes = [float(gib) for gib, _ in MODEL.findall(text)]
    return round(sum(sizes) * 2**30) if sizes else None


def kv_cache_bytes(text: str) -> int | None:
    """The key-value budget as the log says it: GiB with two decimals, all workers together."""
    sizes = [float(next(filter(None, match))) for match in CACHE.findall(text)]
    return round(sum(sizes) * 2**30) if sizes else None


def graphs_captured(text: str) -> int:
    """CUDA graphs that one worker captured, from its progress bars; 1 where it says only that it did."""
    done: dict[str, int] = {}
    for name, count in BAR.findall(text):
        done[name] = max(done.get(name, 0), int(count))
    return max(sum(done.values()), 1 if CAPTURE.search(text) else 0)


def computed_dtype(text: str) -> str | None:
    match = DTYPE.search(text)
    return match.group(1) if match else None


def kernel_names(text: str) -> tuple[str, ...]:
    """Kernels and backends that the log says are used, in order of appearance."""
    lines = (PREFIX.sub("", line) for line in text.splitlines())
    return tuple(dict.fromkeys(match.group(1) for line in lines if (match := KERNEL.match(line))))


def _longest(pattern: re.Pattern[str], text: str) -> float | None:
    return max((float(seconds) for seconds in pattern.findall(text)), default=None)


class LogText:
    """What vLLM and its processes write, from now on, into the file that their output goes to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin = path.stat().st_size if path.is_file() else 0

    def read(self) -> str:
        if not self._path.is_file():
            return ""
        with self._path.open("rb") as file:
            file.seek(self._begin)
            return file.read().decode(errors="replace")
