"""A scripted engine, for tests of the machinery around engines. No number comes from it.

The model ``fake:SCRIPT.json`` is opened only where HLWQ_EVAL_FAKE_ENGINE is 1. The script::

    {"load_s": 0.0, "first_token_s": 0.001, "token_s": 0.001,
     "facts": {"fingerprint": "…"}, "idle_cache": false, "open": "FILE",
     "on": {"load": ["say", "text"], "generate 2": ["oom"], "resize_expert_cache": ["refuse"]}}

`facts` replaces some of the model's facts, an idle cache counts nothing, and FILE is held open. `on` names
a call, or the n-th call of that kind, counted from 1, and what happens there instead: ``oom``, ``fail``,
``full`` (its disk), ``refuse``, ``die`` (SIGKILL), ``crash`` (an exception), ``hang``, or ``say`` with a text
to print before the call goes on.
"""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalsuite.core.cache import ALL_RESIDENT, CacheCounters, LayerCounters
from evalsuite.core.errors import MeasurementError, OutOfMemory, StorageError, UsageError
from evalsuite.core.record import ModelFacts
from evalsuite.core.spec import Serving
from evalsuite.core.speed import LoadTimes
from evalsuite.core.telemetry import EngineMemory
from evalsuite.engines.base import Generated

PREFIX = "fake:"
VARIABLE = "HLWQ_EVAL_FAKE_ENGINE"
EXPERTS = 16
VOCABULARY = 257


class FakeGenerator:
    """The Generator protocol, by script.

    Raises:
        UsageError: the environment does not ask for a fake engine.
    """

    def __init__(self, model: str, serving: Serving) -> None:
        if os.environ.get(VARIABLE) != "1":
            raise UsageError(f"{model} is no model.", todo="choose a model that can be measured.")
        self._script: dict[str, Any] = json.loads(Path(model.removeprefix(PREFIX)).read_text())
        self._calls: Counter[str] = Counter()
        self._cache_size = serving.moe_expert_cache_size
        self._steps = 0
        start = time.monotonic()
        self._enter("load")
        time.sleep(self._script.get("load_s", 0.0))
        self._held = os.open(path, os.O_RDONLY) if (path := self._script.get("open")) else None
        self.load = LoadTimes(total_s=time.monotonic() - start)
        self.facts = ModelFacts(
            name="fake", architecture="scripted", parameters=0, vocabulary=VOCABULARY, max_context=None,
            fingerprint="none", stored="nothing", stored_bytes=0, computed="nothing", dtype="none",
            device="cpu", device_name="none", engaged={"engine": "fake"},
            warnings=("a scripted engine: no number here is a measurement",),
        ).model_copy(update=self._script.get("facts", {}))  # fmt: skip

    def generate(
        self, prompts: Sequence[NDArray[np.int64]], output_len: int, on_first_token: Callable[[], None]
    ) -> list[Generated]:
        """Every token follows from the prompt alone."""
        submitted = time.monotonic()
        self._enter("generate")
        stamps: list[float] = []
        for position in range(output_len):
            time.sleep(self._script.get("token_s" if position else "first_token_s", 0.001))
            stamps.append(time.monotonic())
            if position == 0:
                on_first_token()
        self._steps += output_len
        return [
            Generated((int(p.sum()) + np.arange(output_len)) % VOCABULARY, submitted, np.array(stamps))
            for p in prompts
        ]

    def resize_expert_cache(self, size: int | None) -> None:
        self._enter("resize_expert_cache")
        self._cache_size = size

    def reset_counters(self) -> None:
        self._enter("reset_counters")
        self._steps = 0

    def expert_cache(self) -> CacheCounters | None:
        """Half of all uses are hits."""
        self._enter("expert_cache")
        if self._cache_size is None or self.facts.engaged.get("experts") == ALL_RESIDENT:
            return None
        used = 0 if self._script.get("idle_cache") else self._steps
        layer = LayerCounters(
            layer=0, steps=used, hits=used, misses=used, overflow_steps=0, bytes_moved=100 * used
        )
        return CacheCounters(
            size=self._cache_size, experts=EXPERTS, policy="lru", store="pinned", expert_bytes=100,
            layers=(layer,),
        )  # fmt: skip

    def memory(self) -> EngineMemory:
        self._enter("memory")
        return EngineMemory(absent={"weights_bytes": "a scripted engine has no weights"})

    def close(self) -> None:
        self._enter("close")
        if self._held is not None:
            os.close(self._held)

    def _enter(self, call: str) -> None:
        self._calls[call] += 1
        script = self._script.get("on", {})
        action, *arguments = script.get(f"{call} {self._calls[call]}", script.get(call, [""]))
        match action:
            case "":
                pass
            case "say":
                print(*arguments, flush=True)
            case "oom":
                raise OutOfMemory("The script is out of memory.", cause="it says so.", todo="change it.")
            case "fail":
                raise MeasurementError("The script fails.")
            case "full":
                raise StorageError("The script has no room for its files.", todo="make room.")
            case "refuse":
                raise UsageError("The script refuses.", todo="load again.")
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "crash":
                raise RuntimeError("the script crashes")
            case "hang":
                while True:
                    time.sleep(60)
            case _:
                raise ValueError(f"the script asks for {action!r}")
