"""Greedy generation by transformers, one token at a time, with the expert cache.

All prompts of a call run as one batch. Every step ends with a synchronisation of the device and a copy of the
new ids to the host, and the time stamp is taken after both: a token's time is when a caller could read it.
The torch engine always runs eager: no graphs are captured and nothing is compiled.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evalsuite.core.cache import CacheCounters
from evalsuite.core.errors import UsageError
from evalsuite.core.record import ModelFacts
from evalsuite.core.spec import Serving
from evalsuite.core.speed import LoadTimes
from evalsuite.core.telemetry import EngineMemory
from evalsuite.data.models import Checkpoint
from evalsuite.engines.base import Generated
from evalsuite.engines.compute import out_of_memory, resolve_compute
from evalsuite.engines.facts import read_facts
from evalsuite.engines.loading import add_cache, load_model, quiet_transformers
from evalsuite.engines.select import refuse_settings
from evalsuite.engines.torch_cache import Caching, cache_warnings, require_experts


class TorchGenerator:
    """A `Generator` over transformers, on the CPU or on one GPU."""

    def __init__(self, checkpoint: Checkpoint, serving: Serving) -> None:
        """Load the model.

        Raises:
            UsageError: a setting that this engine does not have, or a cache for a model without experts.
            ModelError, MissingDependency, OutOfMemory, StorageError: as `load_model`.
        """
        refuse_settings("torch", serving)
        began = time.monotonic()
        self._serving, self._checkpoint = serving, checkpoint
        device = f"cuda:{serving.gpus[0]}" if serving.gpus else "auto"
        self._device, self._dtype = resolve_compute(device, serving.dtype)
        caching = None
        if serving.moe_expert_cache_size is not None:
            require_experts(checkpoint)
            caching = self._caching(serving.moe_expert_cache_size)
        if self._device.type == "cuda":
            torch.cuda.init()  # its statistics do not exist before
            torch.cuda.reset_peak_memory_stats(self._device)
        self._loaded = load_model(
            checkpoint,
            self._device,
            self._dtype,
            trust_remote_code=serving.trust_remote_code,
            caching=caching,
            dummy=serving.load_format == "dummy",
        )
        weights_s = time.monotonic() - began
        self._kv_bytes = 0
        with quiet_transformers():  # notes about optional kernels come with the first pass
            self._warm_up()
        total_s = time.monotonic() - began
        self.load = LoadTimes(total_s=total_s, weights_s=weights_s, warmup_s=total_s - weights_s)
        warnings = cache_warnings(caching, self._loaded.model) if caching else ()
        self.facts: ModelFacts = read_facts(
            checkpoint, self._loaded, self._device, self._dtype, engaged={"mode": "eager"}, warnings=warnings
        )

    def _caching(self, size: int | None) -> Caching:
        return Caching(size, self._serving.moe_expert_cache_policy, self._serving.moe_expert_store)

    def _warm_up(self) -> None:
        """One token in and two out: libraries load their kernels with the first pass."""
        self.generate([np.zeros(1, np.int64)], 2, lambda: None)
        if self._loaded.cache is not None:
            self._loaded.cache.resize(self._loaded.cache.size)  # the trial leaves no trace in the slots
        self.reset_counters()

    def generate(
        self, prompts: Sequence[NDArray[np.int64]], output_len: int, on_first_token: Callable[[], None]
    ) -> list[Generated]:
        """Generate greedily, whatever the model's end-of-sequence token says.

        Args:
            prompts: of equal length.

        Raises:
            UsageError: the prompts differ in length, or leave the model's context.
            OutOfMemory: the batch does not fit.
        """
        self._check(prompts, output_len)
        submitted_s = time.monotonic()
        with out_of_memory(f"Generating for {len(prompts)} prompts at once"):
            ids, token_s = self._decode(torch.from_numpy(np.stack(prompts)), output_len, on_first_token)
        return [Generated(row, submitted_s, token_s) for row in ids]

    @torch.inference_mode()
    def _decode(
        self, prompts: torch.Tensor, output_len: int, on_first_token: Callable[[], None]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """int64 [prompts, output_len], and float64 [output_len] seconds."""
        tokens: list[NDArray[np.int64]] = []
        token_s = np.empty(output_len)
        ids, state = prompts.to(self._device), None
        for step in range(output_len):
            out = self._loaded.model(ids, past_key_values=state, use_cache=True, logits_to_keep=1)
            state = out.past_key_values
            ids = out.logits[:, -1:].argmax(-1)
            tokens.append(ids[:, 0].cpu().numpy())
            self._synchronize()
            token_s[step] = time.monotonic()
            if step == 0:
                on_first_token()
        self._kv_bytes = max(self._kv_bytes, _bytes_of(state))
        return np.stack(tokens, axis=1), token_s

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _check(self, prompts: Sequence[NDArray[np.int64]], output_len: int) -> None:
        lengths = {len(prompt) for prompt in prompts}
        if len(lengths) != 1 or 0 in lengths or output_len < 1:
            raise UsageError(
                f"The torch engine takes prompts of one length at a time, not of {sorted(lengths)}, and "
                "generates at least one token.",
                todo="send prompts of equal length.",
            )
        context = self._serving.max_model_len or getattr(
            self._loaded.model.config.get_text_config(), "max_position_embeddings", None
        )
        needed = lengths.pop() + output_len
        if context is not None and needed > context:
            raise UsageError(
                f"{needed:,} tokens leave the context of {self._checkpoint.name}, {context:,}.",
                todo="give a smaller --input-len or --output-len.",
            )

    def resize_expert_cache(self, size: int | None) -> None:
        """As `Generator` has it; a model that was loaded without a cache hands its experts to a store first.

        Raises:
            UsageError: the model has no experts, or the size is below 1.
            StorageError, OutOfMemory: the experts cannot be kept.
        """
        with out_of_memory(f"An expert cache of {size or 'all'}"):
            if self._loaded.cache is None:
                require_experts(self._checkpoint)
                if size is None:
                    return
                self._loaded = add_cache(
                    self._loaded,
                    self._checkpoint,
                    self._device,
                    self._dtype,
                    self._caching(size),
                    dummy=self._serving.load_format == "dummy",
                )
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
            else:
                self._loaded.cache.resize(size)
        self.facts = read_facts(
            self._checkpoint,
            self._loaded,
            self._device,
            self._dtype,
            engaged={"mode": "eager"},
            warnings=cache_warnings(self._caching(size), self._loaded.model),
        )

    def reset_counters(self) -> None:
        if self._loaded.cache is not None:
            self._loaded.cache.reset_counters()
        self._kv_bytes = 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def expert_cache(self) -> CacheCounters | None:
        return None if self._loaded.cache is None else self._loaded.cache.counters()

    def memory(self) -> EngineMemory:
        """Peaks since the last reset; keys, values and recurrent states of the largest batch."""
        model = self._loaded.model
        tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
        slots = self._loaded.cache.bytes if self._loaded.cache else 0
        if self._device.type == "cpu":
            reason = "torch does not count allocations on the CPU"
            return EngineMemory(
                weights_bytes=sum(tensors.values()) + slots,
                kv_cache_bytes=self._kv_bytes,
                absent={"allocated_peak_bytes": reason, "reserved_peak_bytes": reason},
            )
        return EngineMemory(
            weights_bytes=sum(tensors.values()) + slots,
            kv_cache_bytes=self._kv_bytes,
            allocated_peak_bytes=torch.cuda.max_memory_allocated(self._device),
            reserved_peak_bytes=torch.cuda.max_memory_reserved(self._device),
        )

    def close(self) -> None:
        if self._loaded.cache is not None:
            self._loaded.cache.close()
        del self._loaded
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _bytes_of(state: Any) -> int:
    """Of all tensors that the layers of a transformers cache hold."""
    values = [value for layer in state.layers for value in vars(layer).values()]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
