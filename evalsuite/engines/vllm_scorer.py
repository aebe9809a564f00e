"""The vLLM engine as a scorer: windows of token ids through vLLM's offline `LLM`, as it serves them.

A window's last token is only ever a target, so a prompt is the window without it. Every request asks for one
token (vLLM knows no zero) and names its scored positions; the worker keeps those (engines/vllm_hidden.py).
Prefix caching is off: the context of a window is computed, not taken from the window before.

The engine runs in this process: results need no transport, an error arrives as what it is, and closing gives
the memory back. It runs without CUDA graphs and compilation: a step is larger than any size that is captured,
and its kernels take longer than their launches, so that neither earns the minutes it takes to prepare.
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evalsuite.core.cache import CacheCounters
from evalsuite.core.errors import MeasurementError
from evalsuite.core.record import ModelFacts
from evalsuite.core.spec import Serving
from evalsuite.core.telemetry import Telemetry
from evalsuite.data.models import Checkpoint
from evalsuite.data.windows import TokenWindow
from evalsuite.engines import vllm_plugin
from evalsuite.engines.base import WindowScore
from evalsuite.engines.compute import out_of_memory
from evalsuite.engines.finite import refuse_non_finite
from evalsuite.engines.head import Head
from evalsuite.engines.vllm_arguments import (
    built_for_cpu,
    caches_experts,
    engaged_arguments,
    engine_arguments,
    engine_environment,
    require_vllm,
)
from evalsuite.engines.vllm_facts import served_facts
from evalsuite.engines.vllm_failures import failure, message_of
from evalsuite.engines.vllm_hidden import REQUEST, RankScore
from evalsuite.engines.vllm_offline import FOREIGN
from evalsuite.engines.vllm_plugin import client
from evalsuite.telemetry.gpu import neighbours, visible_gpus
from evalsuite.telemetry.machine import read_machine
from evalsuite.telemetry.probes import gpu_device_used_bytes, rss_peak_bytes

STEP_TOKENS_CPU = 4096
STEP_TOKENS_GPU = 16_384  # of a top-8 model's 256 experts, each then sees 512 tokens
STEPS_A_CALL = 8  # between calls the device waits for the host
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
CPU_CACHE, CPU_CACHE_GIB = "VLLM_CPU_KVCACHE_SPACE", "1"  # a few windows at a time need no more


class VllmScorer:
    """A `Scorer` over vLLM's offline engine."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        serving: Serving,
        *,
        context: int,
        device: int | None = None,
        keep_hidden: bool = False,
        step_tokens: int | None = None,
    ) -> None:
        """Start the engine.

        Args:
            serving: `max_model_len` and `gpus` are not used.
            context: tokens of the longest window.
            device: index of the GPU among those that are visible; None takes the first ones.
            step_tokens: tokens of one forward pass; None chooses by the device.

        Raises:
            MissingDependency, UsageError: as `engine_arguments`.
            ModelError: vLLM cannot serve the checkpoint.
            MeasurementError: the architecture's head is not a plain projection.
            OutOfMemory: the weights do not fit.
        """
        began = time.monotonic()
        self._cpu = built_for_cpu()
        self._step_tokens = step_tokens or max(STEP_TOKENS_CPU if self._cpu else STEP_TOKENS_GPU, context)
        arguments = engine_arguments(checkpoint, serving) | {
            "max_model_len": context,
            "max_num_batched_tokens": self._step_tokens,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        self._cached = caches_experts(checkpoint.config(), arguments)
        if device is not None:
            arguments["device_ids"] = [device]
        environment = engine_environment(serving) | IN_PROCESS
        if CPU_CACHE in environment:
            environment[CPU_CACHE] = CPU_CACHE_GIB
        self._environment = _swap_environment(environment)
        self._set_num_threads = torch.set_num_threads  # vLLM on the CPU replaces it
        self._llm: Any = None
        try:
            with _vllm_failures(f"Loading {checkpoint.name}"), _quiet(), _unseen("llvmlite.binding.ffi"):
                from vllm import LLM

                vllm_plugin.register()
                self._llm = LLM(**arguments)
            self._rpc("hlwq_watch", keep_hidden)
            self._check_head(checkpoint.name)
            self.facts = self._read_facts(checkpoint, serving, arguments)
        except BaseException:
            self.close()
            raise
        self.load_s = time.monotonic() - began

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        """The answer of each rank."""
        return self._llm.collective_rpc(method, args=args)

    def _check_head(self, name: str) -> None:
        """As the torch engine: a head that is more than it seems would be scored wrongly in silence."""
        gap, largest = max(self._rpc("hlwq_head_gap"))
        dtype = self._llm.llm_engine.model_config.dtype
        if not gap <= 1e-3 + 8 * torch.finfo(dtype).eps * largest:
            raise MeasurementError(
                f"The head of {name} is more than a projection of the last hidden state.",
                cause=f"logits differ by up to {gap:.3g} from vLLM's own.",
                todo="use --engine torch.",
            )

    def _read_facts(self, checkpoint: Checkpoint, serving: Serving, arguments: dict[str, Any]) -> ModelFacts:
        ranks, loaded = self._rpc("hlwq_scoring_facts"), self._rpc("hlwq_facts")
        facts = served_facts(
            checkpoint,
            serving,
            dtype=str(self._llm.llm_engine.model_config.dtype).removeprefix("torch."),
            device=ranks[0]["device"],
            device_name=loaded[0]["device_name"] or read_machine().cpu,
            engaged=engaged_arguments(arguments)
            | {
                "vllm": require_vllm(),
                "model_runner": ranks[0]["model_runner"],
                "kernels": loaded[0]["kernels"],
                "attention": loaded[0]["attention"],
                "step_tokens": self._step_tokens,
                "tensor_parallel_size": len(ranks),
            },
        )
        return facts.model_copy(update={"computed": f"{facts.computed} by vLLM"})

    def largest_batch(self, window: TokenWindow) -> int:
        """Windows a call: a few full steps. Those that the KV cache has no room for wait inside vLLM."""
        return max(1, STEPS_A_CALL * self._step_tokens // len(window.ids))

    def score(self, windows: Sequence[TokenWindow]) -> list[WindowScore]:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": window.ids[:-1].tolist()} for window in windows]
        asked = [
            SamplingParams(
                max_tokens=1, temperature=0, detokenize=False, extra_args={REQUEST: _request(number, window)}
            )
            for number, window in enumerate(windows)
        ]
        try:
            with _vllm_failures(f"Scoring {len(windows)} windows"):
                self._llm.generate(prompts, asked, use_tqdm=False)
                ranks = self._rpc("hlwq_take")
        except BaseException:
            self._abort()
            raise
        return [_combine(window, [rank[number] for rank in ranks]) for number, window in enumerate(windows)]

    def _abort(self) -> None:
        """Without it the next call would first finish what this one left behind."""
        engine = self._llm.llm_engine
        engine.abort_request(list(engine.output_processor.request_states), internal=True)
        self._rpc("hlwq_forget")

    def save_head(self, path: Path) -> None:
        parts = [Path(part) for part in self._rpc("hlwq_save_head", str(path))]
        if len(parts) == 1:
            parts[0].rename(path)
            return
        heads = [Head.load(part, "cpu") for part in parts]
        biases = [head.bias for head in heads if head.bias is not None]
        Head(
            torch.cat([head.weight for head in heads]),
            torch.cat(biases) if biases else None,
            heads[0].softcap,
        ).save(path)
        for part in parts:
            part.unlink()

    def expert_cache(self) -> CacheCounters | None:
        return client.read_counters(self._llm) if self._cached else None

    def memory(self) -> Telemetry:
        if self._cpu:
            return Telemetry(rss_peak_bytes=rss_peak_bytes(), absent={"gpu": "scored on the CPU"})
        peaks = self._rpc("hlwq_allocator_peaks")
        first = torch.device(self.facts.device).index or 0
        gpus = visible_gpus(range(first, first + len(peaks)), len(peaks))
        return Telemetry(
            rss_peak_bytes=rss_peak_bytes(),
            gpu_allocated_peak_bytes=sum(rank["allocated"] for rank in peaks),
            gpu_reserved_peak_bytes=sum(rank["reserved"] for rank in peaks),
            gpu_device_used_bytes=gpu_device_used_bytes(gpus[0]),
            neighbours=neighbours(gpus),
        )

    def close(self) -> None:
        if self._llm is not None:
            from vllm.distributed import cleanup_dist_env_and_memory

            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            cleanup_dist_env_and_memory()
        torch.set_num_threads = self._set_num_threads
        _swap_environment(self._environment)


@contextmanager
def _vllm_failures(what: str) -> Iterator[None]:
    """vLLM's own errors as ours, by their known causes."""
    try:
        with out_of_memory(what):
            yield
    except FOREIGN as error:
        raise failure(f"{what} failed in vLLM.", message_of(error)) from error


def _swap_environment(values: Mapping[str, str | None]) -> dict[str, str | None]:
    """Set variables, or remove those that are None; returns what was there."""
    before = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return before


@contextmanager
def _unseen(module: str) -> Iterator[None]:
    """Hide a module: vLLM 0.32 on the CPU looks at every object of every module that is loaded, and falls
    over numba's handle of LLVM, which has any attribute that it is asked for.
    """
    hidden = sys.modules.pop(module, None)
    try:
        yield
    finally:
        if hidden is not None:
            sys.modules[module] = hidden


@contextmanager
def _quiet() -> Iterator[None]:
    """What vLLM and its libraries report while loading would tear the progress display."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _request(number: int, window: TokenWindow) -> dict[str, Any]:
    """The state at position i predicts token i + 1."""
    return {
        "number": number,
        "first": window.offset - 1,
        "targets": window.ids[window.offset :].tolist(),
    }


def _combine(window: TokenWindow, ranks: list[RankScore]) -> WindowScore:
    """One window from what each rank made of its rows of the head."""
    seen = ranks[0].seen
    if not seen.all():
        raise MeasurementError(
            f"vLLM computed {int(seen.sum())} of {window.scored} scored positions of window {window.index}.",
            cause="this version of vLLM leaves out positions that its own output does not need.",
            todo="use --engine torch, and please report it.",
        )
    with np.errstate(invalid="ignore"):  # NaN is refused below
        log_sum = np.logaddexp.reduce([rank.log_sum for rank in ranks])
    nats = (log_sum - np.max([rank.logit for rank in ranks], axis=0)).astype(np.float64)
    refuse_non_finite(nats, window)
    return WindowScore(window.index, nats, ranks[0].hidden)
