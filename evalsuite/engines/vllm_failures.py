"""Why vLLM failed, from what it wrote: a table of known causes, each with its next step.

vLLM starts its engine in processes of its own, and what reaches the caller is often only that this failed.
The cause stands further up in the log, so the whole text since the start is searched.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from evalsuite.core import errors
from evalsuite.core.errors import (
    EngineDied,
    EvalError,
    MissingDependency,
    ModelError,
    OutOfMemory,
    UsageError,
    first_line,
)

LOG_LINES = 12
LONGEST_CAUSE = 400  # characters of vLLM's own message
PREFIX = re.compile(r"^(\([^)]*pid=\d+\) ?|\[rank\d+\]: ?|[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)+")
WARNING = re.compile(r"\bWARNING \d\d-\d\d ")
ERROR_LINE = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Failure): \S")
OURS = re.compile(
    r"^evalsuite\.core\.errors\.(?P<kind>\w+): (?P<what>.+)"
    r"(?:\nCause: (?P<cause>.+))?(?:\nNext:  (?P<todo>.+))?$",
    re.M,
)
OUTER = ("Engine core initialization failed", "EngineCore encountered an issue", "WorkerProc initialization")


@dataclass(frozen=True)
class KnownCause:
    """One line of the table.

    Attributes:
        pattern: found anywhere in the text.
        error: what to raise; exit code and status follow from it.
        cause, todo: as in `EvalError`.
    """

    pattern: str
    error: type[EvalError]
    cause: str
    todo: str


# the first that matches counts, so what explains another stands before it
KNOWN = (
    KnownCause(
        r"is less than desired GPU memory utilization",
        OutOfMemory,
        "vLLM wants a share of the GPU that is not free: another process uses it.",
        "end the other process, choose another with --gpus, or lower --gpu-memory-utilization.",
    ),
    KnownCause(
        r"Error in memory profiling",
        OutOfMemory,
        "another process freed memory of the GPU while vLLM measured what it has for itself.",
        "run it again once the other process is done, or choose another GPU with --gpus.",
    ),
    KnownCause(
        r"on kv cache allocation is less than requested memory for kv",
        OutOfMemory,
        "the machine's memory does not hold vLLM's key-value cache.",
        "set VLLM_CPU_KVCACHE_SPACE to fewer GiB, or free memory.",
    ),
    KnownCause(
        r"No available memory for the cache blocks",
        OutOfMemory,
        "the weights leave no room for the key-value cache.",
        "raise --gpu-memory-utilization, give more GPUs (--tensor-parallel-size) or an expert cache "
        "(--moe-expert-cache-size).",
    ),
    KnownCause(
        r"cache is needed, which is larger than the available KV",
        OutOfMemory,
        "the key-value cache of one request of the longest length does not fit.",
        "give a smaller --max-model-len, or raise --gpu-memory-utilization.",
    ),
    KnownCause(
        r"greater than the derived max_model_len",
        UsageError,
        "--max-model-len is more than the model was made for.",
        "give a smaller --max-model-len, or leave it out.",
    ),
    KnownCause(
        r"CUDA out of memory|CUDA error: out of memory|OutOfMemoryError|DefaultCPUAllocator: can't allocate"
        r"|cudaErrorMemoryAllocation|HIP out of memory",
        OutOfMemory,
        "the memory of the device is full.",
        "give a smaller --max-model-len or --moe-expert-cache-size, or more GPUs (--tensor-parallel-size).",
    ),
    KnownCause(
        r"Can't load (?:image processor|feature extractor|video processor)"
        r"|\b(?:not?|missing)\b[^\n]*\bpreprocessor_config\.json",
        ModelError,
        "vLLM reads preprocessor_config.json of a multimodal model even when it serves its text part alone, "
        "and the checkpoint has none.",
        "copy preprocessor_config.json from the original model into the checkpoint's folder.",
    ),
    KnownCause(
        r"gated repo|GatedRepoError|Access to model .* is restricted",
        ModelError,
        "the model is gated on the hub.",
        "accept its terms on its page on the hub, then run `hf auth login`.",
    ),
    KnownCause(
        r"No \w+(?: \w+)? MoE backend supports",
        UsageError,
        "this vLLM has no kernel for experts quantized like this on this device: INT4 experts need a GPU, or "
        "a CPU with AMX.",
        "serve it on a GPU, or use --engine torch, which dequantises on load.",
    ),
    KnownCause(
        r"has no attribute 'cpu_gemm_wna16'",
        UsageError,
        "vLLM's library for CPUs without AVX-512 has no INT4 products.",
        "use --engine torch, which dequantises on load, or serve it on a GPU.",
    ),
    KnownCause(
        r"Failed to find a kernel that can implement|Unknown quantization method"
        r"|quantization method .* is not supported|not supported for the current GPU",
        UsageError,
        "this vLLM has no kernel for weights quantized like this on this device.",
        "serve it on another GPU, install a newer vLLM, or use --engine torch.",
    ),
    KnownCause(
        r"Model architectures? .* (?:are|is) not supported|does not recognize this architecture"
        r"|has no vLLM implementation",
        ModelError,
        "this vLLM does not know the model's architecture.",
        "install a newer vLLM, or use --engine torch, whose transformers may know it.",
    ),
    KnownCause(
        r"Unexpected head dim size|Unsupported CPU attention configuration",
        UsageError,
        "vLLM's CPU kernels are not compiled for heads of this size; for linear attention, for 64 and 128.",
        "use --engine torch, or serve it on a GPU.",
    ),
    KnownCause(
        r"No module named '?flashinfer|flashinfer[^\n]*(?:not installed|not found|not available)"
        r"|(?:install|requires?|needs?) FlashInfer",
        MissingDependency,
        "vLLM chose a kernel of FlashInfer, which is not installed.",
        "pip install flashinfer-python, or unset what asks for it: VLLM_USE_FLASHINFER_SAMPLER=0, and "
        "gdn_prefill_backend=triton in additional_config.",
    ),
    KnownCause(
        r"driver on your system is too old|driver version is insufficient"
        r"|PTX was compiled with an unsupported toolchain",
        UsageError,
        "the GPU's driver is older than the CUDA that vLLM and torch were built with.",
        "update the driver, or install builds for its CUDA version; `hlwq-eval doctor` shows both.",
    ),
    KnownCause(
        r"no kernel image is available|is not compatible with the current PyTorch installation",
        UsageError,
        "vLLM or torch was built without code for this GPU.",
        "install builds that support its compute capability.",
    ),
    KnownCause(
        r"Could not find nvcc|CUDA_HOME is not set|Ninja is required|InvalidCxxCompiler"
        r"|No working C\+\+ compiler",
        MissingDependency,
        "vLLM compiles a kernel at start, and a compiler for it is missing.",
        "install nvcc or a C++ compiler, or run without compilation (--modes eager).",
    ),
    KnownCause(
        r"maximum context length|max_model_len|longer than the maximum model length",
        UsageError,
        "prompt and output are longer than the engine was set up for.",
        "give a larger --max-model-len, or shorter --input-len and --output-len.",
    ),
    KnownCause(
        r"No package metadata was found for vllm",
        MissingDependency,
        "the command `vllm` looks for a package of that name, and vllm-cpu goes by another.",
        "use --engine vllm, which needs no command.",
    ),
    KnownCause(
        r"[Aa]ddress already in use",
        UsageError,
        "the port that the server was given is in use.",
        "run it again: a free port is chosen anew.",
    ),
)  # fmt: skip


def recognise(text: str) -> KnownCause | None:
    """The first known cause whose mark is in the text.

    Error messages are searched first, and the whole text for lack of a match there; but the marks of a usage
    error, such as ``max_model_len``, are no evidence in logged settings and in source lines.
    """
    messages = "\n".join(error_messages(text))
    if found := next((known for known in KNOWN if re.search(known.pattern, messages)), None):
        return found
    grave = (known for known in KNOWN if known.error is not UsageError)
    return next((known for known in grave if re.search(known.pattern, text)), None)


def error_messages(text: str) -> list[str]:
    """Lines that end a traceback, such as ``ValueError: …``, each with the line after it.

    What is logged as a warning did not end anything: vLLM warns with whole tracebacks.
    """
    lines = [PREFIX.sub("", line) for line in text.splitlines() if not WARNING.search(line)]
    found: list[str] = []
    for place, line in enumerate(lines):
        if ERROR_LINE.match(line):
            found += lines[place : place + 2]
    return found


def root_message(text: str) -> str:
    """The error that began it, in one line; empty where the text holds none."""
    messages = error_messages(text)
    starts = [place for place, line in enumerate(messages) if ERROR_LINE.match(line)]
    inner = [place for place in starts if not any(outer in messages[place] for outer in OUTER)]
    if not starts:
        return ""
    place = (inner or starts)[0]
    unfinished = messages[place].rstrip().endswith(":")
    parts = messages[place : place + 2] if unfinished else messages[place : place + 1]
    return " ".join(part.strip() for part in parts)[:LONGEST_CAUSE]


def failure(what: str, text: str, log: Path | None = None) -> EvalError:
    """The error to raise for a vLLM that failed.

    Args:
        what: what was being done, as a sentence.
        text: everything it wrote, or the message of its exception.
        log: where the text can be read again.
    """
    if ours := own_error(text):
        return ours
    place = f" The log: {log}" if log else ""
    message = root_message(text)
    if known := recognise(text):
        said = f" vLLM says: {message}" if message else ""
        return known.error(what, cause=known.cause + said, todo=known.todo + place)
    return EngineDied(
        what,
        cause=message or "unknown; its last lines:\n" + last_lines(text),
        todo="look further up in the log." + place if log else "",
    )


def own_error(text: str) -> EvalError | None:
    """An error of this package that ended one of vLLM's processes, as its log has it."""
    found = OURS.search("\n".join(PREFIX.sub("", line) for line in text.splitlines()))
    if found is None:
        return None
    error: type[EvalError] = getattr(errors, found["kind"])
    return error(found["what"], cause=found["cause"] or "", todo=found["todo"] or "")


def last_lines(text: str, count: int = LOG_LINES) -> str:
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-count:])


def message_of(error: BaseException) -> str:
    """An exception and what caused it, outermost last, as a traceback would end."""
    chain: list[str] = []
    current: BaseException | None = error
    while current is not None:
        chain.append(f"{type(current).__name__}: {str(current) or first_line(current)}")
        current = current.__cause__ or current.__context__
    return "\n".join(reversed(chain))
