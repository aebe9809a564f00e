"""Numbers out of vLLM's log, on lines as its versions write them."""

import pytest

from evalsuite.core.speed import LoadTimes
from evalsuite.engines.vllm_log import (
    LogText,
    computed_dtype,
    graphs_captured,
    kernel_names,
    kv_cache_bytes,
    load_times,
    weights_bytes,
)

GPU = """\
(EngineCore pid=2) INFO 11-24 09:00:01 [core.py:133] Initializing a V1 LLM engine (v0.26.0) with config: model='x', dtype=torch.bfloat16, max_seq_len=4096
(EngineCore pid=2) INFO 11-24 09:00:04 [cuda.py:483] Using FLASH_ATTN attention backend out of potential backends: ['FLASH_ATTN', 'TRITON_ATTN'].
(EngineCore pid=2) INFO 11-24 09:00:05 [compressed_tensors_wNa16.py:137] Using MacheteLinearKernel for CompressedTensorsWNA16
(EngineCore pid=2) INFO 11-24 09:00:05 [int_wna16.py:158] Using 'MARLIN' WNA16 MoE backend.
(EngineCore pid=2) INFO 11-24 09:00:05 [qwen_gdn_linear_attn.py:151] Using Triton/FLA GDN prefill kernel (requested=triton, head_k_dim=128).
(EngineCore pid=2) INFO 11-24 09:00:05 [cuda.py:542] Using backend AttentionBackendEnum.FLASH_ATTN for vit attention
(EngineCore pid=2) INFO 11-24 09:00:45 [default_loader.py:391] Loading weights took 33.25 seconds
(EngineCore pid=2) INFO 11-24 09:01:00 [gpu_model_runner.py:5349] Model loading took 18.10 GiB memory and 41.900000 seconds
(EngineCore pid=2) INFO 11-24 09:01:40 [backends.py:394] Compiling a graph for compile range (1, 8192) takes 20.00 s
(EngineCore pid=2) INFO 11-24 09:01:41 [monitor.py:50] torch.compile took 35.50 s in total
(EngineCore pid=2) INFO 11-24 09:01:43 [gpu_worker.py:505] Available KV cache memory: 52.25 GiB
\rCapturing CUDA graphs (mixed prefill-decode, PIECEWISE):   0%|          | 0/51 [00:00<?, ?it/s]\rCapturing CUDA graphs (mixed prefill-decode, PIECEWISE): 100%|██████████| 51/51 [00:03<00:00, 15.1it/s]
\rCapturing CUDA graphs (decode, FULL): 100%|██████████| 35/35 [00:02<00:00, 15.1it/s]
(EngineCore pid=2) INFO 11-24 09:01:50 [gpu_model_runner.py:6800] Graph capturing finished in 6 secs, took 0.65 GiB
(EngineCore pid=2) INFO 11-24 09:01:51 [core.py:335] init engine (profile, create kv cache, warmup model) took 51.00 s (compilation: 35.50 s)
"""
CPU = """\
(MainProcess pid=1) INFO 11-24 22:17:08 [unquantized.py:364] Using CPU Unquantized MoE backend out of potential backends: ['CPU'].
(MainProcess pid=1) INFO 11-24 22:17:08 [default_loader.py:501] Loading weights took 0.07 seconds
(MainProcess pid=1) INFO 11-24 22:17:09 [cpu_worker.py:260] Explicitly set (1.0/6.71) GiB for KV cache on node 0.
(MainProcess pid=1) INFO 11-24 22:17:11 [core.py:402] init engine (profile, create kv cache, warmup model) took 2.42 s
"""


def test_load_times_of_a_gpu_add_up():
    load = load_times(GPU, 120.0)
    assert (load.total_s, load.weights_s, load.compile_s) == (120.0, 33.25, 41.5)
    assert load.warmup_s == pytest.approx(51.0 - 35.5 - 6)


def test_load_times_of_a_cpu_leave_out_what_is_not_said():
    assert load_times(CPU, 5.0) == LoadTimes(total_s=5.0, weights_s=0.07, compile_s=None, warmup_s=2.42)
    assert load_times("", 5.0) == LoadTimes(total_s=5.0)


def test_dummy_weights_are_made_not_read():
    dummy = "\n".join(line for line in GPU.splitlines() if "Loading weights" not in line)
    assert load_times(dummy, 1.0).weights_s == 41.9


def test_the_slowest_worker_counts_for_time_and_all_for_bytes():
    two = GPU + GPU.replace("33.25", "30.00").replace("18.10 GiB", "17.90 GiB")
    assert load_times(two, 120.0).weights_s == 33.25
    assert weights_bytes(two) == 36 * 2**30
    assert kv_cache_bytes(two) == round(104.5 * 2**30)


def test_bytes():
    assert weights_bytes(GPU) == round(18.1 * 2**30)
    assert kv_cache_bytes(CPU) == 2**30
    assert weights_bytes(CPU) is None
    assert kv_cache_bytes("") is None


def test_captured_graphs():
    assert graphs_captured(GPU) == 51 + 35
    assert graphs_captured(CPU) == 0
    assert graphs_captured("Graph capturing finished in 6 secs, took 0.65 GiB") == 1


def test_kernels_and_type():
    assert kernel_names(GPU) == (
        "FLASH_ATTN attention backend",
        "MacheteLinearKernel for CompressedTensorsWNA16",
        "'MARLIN' WNA16 MoE backend",
        "Triton/FLA GDN prefill kernel",
    )
    assert computed_dtype(GPU) == "bfloat16"
    assert computed_dtype(CPU) is None


def test_a_file_is_read_from_where_it_was_when_loading_began(tmp_path):
    log = tmp_path / "engine.log"
    assert LogText(log).read() == ""
    log.write_text("Loading weights took 99.00 seconds\n")
    text = LogText(log)
    assert text.read() == ""
    with log.open("ab") as file:
        file.write(b"Loading weights took 3.00 seconds \xff\n")
    assert load_times(text.read(), 5.0).weights_s == 3.0
