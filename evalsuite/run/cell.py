"""One cell of a sweep on a loaded engine: its rounds, its counters, and the proof that its knobs were on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evalsuite.core.bandwidth import Bandwidth
from evalsuite.core.cache import ALL_RESIDENT, CacheCounters
from evalsuite.core.errors import EvalError, NotEngaged
from evalsuite.core.record import ModelFacts
from evalsuite.core.roofline import bound
from evalsuite.core.spec import Serving, SpeedSpec
from evalsuite.core.speed import LoadTimes, SpeedResult
from evalsuite.core.telemetry import EngineMemory
from evalsuite.engines.base import Generator
from evalsuite.engines.geometry import read_geometry
from evalsuite.measure.speed import summarise, token_rows
from evalsuite.run.subject import Subject
from evalsuite.store.runs import TOKENS

Prompts = Sequence[Sequence[NDArray[np.int64]]]


class Cell:
    """A cell while it is measured. What it has found so far is there, however it ends.

    Attributes:
        counters, prefill_counters: of the expert cache over the counted repeats, and over one more prefill.
        memory: as the engine reports it.
    """

    def __init__(self, spec: SpeedSpec, subject: Subject, folder: Path) -> None:
        self._spec, self._subject, self._folder = spec, subject, folder
        self._repeats: list[pd.DataFrame] = []
        self.counters: CacheCounters | None = None
        self.prefill_counters: CacheCounters | None = None
        self.memory: EngineMemory | None = None

    def measure(self, engine: Generator, phase: Callable[[str], None]) -> None:
        """Run all rounds, and keep every token's time.

        Args:
            phase: told when prefill and decode begin, in every round.

        Raises:
            NotEngaged: a knob was set, and was not on.
            EvalError: as the engine has it.
        """
        workload = self._spec.workload
        require_graphs(self._spec, engine.facts)
        rounds = self._subject.prompts(workload)
        try:
            for number, prompts in enumerate(rounds):
                if number == workload.warmups:
                    engine.reset_counters()
                phase("prefill" if number >= workload.warmups else "warm-up")
                self._repeats.append(
                    token_rows(
                        number,
                        number < workload.warmups,
                        engine.generate(prompts, workload.output_len, lambda: phase("decode")),
                    )
                )
        finally:
            if self._repeats:
                self.tokens.to_parquet(self._folder / TOKENS, index=False)
        self.memory = engine.memory()
        self.counters = engine.expert_cache()
        require_expert_cache(self._spec.serving, engine.facts, self.counters)
        if self.counters is not None:
            engine.reset_counters()
            phase("prefill")
            engine.generate(rounds[-1], 1, lambda: None)
            self.prefill_counters = engine.expert_cache()

    @property
    def tokens(self) -> pd.DataFrame:
        return pd.concat(self._repeats, ignore_index=True)

    def summarise(self, facts: ModelFacts, load: LoadTimes, bandwidth: Bandwidth | EvalError) -> SpeedResult:
        """The result, with its bound or the reason why there is none."""
        workload = self._spec.workload
        result = summarise(self.tokens, input_len=workload.input_len, load=load)
        try:
            if isinstance(bandwidth, EvalError):
                raise bandwidth
            geometry = read_geometry(
                self._subject.checkpoint, facts.dtype, dequantised="dequantised_tensors" in facts.engaged
            )
        except EvalError as error:
            return result.model_copy(update={"bound_absent": error.what})
        found = bound(
            geometry,
            bandwidth,
            sequences=workload.concurrency,
            context=workload.input_len + workload.output_len / 2,
            devices=self._spec.serving.tensor_parallel_size,
            transfer_bytes_per_step=self._transfer_bytes_per_step(),
            decode_tokens_per_s=result.decode_tokens_per_s.mean,
        )
        return result.model_copy(update={"bound": found})

    def _transfer_bytes_per_step(self) -> int:
        """Experts copied in a decoding step: in all rounds, less their prefills, over the steps that remain.

        The prefill of each round is taken to copy what one more prefill, run for this alone, copied.
        """
        if self.counters is None or self.prefill_counters is None:
            return 0
        workload = self._spec.workload
        decoding = self.counters.bytes_moved - workload.repeats * self.prefill_counters.bytes_moved
        return max(0, round(decoding / (workload.repeats * (workload.output_len - 1))))


def require_graphs(spec: SpeedSpec, facts: ModelFacts) -> None:
    """Raises NotEngaged where CUDA graphs were asked for and the engine captured none."""
    on_gpu = facts.device.startswith("cuda")
    if on_gpu and not spec.serving.enforce_eager and not facts.engaged.get("cudagraphs"):
        raise NotEngaged(
            "CUDA graphs were asked for, and the engine reports none.",
            cause="it has none, or could not capture them; its log may say why.",
            todo="measure it with --modes eager, or choose another engine.",
        )


def require_expert_cache(serving: Serving, facts: ModelFacts, counters: CacheCounters | None) -> None:
    """Raises NotEngaged where an expert cache was asked for and served nothing, or was of another size."""
    size = serving.moe_expert_cache_size
    if size is None or (counters is None and facts.engaged.get("experts") == ALL_RESIDENT):
        return
    if counters is None or counters.hits + counters.misses == 0:
        raise NotEngaged(
            f"An expert cache of {size} was asked for, and no expert went through it.",
            cause="the engine ignored the setting.",
            todo="update the engine or its plugin; `hlwq-eval doctor` shows what is installed.",
        )
    if counters.size != size:
        raise NotEngaged(
            f"An expert cache of {size} was asked for, and the engine used one of {counters.size}.",
            todo="update the engine or its plugin.",
        )


def engaged(facts: ModelFacts, cell: Cell, loaded_with: int | None) -> dict[str, Any]:
    """What shows that the knobs were on."""
    found = dict(facts.engaged)
    if cell.counters is not None:
        found |= {
            "expert_cache_hits": cell.counters.hits,
            "expert_cache_misses": cell.counters.misses,
            "loaded_with_cache_size": loaded_with,
            "moe_expert_cache_size": cell.counters.size,
        }
    return found
