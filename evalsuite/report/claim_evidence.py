"""Claims held against records: which runs speak of the same thing, and what they found.

A run is evidence for a claim where it is of the same checkpoint and nothing that the claim states differs.
What a claim leaves open is open: of a claim without a mode, eager runs and CUDA-graph runs are both evidence.
Cards rarely define their speed or their VRAM, so every definition that a record has is compared, by name.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from evalsuite.core.record import PerplexityResult, Record
from evalsuite.core.speed import FootprintResult, SpeedResult
from evalsuite.data.models import slug
from evalsuite.report.choose import devices_of, environment_of
from evalsuite.report.claims import Claim, Subject

# what random weights of the same geometry can answer for; not the speed of an expert cache, whose hits are
# those of the experts that real weights choose
DUMMY_SERVES = frozenset({"speed", "vram", "expert_buffer"})
# what several devices together make another number, which no card means without saying so
OF_ONE_DEVICE = frozenset({"speed", "load", "vram", "host_ram"})
# conditions that pick a number inside a record, or that no record has
INSIDE = frozenset({"windows", "component", "phase", "hit_rate", "flag", "argument", "vllm"})


@dataclass(frozen=True)
class Evidence:
    """One number of one run, in the metric's base unit."""

    run_id: str
    quantity: str
    number: float
    dummy: bool


def is_dummy(record: Record) -> bool:
    serving: Any = record.spec.get("serving", {})
    return serving.get("load_format") == "dummy"


def is_of(record: Record, model: Subject) -> bool:
    """Whether the run is of this model, or of a stand-in with dummy weights."""
    if record.model is not None and record.model.fingerprint in model.fingerprints:
        return True
    called = {str(record.spec.get("model", "")), record.run_id.rpartition("/")[0]}
    if record.model is not None:
        called.add(record.model.name)
    names = model.names + (model.stand_ins if is_dummy(record) else ())
    return bool(called & {form for name in names for form in (name, slug(name))})


def conditions_of(record: Record) -> dict[str, Any]:
    """A record's conditions, spelled as a claim's; what it does not have is missing."""
    spec = record.spec
    serving: Any = spec.get("serving", spec)
    workload: Any = spec.get("workload", {})
    cache = serving.get("moe_expert_cache_size")
    found: dict[str, Any] = {
        "cache": "all" if cache is None else cache,
        "policy": None if cache is None else serving.get("moe_expert_cache_policy"),
        "dtype": None if record.model is None else record.model.dtype,
        "context": serving.get("max_model_len"),
        "concurrency": workload.get("concurrency"),
        "text": None if record.text is None else record.text.corpus,
        "gpu": " ".join(dict.fromkeys(gpu.name for gpu in record.machine.gpus)) or None,
    }
    if "enforce_eager" in serving:
        found["mode"] = "eager" if serving["enforce_eager"] else "graphs"
    return {key: value for key, value in found.items() if value is not None}


def differs(claim: Claim, record: Record) -> str | None:
    """The first condition that the claim states and the record contradicts, in words."""
    there = conditions_of(record)
    for key, stated in claim.stated().items():
        if key in INSIDE or (key not in there and key in ("context", "policy", "mode")):
            continue
        found = there.get(key)
        named = key == "gpu" and found is not None and _words(stated) <= _words(found)
        if found != stated and not named:
            return f"{key} {'unknown' if found is None else found}, not {stated}"
    if (devices := devices_of(record)) > 1 and claim.metric in OF_ONE_DEVICE:
        return f"over {devices} GPUs"
    variables = environment_of(record)
    return f"with {variables}" if variables else None


def _words(text: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", text.lower())) - {"", "nvidia", "geforce"}


def evidence(claim: Claim, runs: Sequence[Record]) -> tuple[list[Evidence], str]:
    """Numbers of comparable runs; and where there are none, why.

    Runs with real weights are evidence before runs with dummy weights.

    Args:
        runs: finished runs of the claim's model.
    """
    read = READERS.get(claim.metric)
    if claim.words is not None:
        return [], "there is no number to compare"
    if read is None:
        return [], f"it would take {claim.kind.how}"
    found: list[Evidence] = []
    reasons: list[str] = []
    for record in runs:
        dummy = is_dummy(record)
        if dummy and claim.metric not in DUMMY_SERVES:
            continue
        numbers = _picked(read(record), claim)
        if numbers and (difference := differs(claim, record)):
            reasons.append(difference)
        elif numbers and dummy and claim.metric == "speed" and claim.cache != "all":
            reasons.insert(0, "dummy weights, which choose other experts")  # all else is as claimed
        elif numbers:
            found += [Evidence(record.run_id, name, value, dummy) for name, value in numbers.items()]
    unstated = [key for key in claim.kind.decides if getattr(claim, key) is None]
    if found and unstated:
        return [], f"the card does not say which {' and '.join(unstated)}"
    real = [item for item in found if not item.dummy]
    if found:
        return real or found, ""
    if reasons:
        return [], f"measured under other conditions: {reasons[0]}"
    if unstated:
        return [], f"the card does not say which {' and '.join(unstated)}"
    return [], "no run of this model" if not runs else "no run of this model measured it"


def _picked(numbers: dict[str, float], claim: Claim) -> dict[str, float]:
    """Of a record's numbers the one that the claim's windows or component name."""
    name = claim.component
    if claim.metric in ("perplexity", "scored_tokens") and claim.windows is not None:
        name = f"{claim.windows:,} windows"
    return numbers if name is None else {key: value for key, value in numbers.items() if key == name}


def _speed(record: Record) -> dict[str, float]:
    if not isinstance(record.results, SpeedResult):
        return {}
    return {
        "end to end": record.results.output_tokens_per_s.mean,
        "decode": record.results.decode_tokens_per_s.mean,
    }


def _load(record: Record) -> dict[str, float]:
    if not isinstance(record.results, SpeedResult | FootprintResult):
        return {}
    total_s = record.results.load.total_s
    return {} if total_s is None else {"until ready": total_s}


def _vram(record: Record) -> dict[str, float]:
    memory = record.telemetry
    if memory is None or not isinstance(record.results, SpeedResult | FootprintResult):
        return {}
    engine = memory.engine
    numbers = {
        "weights": engine.weights_bytes if engine else None,
        "allocated peak": engine.allocated_peak_bytes if engine else memory.gpu_allocated_peak_bytes,
        "process peak": memory.gpu_process_peak_bytes,
    }
    return {name: float(value) for name, value in numbers.items() if value is not None}


def _expert_buffer(record: Record) -> dict[str, float]:
    cache = record.expert_cache
    if cache is None:
        return {}
    return {"slots": float(len(cache.layers) * min(cache.size, cache.experts) * cache.expert_bytes)}


def _overflow(record: Record) -> dict[str, float]:
    cache = record.expert_cache
    steps = 0 if cache is None else sum(layer.steps for layer in cache.layers)
    return {} if cache is None or not steps else {"overflow steps": cache.overflow_steps / steps}


def _perplexity(record: Record) -> dict[str, float]:
    return {f"{stop:,} windows": perplexity for stop, _, perplexity in _prefixes(record)}


def _scored_tokens(record: Record) -> dict[str, float]:
    return {f"{stop:,} windows": float(tokens) for stop, tokens, _ in _prefixes(record)}


def _windows(record: Record) -> dict[str, float]:
    result = record.results
    if not isinstance(result, PerplexityResult) or record.protocol is None:
        return {}
    return {record.protocol.name: float(result.windows_available)}


def _prefixes(record: Record) -> list[tuple[int, int, float]]:
    """Windows, scored tokens and perplexity of every prefix that was kept, the whole run included."""
    result = record.results
    if not isinstance(result, PerplexityResult):
        return []
    found = {p.stop: (p.stop, p.scored_tokens, p.perplexity) for p in result.prefixes}
    found[result.windows] = (result.windows, result.scored_tokens, result.perplexity)
    return list(found.values())


def _download(record: Record) -> dict[str, float]:
    return {} if record.model is None else {"weight files": float(record.model.stored_bytes)}


def _disk(record: Record) -> dict[str, float]:
    """A model's own files; what else lies in the hub cache is not its doing."""
    result = record.results
    if not isinstance(result, FootprintResult):
        return {}
    parts = {"hub cache": "checkpoint", "expert cache": "expert_files"}
    taken = {name: float(result.disk_bytes[key]) for name, key in parts.items() if key in result.disk_bytes}
    return taken | ({"peak": sum(taken.values())} if taken else {})


def _host_ram(record: Record) -> dict[str, float]:
    telemetry = record.telemetry
    if not isinstance(record.results, SpeedResult | FootprintResult):
        return {}
    if telemetry is None or telemetry.rss_peak_bytes is None:
        return {}
    return {"used": float(telemetry.rss_peak_bytes)}


READERS: dict[str, Callable[[Record], dict[str, float]]] = {
    "speed": _speed,
    "load": _load,
    "vram": _vram,
    "expert_buffer": _expert_buffer,
    "overflow": _overflow,
    "perplexity": _perplexity,
    "scored_tokens": _scored_tokens,
    "windows": _windows,
    "download": _download,
    "disk": _disk,
    "host_ram": _host_ram,
}
