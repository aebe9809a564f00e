"""The command lines that make the runs of a report again, from what each record says was asked for."""

import json
import shlex
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from evalsuite.core.protocol import PROTOCOLS, WindowProtocol
from evalsuite.core.record import PerplexityResult, QuantizeResult, Record
from evalsuite.core.spec import (
    CompareSpec,
    FootprintSpec,
    PerplexitySpec,
    QuantizeSpec,
    Serving,
    SpeedSpec,
    Workload,
)

PROGRAM = "hlwq-eval"
NO_GPU = "CUDA_VISIBLE_DEVICES="  # before a command: the CPU was asked for by name
UNTOUCHED: dict[str, str | int] = {
    "method": "hlwq", "format": "int4", "hlwq_bits": 5, "group_size": 128, "scale": "max",
    "codebook": "lloyd-max",
}  # fmt: skip
KINDS = ("quantize", "ppl", "compare", "speed", "footprint")


def commands(records: Sequence[Record]) -> list[str]:
    """One line a run, or for all cells of a sweep that one command spans; each once, in an order that works.

    Args:
        records: newest first.
    """
    oldest_first = list(reversed(records))
    folders = {
        str(record.spec["model"]).rstrip("/").rpartition("/")[2]: str(record.spec["model"])
        for record in oldest_first
        if "model" in record.spec
    }
    lines: list[list[str]] = []
    for kind in KINDS:
        mine = [record for record in oldest_first if record.kind == kind]
        if kind == "speed":
            lines += sweeps([SpeedSpec.model_validate(record.spec) for record in mine])
        elif kind == "quantize":  # into the folder that the others read
            for record in mine:
                *words, to = command(record)[:4]
                lines.append([*words, folders.get(to, to), *command(record)[4:]])
        else:
            lines += (command(record) for record in mine)
    return list(dict.fromkeys(map(shell_line, lines)))


def shell_line(words: Sequence[str]) -> str:
    """As it is typed."""
    return " ".join(word if word == NO_GPU else shlex.quote(word) for word in words)


def command(record: Record) -> list[str]:
    """The words of the command that makes one run again; a cell of a sweep as a sweep of its own."""
    if record.kind == "ppl":
        return _perplexity(PerplexitySpec.model_validate(record.spec), record)
    if record.kind == "compare":
        spec = CompareSpec.model_validate(record.spec)
        return [PROGRAM, "compare", spec.baseline, spec.candidate]
    if record.kind == "quantize":
        return _quantization(QuantizeSpec.model_validate(record.spec), record)
    if record.kind == "footprint":
        return _footprint(FootprintSpec.model_validate(record.spec))
    (words,) = sweeps([SpeedSpec.model_validate(record.spec)])
    return words


def sweeps(cells: Sequence[SpeedSpec]) -> Iterator[list[str]]:
    """Commands that span exactly these cells, as few as their axes allow."""
    alike: dict[str, list[SpeedSpec]] = {}
    for cell in cells:
        fixed = cell.model_copy(
            update={
                "serving": cell.serving.model_copy(
                    update={"moe_expert_cache_size": None, "enforce_eager": False}
                ),
                "workload": cell.workload.model_copy(update={"concurrency": 1}),
            }
        )
        alike.setdefault(fixed.model_dump_json(), []).append(cell)
    for group in alike.values():
        points = {_point(cell) for cell in group}
        axes = [list(dict.fromkeys(values)) for values in zip(*sorted(points, key=_order), strict=True)]
        if len(points) == len(set(product(*axes))):
            yield _sweep(group[0], axes)
        else:
            for point in sorted(points, key=_order):
                yield _sweep(group[0], [[value] for value in point])


Point = tuple[int | None, bool, int]


def _point(cell: SpeedSpec) -> Point:
    serving = cell.serving
    return serving.moe_expert_cache_size, serving.enforce_eager, cell.workload.concurrency


def _order(point: Point) -> tuple[float, bool, int]:
    size, eager, concurrency = point
    return (float("inf") if size is None else size), not eager, concurrency


def _sweep(cell: SpeedSpec, axes: Sequence[Sequence[Any]]) -> list[str]:
    sizes, eager, concurrencies = axes
    serving, workload = cell.serving, cell.workload
    words = [PROGRAM, "speed", cell.model]
    words += ["--cache-sizes", _listed("all" if size is None else size for size in sizes)]
    if serving.server_url is None:
        words += ["--modes", _listed("eager" if one else "graphs" for one in eager)]
    words += ["--concurrency", _listed(concurrencies)]
    words += ["--repeats", str(workload.repeats), "--warmup", str(workload.warmups)]
    words += _workload(workload) + _serving(serving)
    if serving.additional_config:
        words += ["--additional-config", json.dumps(serving.additional_config)]
    if serving.server_url is not None:
        words += ["--server-url", serving.server_url]
    return words + (["--seed", str(workload.seed)] if workload.seed else [])


def _footprint(spec: FootprintSpec) -> list[str]:
    serving, workload = spec.serving, spec.workload
    words = [PROGRAM, "footprint", spec.model, *_workload(workload), *_serving(serving)]
    words += ["--concurrency", str(workload.concurrency)] if workload.concurrency > 1 else []
    words += ["--idle", f"{spec.idle_s:g}"]
    words += ["--enforce-eager"] if serving.enforce_eager else []
    if serving.moe_expert_cache_size is not None:
        words += ["--moe-expert-cache-size", str(serving.moe_expert_cache_size)]
    return words


def _perplexity(spec: PerplexitySpec, record: Record) -> list[str]:
    words = [PROGRAM, "ppl", spec.model, "--corpus", spec.corpus, *_protocol(spec.protocol)]
    limit = spec.limit
    if limit is None and spec.corpus == "builtin" and isinstance(record.results, PerplexityResult):
        limit = record.results.windows  # the command would stop at the card's number
    words += _given("--limit", limit) + _given("--tokenizer", spec.tokenizer)
    words += ["--engine", spec.engine] if spec.engine != "auto" else []
    words += ["--dtype", spec.dtype] if spec.dtype != "auto" else []
    words += ["--batch-size", str(spec.batch_size)] if spec.batch_size != "auto" else []
    if spec.tensor_parallel_size > 1:
        words += ["--tensor-parallel-size", str(spec.tensor_parallel_size)]
    if spec.moe_expert_cache_size is not None:
        words += ["--moe-expert-cache-size", str(spec.moe_expert_cache_size)]
    words += _cache(spec.moe_expert_cache_policy, spec.moe_expert_store)
    words += _given("--gpu-memory-utilization", spec.gpu_memory_utilization)
    if spec.additional_config:
        words += ["--additional-config", json.dumps(spec.additional_config)]
    words += ["--keep-hidden"] if spec.keep_hidden else []
    words += ["--trust-remote-code"] if spec.trust_remote_code else []
    return _on_device(words, spec.device)


def _quantization(spec: QuantizeSpec, record: Record) -> list[str]:
    to = record.results.destination if isinstance(record.results, QuantizeResult) else "quantized"
    words = [PROGRAM, "quantize", spec.source, to]
    for name, value in UNTOUCHED.items():
        if spec.recipe.get(name, value) != value:
            words += [f"--{name.replace('_', '-')}", str(spec.recipe[name])]
    words += ["--no-hadamard"] if spec.recipe.get("hadamard") is False else []
    return _on_device(words, spec.device)


def _on_device(words: list[str], device: str) -> list[str]:
    place, _, index = device.partition(":")
    if place == "cpu":
        return [NO_GPU, *words]
    return [*words, "--gpus", index] if place == "cuda" else words


def _protocol(protocol: WindowProtocol) -> list[str]:
    """The preset, and what was overridden of it."""
    name = protocol.name.rstrip("*")
    words = ["--protocol", name]
    if protocol != PROTOCOLS.get(name):
        words += ["--context", str(protocol.context), "--stride", str(protocol.stride)]
    return words


def _workload(workload: Workload) -> list[str]:
    words = ["--corpus", workload.corpus, *_given("--tokenizer", workload.tokenizer)]
    words += ["--input-len", str(workload.input_len), "--output-len", str(workload.output_len)]
    return words + (["--timeout", f"{workload.timeout_s:g}"] if workload.timeout_s != 1800 else [])


def _serving(serving: Serving) -> list[str]:
    unset, words = Serving(), list[str]()
    for name in ("engine", "dtype", "load_format"):
        if getattr(serving, name) != getattr(unset, name):
            words += [f"--{name.replace('_', '-')}", str(getattr(serving, name))]
    words += ["--gpus", _listed(serving.gpus)] if serving.gpus else []
    if serving.tensor_parallel_size > 1:
        words += ["--tensor-parallel-size", str(serving.tensor_parallel_size)]
    words += _cache(serving.moe_expert_cache_policy, serving.moe_expert_store)
    words += ["--moe-routing", serving.moe_routing] if serving.moe_routing != "model" else []
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization"):
        words += _given(f"--{name.replace('_', '-')}", getattr(serving, name))
    return words + (["--trust-remote-code"] if serving.trust_remote_code else [])


def _cache(policy: str, store: str) -> list[str]:
    words = ["--moe-expert-cache-policy", policy] if policy != "lru" else []
    return words + (["--moe-expert-store", store] if store != "pinned" else [])


def _given(flag: str, value: object) -> list[str]:
    return [] if value is None else [flag, str(value)]


def _listed(values: Any) -> str:
    return ",".join(map(str, values))
