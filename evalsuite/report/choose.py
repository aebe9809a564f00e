"""Which runs may stand beside each other, which stands for several of one kind, and what is whose baseline.

Perplexities stand in one table where text, tokenizer, protocol and windows are the same: a condition. Speeds
are compared between models where the workload, the serving, the device, its driver and the libraries that run
there are the same. Of several runs that agree in all of this and in the model, the newest stands for them;
they are never averaged.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from evalsuite.core.record import CompareResult, PerplexityResult, QuantizeResult, Record
from evalsuite.core.spec import canonical_json
from evalsuite.store.runs import StoredRun

LIBRARIES = ("torch", "vllm", "transformers", "triton")  # whose version can change a speed
PLAIN = re.compile(r"\b(BF16|FP16|F16|FP32|F32)\b")

Item = TypeVar("Item")


def perplexity_condition(record: Record) -> Hashable:
    """Equal for runs whose perplexities may be compared."""
    assert record.text is not None
    assert record.protocol is not None
    assert isinstance(record.results, PerplexityResult)
    protocol = canonical_json(record.protocol.model_dump(mode="json", exclude={"name"}))
    return record.text.sha256, record.text.tokenizer_sha256, protocol, record.results.windows


def scored_alike(record: Record) -> Hashable:
    """Equal for runs that scored the same weights in the same way, wherever these lie."""
    assert record.model is not None
    spec = record.spec
    cache = {key: value for key, value in spec.items() if key.startswith("moe_")}
    return (
        perplexity_condition(record), record.model.fingerprint, record.model.dtype, engine_of(record),
        cache.get("moe_expert_cache_size") and canonical_json(cache), spec.get("tensor_parallel_size", 1),
        canonical_json(spec.get("additional_config", {})), device_of(record), environment_of(record),
    )  # fmt: skip


def speed_condition(record: Record) -> Hashable:
    """Equal for runs whose speeds may be compared between models; of footprints likewise.

    Where the prompts' text comes from is part of the workload; which tokenizer cuts it is the model's.
    """
    spec: Any = {key: value for key, value in record.spec.items() if key != "model"}
    serving = {key: value for key, value in spec["serving"].items() if key != "gpus"}
    packages = {name: record.machine.packages.get(name) for name in LIBRARIES}
    return (
        canonical_json(spec | {"serving": serving}),
        device_of(record),
        record.machine.gpu_driver,
        environment_of(record),
        record.beside > 0,
        canonical_json(packages),
    )


def bears_witness(record: Record) -> bool:
    """Whether a claim may be checked by a run: it succeeded, and had its GPU to itself where that matters."""
    disturbed = record.kind in ("speed", "footprint") and record.telemetry and record.telemetry.neighbours
    return record.status == "ok" and not disturbed


def device_of(record: Record) -> str:
    """The device as its driver names it; of a run that failed early, the one that it was to run on."""
    if record.model is not None:
        return record.model.device_name
    gpus, serving = record.machine.gpus, cast("dict[str, Any]", record.spec.get("serving", {}))
    chosen: Sequence[int] = serving.get("gpus", ())
    if chosen and max(chosen) < len(gpus):
        return gpus[chosen[0]].name
    return gpus[0].name if gpus else record.machine.cpu


def model_of(record: Record) -> str:
    """The model as tables name it."""
    name = record.model.name if record.model else record.run_id.partition("/")[0]
    serving: Any = record.spec.get("serving", {})
    return f"{name} (dummy weights)" if serving.get("load_format") == "dummy" else name


def engine_of(record: Record) -> str:
    """The engine that computed; records from before there were several name none, and are torch's."""
    engaged = (record.model.engaged if record.model else {}) | record.engaged
    return str(engaged.get("engine", "vllm" if "vllm" in engaged else "torch"))


def environment_of(record: Record) -> str:
    """What the user told libraries through variables that this run can feel, ``NAME=value`` each."""
    variables = record.machine.variables(devices_of(record))
    return " ".join(f"{name}={value}" for name, value in sorted(variables.items()))


def devices_of(record: Record) -> int:
    """How many devices computed together."""
    spec = cast("dict[str, Any]", record.spec.get("serving", record.spec))
    return int(spec.get("tensor_parallel_size", 1))


def newest(runs: Iterable[StoredRun]) -> list[StoredRun]:
    """Of the runs of one spec on one kind of device, the newest; one that succeeded before one that did not.

    One that shared its GPU stands between them, and after it one that had other GPUs at work beside its own.
    Of perplexities that were scored alike, the newest too, though their specs say it in other words.

    Args:
        runs: newest first.
    """
    runs = list(runs)
    found: dict[Hashable, StoredRun] = {}
    for run in runs:
        record = run.record
        key = (record.kind, record.spec_hash, device_of(record), environment_of(record))
        if key not in found or _rank(record) > _rank(found[key].record):
            found[key] = run
    best = {run.record.run_id for run in found.values()}
    kept: dict[Hashable, StoredRun] = {}
    for run in runs:
        if run.record.run_id in best:
            kept.setdefault(scored_alike(run.record) if _is_scored(run.record) else run.record.run_id, run)
    return list(kept.values())


def _rank(record: Record) -> int:
    return (record.status == "ok") + bears_witness(record) + (bears_witness(record) and not record.beside)


def stand_ins(runs: Sequence[StoredRun], chosen: Sequence[StoredRun]) -> dict[str, str]:
    """The perplexity run that was chosen for another that was scored alike, by the other's run id.

    Args:
        chosen: the `newest` of the runs.
    """
    kept = {scored_alike(r.record): r.record.run_id for r in chosen if _is_scored(r.record)}
    scored = [run.record for run in runs if _is_scored(run.record)]
    return {record.run_id: kept.get(scored_alike(record), record.run_id) for record in scored}


def _is_scored(record: Record) -> bool:
    return isinstance(record.results, PerplexityResult) and record.status == "ok" and record.model is not None


def grouped(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Items of equal key together, larger groups first, else in the order of their first."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return sorted(groups.values(), key=len, reverse=True)


def compared_runs(result: CompareResult, stands_for: Mapping[str, str]) -> tuple[str, str]:
    """Candidate and baseline of a comparison, by the runs that stand for them unless one stands for both."""
    candidate, baseline = result.candidate_run, result.baseline_run
    pair = stands_for.get(candidate, candidate), stands_for.get(baseline, baseline)
    return (candidate, baseline) if pair[0] == pair[1] else pair


def through_two_engines(pair: tuple[str, str], records: Sequence[Record]) -> bool:
    """Whether two runs, by their ids, are of one checkpoint and differ in what computed it."""
    found = [record for record in records if record.run_id in pair and record.model is not None]
    weights = {record.model.fingerprint for record in found if record.model}
    return len(found) == 2 and len(weights) == 1 and engine_of(found[0]) != engine_of(found[1])


class Lineage:
    """Which run a run is measured against: the unquantized model's, under the same condition.

    A run's baseline is the one that a recorded comparison names, unless only the engine differs; else the
    source that a recorded quantization names; else the only plain 16- or 32-bit model of the same
    architecture and parameters that no quantization made. Of several runs of it, one through the same engine.
    """

    def __init__(self, records: Sequence[Record], stands_for: Mapping[str, str] | None = None) -> None:
        """Args: stands_for: of runs that are not among the records, those that are; see `stand_ins`."""
        self._named: dict[str, str] = {}
        self._source: dict[str, str] = {}
        for record in records:
            if isinstance(record.results, CompareResult):
                pair = compared_runs(record.results, stands_for or {})
                if not through_two_engines(pair, records):
                    self._named.setdefault(*pair)
            elif isinstance(record.results, QuantizeResult):
                self._source.setdefault(record.results.fingerprint, record.results.source_fingerprint)

    def baseline(self, record: Record, peers: Sequence[Record]) -> Record | None:
        """The run among `peers`, which share its condition, that this one is held against; None for none."""
        others = [peer for peer in peers if peer.run_id != record.run_id and peer.model is not None]
        others.sort(key=lambda peer: engine_of(peer) != engine_of(record))
        model = record.model
        if model is None:
            return None
        named = self._named.get(record.run_id)
        if found := [peer for peer in others if peer.run_id == named]:
            return found[0]
        source = self._source.get(model.fingerprint)
        if source is not None:
            return next((p for p in others if p.model and p.model.fingerprint == source), None)
        if PLAIN.search(model.stored):
            return None
        plain = [
            p for p in others
            if p.model and p.model.fingerprint not in self._source and PLAIN.search(p.model.stored)
            and (p.model.architecture, p.model.parameters) == (model.architecture, model.parameters)
        ]  # fmt: skip
        return plain[0] if len({p.model.fingerprint for p in plain if p.model}) == 1 else None
