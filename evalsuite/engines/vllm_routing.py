"""vLLM's routing: a hook on every router, in the process that runs the model.

vLLM can return routed experts with its outputs, but 0.32 does so on GPUs only, and 0.26 under other
conditions; the routers' own capture hook is the same in both, on GPUs and on the CPU build. Python hooks are
not part of a CUDA graph, so the model runs eagerly, which changes no choice beyond rounding.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalsuite.core.errors import MeasurementError, UsageError, first_line
from evalsuite.core.spec import Dtype, Serving
from evalsuite.data.models import Checkpoint
from evalsuite.engines.routing import RoutedPass
from evalsuite.engines.vllm_arguments import (
    engine_arguments,
    engine_environment,
    engine_fields,
    require_vllm,
)

LAYER = re.compile(r"\blayers\.(\d+)\.")
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


class VllmRouting:
    """A `RoutingRecorder` over vLLM's offline engine, one request at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: Dtype,
        load_format: Any,
        tokens: int,
        concurrency: int,
        trust_remote_code: bool,
    ) -> None:
        """Start the engine in this process.

        Args:
            tokens: of a prompt and its output.

        Raises:
            UsageError: more than one request at a time, a vLLM that cannot serve the model, or one whose
                routers have no hook.
            MeasurementError: the engine did not start.
        """
        if concurrency > 1:
            raise UsageError(
                "vLLM decides by itself which requests share a pass, so it traces one request at a time.",
                todo="leave --concurrency out, or use --engine torch.",
            )
        serving = Serving(
            engine="vllm", dtype=dtype, load_format=load_format, enforce_eager=True, max_model_len=tokens,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        arguments = engine_arguments(checkpoint, serving) | {
            "max_num_seqs": 1, "max_num_batched_tokens": max(tokens, 512), "disable_log_stats": True,
        }  # fmt: skip
        if "async_scheduling" in engine_fields():
            arguments["async_scheduling"] = False  # it would run a pass more than it needs
        os.environ.update(engine_environment(serving) | IN_PROCESS)
        import vllm

        self._sampling: Any = vllm.SamplingParams
        self._seen: dict[int, list[NDArray[np.int64]]] = {}
        try:
            self._llm: Any = vllm.LLM(**arguments)
        except (RuntimeError, ValueError, NotImplementedError, OSError) as error:
            raise MeasurementError(
                f"vLLM did not start with {checkpoint.name}.",
                cause=first_line(error),
                todo="see its messages above; --engine torch traces the same model.",
            ) from error
        self.name = f"vllm {require_vllm()}"
        self._llm.apply_model(self._install)
        if not self._seen:
            raise UsageError(
                f"The routers of {checkpoint.name} have no hook in vLLM {require_vllm()}.",
                todo="use --engine torch.",
            )
        self._seen = dict(sorted(self._seen.items()))
        self.layers = tuple(self._seen)
        config = self._llm.llm_engine.vllm_config
        precision = str(config.model_config.dtype).removeprefix("torch.")
        self.computed = f"{precision} on {config.device_config.device_type}"

    def _install(self, model: Any) -> None:
        for name, module in model.named_modules():
            place, router = LAYER.search(name + "."), getattr(module, "router", None)
            if place and callable(hook := getattr(router, "set_capture_fn", None)):
                hook(self._note(int(place[1])))

    def _note(self, layer: int) -> Any:
        seen = self._seen.setdefault(layer, [])
        return lambda ids: seen.append(ids.cpu().numpy().astype(np.int64))

    def record(self, prompts: Sequence[NDArray[np.int64]], output_len: int, first: int) -> list[RoutedPass]:
        (prompt,) = prompts
        for seen in self._seen.values():
            seen.clear()
        sampling = self._sampling(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        self._llm.generate([{"prompt_token_ids": prompt.tolist()}], sampling, use_tqdm=False)
        expected = [len(prompt)] + [1] * (output_len - 1)
        for layer, seen in self._seen.items():
            if [len(ids) for ids in seen] != expected:
                raise MeasurementError(
                    f"vLLM ran layer {layer} in {len(seen)} passes of {sum(map(len, seen))} tokens, not in "
                    f"{len(expected)} of {sum(expected)}.",
                    cause="it split or padded a pass, so that tokens cannot be told apart.",
                    todo="use --engine torch.",
                )
        starts = np.concatenate([[0], np.cumsum(expected)[:-1]])
        return [
            RoutedPass(
                request=np.full(size, first),
                position=start + np.arange(size),
                prefill=index == 0,
                chosen=np.stack([seen[index] for seen in self._seen.values()], axis=1),
            )
            for index, (size, start) in enumerate(zip(expected, starts, strict=True))
        ]

    def close(self) -> None:
        del self._llm
