"""What a run measured, in words."""

from evalsuite.core.record import Record
from evalsuite.report.choose import device_of
from evalsuite.report.perplexity_runs import condition_of
from evalsuite.report.quantization import recipe_text
from evalsuite.report.vram import serving_of

STORES = {"pinned": "memory", "disk": "disk"}


def what(record: Record) -> str:
    """What a run measured, in a line."""
    if record.kind == "ppl":
        return condition_of(record) if record.status == "ok" else "perplexity"
    if record.kind in ("speed", "footprint"):
        serving = serving_of(record)
        cache, several = serving.moe_expert_cache_size, serving.tensor_parallel_size
        parts = [record.kind, str(record.engaged.get("mode", "eager" if serving.enforce_eager else "graphs"))]
        if cache is not None:
            parts.append(f"cache {cache} from {STORES[serving.moe_expert_store]}")
        parts += [f"tensor parallel {several}"] * (several > 1)
        return ", ".join((*parts, f"concurrency {record.spec['workload']['concurrency']}", device_of(record)))
    if record.kind == "quantize":
        return recipe_text(record.spec["recipe"])
    return "paired comparison"
