"""vLLM with a hook on every router, in the process that runs the model.

vLLM can return routed experts with its outputs, but 0.32 does so on GPUs only, and 0.26 under other
conditions; the routers' own capture hook is the same in both, on GPUs and on the CPU build. Python hooks are
not part of a CUDA graph, so the model runs eagerly, which changes no choice beyond rounding.
"""

import os
import re
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalsuite.core.errors import EvalError, MeasurementError, UsageError, first_line

LAYER = re.compile(r"\blayers\.(\d+)\.")


class HookedVllm:
    """vLLM's offline engine in this process, and what its routers chose."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """Start the engine.

        Raises:
            MeasurementError: it did not start.
            UsageError: no router of this model has a hook.
        """
        import vllm

        self._sampling: Any = vllm.SamplingParams
        self._seen: dict[int, list[NDArray[np.int64]]] = {}
        try:
            self._llm: Any = vllm.LLM(**arguments)
        except (RuntimeError, ValueError, NotImplementedError, OSError) as error:
            raise MeasurementError("vLLM did not start.", cause=first_line(error)) from error
        self._llm.apply_model(self._install)
        if not self._seen:
            raise UsageError("No router of this model has a hook in this vLLM.", todo="use --engine torch.")
        self._seen = dict(sorted(self._seen.items()))

    def facts(self) -> tuple[str, tuple[int, ...]]:
        """The arithmetic, and the numbers of the layers with experts."""
        config = self._llm.llm_engine.vllm_config
        precision = str(config.model_config.dtype).removeprefix("torch.")
        return f"{precision} on {config.device_config.device_type}", tuple(self._seen)

    def passes(self, prompt: NDArray[np.int64], output_len: int) -> list[NDArray[np.int64]]:
        """What was chosen in the prefill and in each decoding pass: [tokens, layers, top_k] each.

        Raises:
            MeasurementError: generating failed, or the passes were not those of one request.
        """
        for seen in self._seen.values():
            seen.clear()
        sampling = self._sampling(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        try:
            self._llm.generate([{"prompt_token_ids": prompt.tolist()}], sampling, use_tqdm=False)
        except RuntimeError as error:
            raise MeasurementError(
                "vLLM could not generate with this model.",
                cause=first_line(error),
                todo="use --engine torch.",
            ) from error
        expected = [len(prompt)] + [1] * (output_len - 1)
        for layer, seen in self._seen.items():
            if [len(ids) for ids in seen] != expected:
                raise MeasurementError(
                    f"vLLM ran layer {layer} in {len(seen)} passes of {sum(map(len, seen))} tokens, not in "
                    f"{len(expected)} of {sum(expected)}.",
                    cause="it split or padded a pass, so that tokens cannot be told apart.",
                    todo="use --engine torch.",
                )
        return [np.stack(layers, axis=1) for layers in zip(*self._seen.values(), strict=True)]

    def _install(self, model: Any) -> None:
        for name, module in model.named_modules():
            place, router = LAYER.search(name + "."), getattr(module, "router", None)
            if place and callable(hook := getattr(router, "set_capture_fn", None)):
                hook(self._note(int(place[1])))

    def _note(self, layer: int) -> Any:
        seen = self._seen.setdefault(layer, [])
        return lambda ids: seen.append(ids.cpu().numpy().astype(np.int64))


def serve(
    connection: Connection, arguments: Mapping[str, Any], environment: Mapping[str, str], log: Path
) -> None:
    """The main function of a child: start, then answer (prompt, output_len) until the other end closes.

    Answers are (True, value) or (False, an EvalError); all that is printed goes to `log`.
    """
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(environment)
    try:
        engine = HookedVllm(arguments)
        connection.send((True, engine.facts()))
        while True:
            connection.send((True, engine.passes(*connection.recv())))
    except EvalError as error:
        connection.send((False, error))
    except EOFError:
        return
