"""The vllm engine: vLLM's `LLM` class, driven one engine step at a time so that every token gets a time.

A token is stamped when `LLMEngine.step` returns it to this process, which is when a program that uses vLLM
can see it. Requests carry token ids both ways: no text is encoded or decoded within what is timed. The
end-of-sequence token is a token like any other; vLLM's `min_tokens` would forbid it, and change the text.
"""

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evalsuite.core.cache import CacheCounters
from evalsuite.core.errors import EngineDied
from evalsuite.core.record import ModelFacts
from evalsuite.core.spec import Serving
from evalsuite.core.telemetry import EngineMemory
from evalsuite.data.models import Checkpoint
from evalsuite.engines import vllm_plugin
from evalsuite.engines.base import Generated
from evalsuite.engines.vllm_arguments import (
    built_for_cpu,
    caches_experts,
    engaged_arguments,
    engine_arguments,
    engine_environment,
    require_vllm,
)
from evalsuite.engines.vllm_facts import refuse_too_long, served_facts
from evalsuite.engines.vllm_failures import failure, message_of
from evalsuite.engines.vllm_log import LogText, kernel_names, load_times
from evalsuite.engines.vllm_reports import WorkerReports
from evalsuite.telemetry.machine import read_machine

# what vLLM, torch and transformers raise when something is wrong with a model, a machine or themselves
FOREIGN = (
    RuntimeError, ValueError, OSError, ImportError, LookupError, AssertionError, AttributeError, TypeError,
    MemoryError,
)  # fmt: skip


class VllmGenerator:
    """A `Generator` over vLLM's offline engine.

    Args:
        log: where the output of this process goes: load times and the causes of failures are read from it.
    """

    def __init__(self, checkpoint: Checkpoint, serving: Serving, log: Path) -> None:
        """Load the model; vLLM is imported on the way, which counts as loading.

        Raises:
            MissingDependency, ModelError, UsageError: as `engine_arguments`; and known causes of failures.
            OutOfMemory: it does not fit.
            EngineDied: it failed, for a reason that is not known.
        """
        began = time.monotonic()
        self._arguments = engine_arguments(checkpoint, serving)
        os.environ.update(engine_environment(serving))
        self._name, self._log = checkpoint.name, log
        self._text = LogText(log)
        self._served = 0
        self._closed = False
        with self._explaining(f"vLLM could not load {checkpoint.name}."):
            from vllm import LLM
            from vllm.engine import arg_utils  # noqa: F401 (what the plugin extends)

            vllm_plugin.register()  # vLLM does so itself only where this package is installed
            self._llm: Any = LLM(**self._arguments)
            cached = caches_experts(checkpoint.config(), self._arguments)
            self._workers = WorkerReports(self._llm, cached)
        written = self._text.read()
        self.load = load_times(written, time.monotonic() - began)
        self.facts = self._read_facts(checkpoint, serving, written)

    def generate(
        self, prompts: Sequence[NDArray[np.int64]], output_len: int, on_first_token: Callable[[], None]
    ) -> list[Generated]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        refuse_too_long(prompts, output_len, engine.vllm_config.model_config.max_model_len)
        params = SamplingParams(
            temperature=0, ignore_eos=True, max_tokens=output_len, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        requests = {str(self._served + place): prompt.tolist() for place, prompt in enumerate(prompts)}
        self._served += len(prompts)
        ids: dict[str, list[int]] = {name: [] for name in requests}
        times: dict[str, list[float]] = {name: [] for name in requests}
        submitted: dict[str, float] = {}
        waiting = set(requests)
        with self._explaining(f"vLLM stopped while {self._name} generated."):
            for name, tokens in requests.items():
                submitted[name] = time.monotonic()
                engine.add_request(name, {"prompt_token_ids": tokens}, params)
            while engine.has_unfinished_requests():
                outputs = engine.step()
                now = time.monotonic()
                for output in outputs:
                    new = output.outputs[0].token_ids
                    ids[output.request_id].extend(new)
                    times[output.request_id].extend([now] * len(new))
                    if new and output.request_id in waiting:
                        waiting.remove(output.request_id)
                        if not waiting:
                            on_first_token()
        for name, tokens in ids.items():
            if len(tokens) != output_len:
                raise EngineDied(
                    f"vLLM gave {len(tokens)} tokens instead of {output_len} for request {name}."
                )
        return [Generated(np.array(ids[n]), submitted[n], np.array(times[n])) for n in requests]

    def resize_expert_cache(self, size: int | None) -> None:
        with self._explaining(f"vLLM could not resize the expert cache of {self._name} to {size or 'all'}."):
            self._workers.resize_expert_cache(size)

    def reset_counters(self) -> None:
        self._workers.reset_counters()

    def expert_cache(self) -> CacheCounters | None:
        return self._workers.expert_cache()

    def memory(self) -> EngineMemory:
        return self._workers.memory()

    def close(self) -> None:
        """End the engine's processes and give its memory back."""
        if self._closed:
            return
        self._closed = True
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _read_facts(self, checkpoint: Checkpoint, serving: Serving, written: str) -> ModelFacts:
        vllm_config = self._llm.llm_engine.vllm_config
        model, compilation = vllm_config.model_config, vllm_config.compilation_config
        on_cpu = built_for_cpu()
        workers = self._workers.facts
        first = workers[0]
        engaged: dict[str, Any] = {
            "vllm": require_vllm(),
            "mode": _mode(serving, on_cpu),
            "compilation": compilation.mode.name if compilation.mode is not None else None,
            "attention": first["attention"],
            "kernels": first["kernels"],
            "log_kernels": list(kernel_names(written)),
            "quantization": model.quantization,
            "max_model_len": model.max_model_len,
            "tensor_parallel_size": len(workers),
        }
        if not on_cpu:
            engaged |= {
                "cudagraph_mode": compilation.cudagraph_mode.name,
                "cudagraphs": min(worker["graphs_captured"] for worker in workers),
                "cudagraph_sizes": list(compilation.cudagraph_capture_sizes or []),
            }
        if serving.moe_expert_cache_size is not None:
            engaged["moe_expert_cache_size"] = serving.moe_expert_cache_size
        return served_facts(
            checkpoint,
            serving,
            dtype=str(model.dtype).removeprefix("torch."),
            device="cpu" if on_cpu else "cuda:0",
            device_name=first["device_name"] or read_machine().cpu,
            engaged=engaged | engaged_arguments(self._arguments),
        )

    @contextmanager
    def _explaining(self, what: str) -> Iterator[None]:
        """Turn what vLLM raises into an error of ours, with the cause from its log.

        Raises:
            EvalError: as the known causes say, else EngineDied.
        """
        try:
            yield
        except (*FOREIGN, *_engine_errors()) as error:
            raise failure(what, f"{self._text.read()}\n{message_of(error)}", self._log) from error


def _mode(serving: Serving, on_cpu: bool) -> str:
    """What was asked for: ``eager``, ``graphs``, or on a CPU, which has no graphs, ``compiled``."""
    if serving.enforce_eager or (on_cpu and os.environ.get("TORCHDYNAMO_DISABLE") == "1"):
        return "eager"
    return "compiled" if on_cpu else "graphs"


def _engine_errors() -> tuple[type[Exception], ...]:
    """vLLM's own error for an engine process that died, once its module is loaded."""
    module = sys.modules.get("vllm.v1.engine.exceptions")
    return (module.EngineDeadError,) if module else ()
