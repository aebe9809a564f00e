"""Logs of a vLLM that failed, as it writes them, and what is made of them."""

from pathlib import Path

import pytest

from evalsuite.core.errors import (
    EngineDied,
    MissingDependency,
    ModelError,
    OutOfMemory,
    StorageError,
    UsageError,
)
from evalsuite.engines.vllm_failures import KNOWN, failure, message_of, recognise, root_message

NESTED = """\
(EngineCore pid=411) ERROR 11-24 09:12:01 [core.py:1510] EngineCore failed to start.
(EngineCore pid=411) ERROR 11-24 09:12:01 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=411) ERROR 11-24 09:12:01 [core.py:1510]   File "/x/vllm/v1/worker/gpu_model_runner.py", line 5130, in load_model
(EngineCore pid=411) ERROR 11-24 09:12:01 [core.py:1510]     self.model = self._load(vllm_config=self.vllm_config, max_model_len=4096)
(EngineCore pid=411) ERROR 11-24 09:12:01 [core.py:1510] {message}
Traceback (most recent call last):
  File "/x/vllm/entrypoints/llm.py", line 370, in __init__
    self.llm_engine = LLMEngine.from_engine_args(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}
"""

CASES = [
    (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.3 GiB is free.",
        OutOfMemory, "memory of the device is full",
    ),
    (
        "ValueError: Free memory on device cuda:0 (12.1/79.11 GiB) on startup is less than desired GPU memory utilization (0.92, 72.78 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        OutOfMemory, "another process uses it",
    ),
    (
        "AssertionError: Error in memory profiling. Initial free memory 85.09 GiB, current free memory 106.22 GiB. This happens when other processes sharing the same container release GPU memory while vLLM is profiling during initialization.",
        OutOfMemory, "another process freed memory",
    ),
    (
        "AttributeError: '_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'",
        UsageError, "CPUs without AVX-512",
    ),
    (
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine.",
        OutOfMemory, "leave no room",
    ),
    (
        "ValueError: To serve at least one request with the model's max seq len (262144), 12.00 GiB KV cache is needed, which is larger than the available KV cache memory (3.11 GiB). Try increasing `gpu_memory_utilization` or decreasing `max_model_len`.",
        OutOfMemory, "one request of the longest length",
    ),
    (
        "ValueError: User-specified max_model_len (9000) is greater than the derived max_model_len (max_position_embeddings=4096).",
        UsageError, "more than the model was made for",
    ),
    (
        "OSError: Can't load image processor for '/models/x'. If you were trying to load it from 'https://huggingface.co/models', make sure you don't have a local directory with the same name. Otherwise, make sure '/models/x' is the correct path to a directory containing a preprocessor_config.json file",
        ModelError, "multimodal",
    ),
    (
        "OSError: /models/x does not appear to have a file named preprocessor_config.json. Checkout 'https://huggingface.co//models/x/tree/main' for available files.",
        ModelError, "multimodal",
    ),
    (
        "ValueError: Model architectures ['Foo3ForCausalLM'] are not supported for now. Supported architectures: dict_keys(['AquilaModel'])",
        ModelError, "does not know the model's architecture",
    ),
    (
        "ValueError: The checkpoint you are trying to load has model type `foo3` but Transformers does not recognize this architecture. This could be because of an issue with the checkpoint",
        ModelError, "does not know the model's architecture",
    ),
    (
        "NotImplementedError: No WNA16 MoE backend supports the deployment configuration.",
        UsageError, "a CPU with AMX",
    ),
    (
        "ValueError: Failed to find a kernel that can implement the WNA16 linear layer. Reasons: \n MacheteLinearKernel requires capability 90, current compute  capability is 89",
        UsageError, "no kernel for weights quantized",
    ),
    ("ModuleNotFoundError: No module named 'flashinfer'", MissingDependency, "FlashInfer"),
    (
        "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device",
        UsageError, "built without code for this GPU",
    ),
    (
        "RuntimeError: The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver",
        UsageError, "driver is older",
    ),
    (
        "OSError: You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/google/gemma-3-4b-it.",
        ModelError, "gated on the hub",
    ),
    ("RuntimeError: Unexpected head dim size, 32", UsageError, "64 and 128"),
    ("OSError: [Errno 98] Address already in use", UsageError, "port"),
    (
        "ValueError: Available memory on node 0 (3.1/6.71 GiB) on kv cache allocation is less than requested memory for kv (4.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by other processes.",
        OutOfMemory, "machine's memory does not hold",
    ),
    (
        "torch._inductor.exc.InductorError: InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')",
        MissingDependency, "a compiler for it is missing",
    ),
    (
        "ValueError: This model's maximum context length is 128 tokens. However, your request has 133 input tokens.",
        UsageError, "longer than the engine was set up for",
    ),
    (
        "importlib.metadata.PackageNotFoundError: No package metadata was found for vllm",
        MissingDependency, "vllm-cpu goes by another",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("message", "kind", "cause"), CASES, ids=[case[2][:24] for case in CASES])
@pytest.mark.parametrize("log", ["{message}", NESTED], ids=["alone", "nested"])
def test_known_causes(message, kind, cause, log, tmp_path):
    error = failure("vLLM could not load x.", log.format(message=message), tmp_path / "engine.log")
    assert type(error) is kind
    assert error.what == "vLLM could not load x."
    assert cause in error.cause
    assert message.splitlines()[0][:60] in error.cause
    assert error.todo
    assert "engine.log" in error.todo


def test_every_cause_of_the_table_is_tried_here():
    tried = [recognise(message) for message, *_ in CASES]
    assert [known.cause for known in KNOWN if known not in tried] == []


def test_an_error_of_ours_in_a_worker_comes_out_whole():
    ours = StorageError("The experts need 25 MB.", cause="6 MB are free", todo="make room.")
    lines = (
        f"RuntimeError: outer\nevalsuite.core.errors.StorageError: {ours}\nRuntimeError: Engine core failed"
    )
    log = "\n".join(f"(Worker pid=7) ERROR 11-25 02:04:00 [executor.py:953] {x}" for x in lines.splitlines())
    found = failure("vLLM could not load demo.", log)
    assert type(found) is StorageError
    assert str(found) == str(ours)


def test_an_unknown_cause_is_named_by_its_first_error_not_by_the_outer_ones():
    error = failure("It failed.", NESTED.format(message="ValueError: something new"), Path("e.log"))
    assert type(error) is EngineDied
    assert error.cause == "ValueError: something new"
    assert "initialization failed" not in error.cause


def test_tracebacks_in_warnings_are_no_failures():
    warning = "(MainProcess pid=1) WARNING 11-24 22:17:12 [base.py:380] ValueError: Tokenizer not available\n"
    assert failure("x", warning + "KeyError: 'w2'").cause == "KeyError: 'w2'"
    assert "Tokenizer" not in root_message(warning)


def test_without_any_error_the_last_lines_are_shown():
    error = failure("It ended.", "\n".join(f"INFO line {i}" for i in range(40)))
    assert "INFO line 39" in error.cause
    assert "INFO line 27" not in error.cause


def test_settings_and_source_lines_are_no_evidence():
    log = "INFO 11-24 09:12:01 [core.py:133] Initializing: max_model_len=4096, address already in use=False\n"
    assert recognise(log + "    raise ValueError('max_model_len')\nKeyError: 'layers.0.w'") is None


def test_the_chain_of_an_exception_is_searched():
    try:
        try:
            raise ValueError("No available memory for the cache blocks. Try increasing")
        except ValueError as inner:
            raise RuntimeError("Engine core initialization failed. See root cause above.") from inner
    except RuntimeError as outer:
        text = message_of(outer)
    assert type(failure("x", text)) is OutOfMemory
    assert root_message(text).startswith("ValueError: No available memory")
