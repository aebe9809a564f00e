"""The torch engine: transformers models scored window by window, on any CPU or GPU.

One forward pass of the decoder without a KV cache; the hidden states are cut to the scored positions before
the head, and the head runs in chunks (engines/head.py).
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evalsuite.core.cache import CacheCounters
from evalsuite.core.errors import MeasurementError
from evalsuite.core.telemetry import Telemetry
from evalsuite.data.models import Checkpoint
from evalsuite.data.windows import TokenWindow
from evalsuite.engines.base import WindowScore
from evalsuite.engines.compute import out_of_memory, resolve_compute
from evalsuite.engines.facts import read_facts
from evalsuite.engines.finite import refuse_non_finite
from evalsuite.engines.head import Head, divergence_of, nats_of
from evalsuite.engines.loading import load_model, quiet_transformers
from evalsuite.engines.torch_cache import Caching, cache_warnings, require_experts
from evalsuite.telemetry.gpu import neighbours, visible_gpus
from evalsuite.telemetry.probes import gpu_device_used_bytes, rss_peak_bytes

CPU_PASS_TOKENS = 3072  # a pass a core; larger ones only leave the core's caches
GPU_BATCH_TOKENS = 1 << 17  # a Hopper GPU gains nothing beyond
MEMORY_SHARE = 0.8  # of the free memory that a batch may take


class TorchScorer:
    """A `Scorer` over transformers. Greedy about nothing: it only reads log-probabilities."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "auto",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        keep_hidden: bool = False,
        caching: Caching | None = None,
    ) -> None:
        """Load the model.

        Args:
            caching: keep some of the experts on the device, and all of them in a store.

        Raises:
            ModelError, MissingDependency, OutOfMemory, StorageError: as `load_model`.
            UsageError: an expert cache for a model without experts.
            MeasurementError: the architecture's head is not a plain projection.
        """
        began = time.monotonic()
        self._device, self._dtype = resolve_compute(device, dtype)
        if self._device.type == "cuda":
            torch.cuda.init()  # its statistics do not exist before
            torch.cuda.reset_peak_memory_stats(self._device)
        if caching is not None:
            require_experts(checkpoint)
        loaded = load_model(
            checkpoint, self._device, self._dtype, trust_remote_code=trust_remote_code, caching=caching
        )
        self._model, self._cache = loaded.model, loaded.cache
        self._decoder = loaded.model.get_decoder()
        self._head = _head_of(loaded.model)
        self._keep_hidden = keep_hidden
        self._threads = torch_threads()
        # a cache serves one pass at a time, and its counts shall not depend on which of several came first
        passes = self._threads if caching is None else 1
        self._workers = _single_threaded_workers(passes) if self._device.type == "cpu" else None
        with quiet_transformers():  # notes about optional kernels come with the first pass
            self._check_head(checkpoint.name)
        self._empty_cache()
        warnings = cache_warnings(caching, self._model) if caching else ()
        self.facts = read_facts(checkpoint, loaded, self._device, self._dtype, engaged={}, warnings=warnings)
        self.load_s = time.monotonic() - began

    def _empty_cache(self) -> None:
        """Trial passes leave no trace in the slots or in their counts."""
        if self._cache is not None:
            self._cache.resize(self._cache.size)

    @torch.inference_mode()
    def _check_head(self, name: str) -> None:
        """Scaled, shared or multi-part heads would be scored wrongly in silence: compare with the model."""
        ids = torch.arange(min(16, self._head.vocabulary), device=self._device)[None]
        with out_of_memory(f"A first forward pass of {name}"):
            expected = self._model(ids, use_cache=False).logits[0].float().log_softmax(-1)
            hidden = self._decoder(ids, use_cache=False).last_hidden_state[0]
        logits = [self._head.logits(hidden, *chunk) for chunk in self._head.chunks(len(hidden))]
        found = torch.cat(logits, dim=1).log_softmax(-1)
        usable = expected.isfinite().all(-1)  # NaN weights are no fault of the head: scoring names the token
        if not usable.any():
            return
        found, expected = found[usable], expected[usable]
        allowed = 1e-3 + 8 * torch.finfo(self._dtype).eps * float(expected.abs().max())
        if not torch.allclose(found, expected, rtol=0, atol=allowed):
            raise MeasurementError(
                f"The head of {name} ({type(self._model).__name__}) is more than a projection of the last "
                "hidden state.",
                cause=f"log-probabilities differ by up to {float((found - expected).abs().max()):.3g} nats "
                "from the model's own.",
                todo="this architecture needs its own head in engines/head.py; please report it.",
            )

    def largest_batch(self, window: TokenWindow) -> int:
        """Windows a batch: what memory allows by two trial passes, and no more than saturates the device."""
        length = len(window.ids)
        if self._device.type == "cpu":
            return self._threads * max(1, CPU_PASS_TOKENS // length)
        most = max(1, GPU_BATCH_TOKENS // length)
        self.score([window])
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self.score([window])
        one = max(1, torch.cuda.max_memory_allocated(self._device) - before)
        free, _ = torch.cuda.mem_get_info(self._device)
        free += torch.cuda.memory_reserved(self._device) - before
        self._empty_cache()
        return int(min(most, max(1, MEMORY_SHARE * free // one)))

    def score(self, windows: Sequence[TokenWindow]) -> list[WindowScore]:
        with out_of_memory(f"A batch of {len(windows)} windows"):
            passes = list(self._passes(windows))
            if self._workers is None or len(passes) == 1:
                parts = map(self._score_equal, passes)
            else:
                parts = self._workers.map(self._score_equal, passes)
            return [score for part in parts for score in part]

    def _passes(self, windows: Sequence[TokenWindow]) -> Iterator[Sequence[TokenWindow]]:
        """Runs of windows of one length, so that nothing is padded; on a CPU, one run a thread."""
        for length, group in groupby(windows, key=lambda w: len(w.ids)):
            run = list(group)
            size = len(run)
            if self._device.type == "cpu":
                size = min(max(1, CPU_PASS_TOKENS // length), -(-size // self._threads))
            yield from (run[start : start + size] for start in range(0, len(run), size))

    @torch.inference_mode()
    def _score_equal(self, windows: Sequence[TokenWindow]) -> list[WindowScore]:
        """One forward pass over windows of one length."""
        ids = torch.from_numpy(np.stack([w.ids for w in windows])).to(self._device)
        states = self._decoder(ids, use_cache=False).last_hidden_state
        # the state at position i predicts token i + 1
        hidden = torch.cat([states[row, w.offset - 1 : -1] for row, w in enumerate(windows)])
        targets = torch.cat([ids[row, w.offset :] for row, w in enumerate(windows)])
        del states
        nats = nats_of(hidden, targets, self._head).cpu().double().numpy()
        kept = hidden.to(torch.bfloat16).cpu().view(torch.uint16).numpy() if self._keep_hidden else None
        scores: list[WindowScore] = []
        end = 0
        for w in windows:
            begin, end = end, end + w.scored
            refuse_non_finite(nats[begin:end], w)
            scores.append(WindowScore(w.index, nats[begin:end], None if kept is None else kept[begin:end]))
        return scores

    def save_head(self, path: Path) -> None:
        self._head.save(path)

    def expert_cache(self) -> CacheCounters | None:
        return None if self._cache is None else self._cache.counters()

    def memory(self) -> Telemetry:
        if self._device.type == "cpu":
            reason = "scored on the CPU"
            return Telemetry(rss_peak_bytes=rss_peak_bytes(), absent={"gpu": reason})
        gpus = visible_gpus((self._device.index or 0,), 1)
        return Telemetry(
            rss_peak_bytes=rss_peak_bytes(),
            gpu_allocated_peak_bytes=torch.cuda.max_memory_allocated(self._device),
            gpu_reserved_peak_bytes=torch.cuda.max_memory_reserved(self._device),
            gpu_device_used_bytes=gpu_device_used_bytes(gpus[0]),
            neighbours=neighbours(gpus),
        )

    def close(self) -> None:
        if self._workers is not None:
            self._workers.shutdown(cancel_futures=True)
        if self._cache is not None:
            self._cache.close()
        del self._model, self._decoder, self._head
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def torch_threads() -> int:
    """Threads that torch uses on the CPU; rounding depends on how a batch is shared among them."""
    return torch.get_num_threads()


def _single_threaded_workers(count: int) -> ThreadPoolExecutor:
    """Passes side by side, each on one core.

    Splitting every operation over all cores instead makes them wait for one another thousands of times a
    pass: slower on an idle machine, and many times slower where anything else wants a core.
    """
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


def _head_of(model: Any) -> Head:
    projection = model.get_output_embeddings()
    if projection is None:
        raise MeasurementError(f"{type(model).__name__} has no output head.", todo="give a language model.")
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return Head(projection.weight, getattr(projection, "bias", None), softcap)


def divergences(
    baseline: Path, candidate: Path, device: str = "auto", rows: int = 4096
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.bool_]]]:
    """KL divergence in nats and top-1 agreement of two finished runs that kept their hidden states.

    Args:
        baseline, candidate: run folders with ``hidden.npy`` and ``head.safetensors``.

    Returns:
        float64 [tokens] and bool [tokens], in text order.
    """
    place, _ = resolve_compute(device, "float32")
    heads = [Head.load(folder / "head.safetensors", str(place)) for folder in (baseline, candidate)]
    states = [np.load(folder / "hidden.npy", mmap_mode="r") for folder in (baseline, candidate)]

    def rows_of(which: int, start: int) -> torch.Tensor:
        block = torch.from_numpy(np.array(states[which][start : start + rows]))
        return block.view(torch.bfloat16).to(place)

    parts = [
        divergence_of((rows_of(0, i), heads[0]), (rows_of(1, i), heads[1]))
        for i in range(0, len(states[0]), rows)
    ]
    kl = torch.cat([part[0] for part in parts]).cpu().double().numpy()
    return kl, torch.cat([part[1] for part in parts]).cpu().numpy()
