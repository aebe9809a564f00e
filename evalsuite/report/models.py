"""The models of a report: what they are, what their configuration says, and how they were served."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from evalsuite.core.record import Record
from evalsuite.core.spec import Serving
from evalsuite.core.units import byte_unit
from evalsuite.report.apart import checkpoint_names
from evalsuite.report.choose import device_of, environment_of, model_of
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table
from evalsuite.report.varying import settle

ARCHITECTURE = (
    ("layers", "num_hidden_layers"),
    ("hidden size", "hidden_size"),
    ("experts a layer", "num_experts"),
    ("experts a token", "num_experts_per_tok"),
    ("expert width", "moe_intermediate_size"),
    ("shared expert", "shared_expert_intermediate_size"),
    ("MLP width", "intermediate_size"),
    ("heads", "num_attention_heads"),
    ("KV heads", "num_key_value_heads"),
    ("head size", "head_dim"),
    ("vocabulary", "vocab_size"),
    ("longest context", "max_position_embeddings"),
)
KINDS = {"full_attention": "full", "linear_attention": "linear", "sliding_attention": "sliding"}
# what an engine says was on, in the order of the table; the rest lies in the records
ENGAGED = (
    "mode", "quantization", "attention", "log_kernels", "cudagraph_mode", "language_model_only",
    "gdn_prefill_backend", "max_model_len", "tensor_parallel_size", "experts", "expert_store",
)  # fmt: skip


def models_table(records: Sequence[Record]) -> Table[Record]:
    """One row a checkpoint: architecture, size, and how it is stored.

    Args:
        records: of runs that loaded a model, one for each checkpoint.
    """
    unit, size = byte_unit(max(r.model.stored_bytes for r in records if r.model))
    names = checkpoint_names(records)
    labels, shared = settle(
        (
            Column[Record]("model", lambda r: names[r.run_id], label=True),
            Column[Record]("architecture", lambda r: r.model.architecture if r.model else "", label=True),
            Column[Record]("stored as", lambda r: r.model.stored if r.model else "", label=True),
        ),
        records,
    )
    return Table(
        "Models",
        [
            *labels,
            Column[Record]("parameters", lambda r: _millions(r.model.parameters) if r.model else "", "M"),
            Column[Record]("on disk", _disk(size), unit, "lower"),
            Column[Record]("vocabulary", lambda r: f"{r.model.vocabulary:,}" if r.model else ""),
            Column[Record]("longest context", _context),
            Column[Record]("fingerprint", lambda r: r.model.fingerprint[:12] if r.model else "", label=True),
        ],
        records,
        f"Parameters are counted in the loaded model; on disk are the weight files. The "
        f"fingerprint is that of configuration and weight files. {shared}",
        lambda r: (r.run_id,),
    )


@dataclass(frozen=True)
class Configured:
    """A model's configuration, as far as it lies on this machine; its runs."""

    name: str
    config: Mapping[str, Any]

    @property
    def text(self) -> Mapping[str, Any]:
        return self.config.get("text_config") or self.config

    @property
    def quantization(self) -> Mapping[str, Any]:
        return self.config.get("quantization_config") or self.text.get("quantization_config") or {}


def architecture_table(models: Sequence[Configured]) -> Table[Configured]:
    """What config.json says of each model."""

    def number(key: str) -> Column[Configured]:
        title = next(title for title, name in ARCHITECTURE if name == key)
        return Column[Configured](title, lambda m: _number(m.text.get(key)))

    columns = [number(key) for _, key in ARCHITECTURE]
    shown = [column for column in columns if any(column.get(m) != NOT_MEASURED for m in models)]
    return Table(
        "Architecture",
        [
            Column[Configured]("model", lambda m: m.name, label=True),
            *shown[:1],
            Column[Configured]("attention", _attention, label=True),
            *shown[1:],
            Column[Configured]("quantized", _quantized, label=True),
        ],
        models,
        "From each model's config.json, which states it; nothing here was measured.",
    )


def flags_table(records: Sequence[Record]) -> Table[Record]:
    """What each way of serving was asked for, and what the engine says was on.

    Args:
        records: speed and footprint runs, one for each model, engine, serving and outcome.
    """
    names = checkpoint_names(records)
    return Table(
        "Arguments as probed",
        [
            Column[Record]("model", lambda r: names[r.run_id], label=True),
            Column[Record]("engine", _engine, label=True),
            Column[Record]("asked for", lambda r: " ".join(_asked(r)) or "nothing", prose=3, label=True),
            Column[Record]("was on", lambda r: _engaged(r.engaged) or NOT_MEASURED, prose=3),
            Column[Record]("ended", lambda r: r.status),
            Column[Record]("on", device_of, label=True),
        ],
        records,
        "Asked for: arguments that differ from the defaults, spelled as vLLM spells them where it has them. "
        "Was on: as the engine itself reported it, which for a flag without effect is nothing.",
        lambda r: (r.run_id,),
    )


def serving_key(record: Record) -> tuple[str, ...]:
    """Equal for runs that one row of `flags_table` stands for."""
    return model_of(record), _engine(record), " ".join(_asked(record)), record.status, device_of(record)


def _asked(record: Record) -> list[str]:
    """The serving's arguments that are not at their defaults, and what the environment adds."""
    serving = Serving.model_validate(record.spec["serving"])
    words: list[str] = []
    for name, field in Serving.model_fields.items():
        value = getattr(serving, name)
        if name in ("engine", "gpus") or value == field.get_default(call_default_factory=True):
            continue
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        else:
            words.append(f"{flag} {json.dumps(value) if isinstance(value, dict) else value}")
    return [*words, *filter(None, [environment_of(record)])]


def _engine(record: Record) -> str:
    asked = Serving.model_validate(record.spec["serving"]).engine
    name = str(record.engaged.get("engine", "vllm" if "vllm" in record.engaged else asked))
    version = record.machine.packages.get({"server": "vllm"}.get(name, name))
    return f"{name} {version}" if version else name


def _engaged(engaged: Mapping[str, Any]) -> str:
    said: list[str] = []
    for key in ENGAGED:
        value = engaged.get(key)
        if isinstance(value, dict):
            value = ", ".join(cast("dict[str, Any]", value))
        elif isinstance(value, list):
            value = ", ".join(map(str, cast("list[Any]", value)))
        if value not in (None, "", "NONE"):
            said.append(f"{key.replace('_', ' ')}: {value}")
    return "; ".join(said)


def _attention(model: Configured) -> str:
    kinds = model.text.get("layer_types")
    if not kinds:
        return "full in every layer"
    counts = Counter(str(kind) for kind in kinds)
    return ", ".join(f"{count} {KINDS.get(kind, kind)}" for kind, count in counts.most_common())


def _quantized(model: Configured) -> str:
    found = model.quantization
    by_name: dict[str, dict[str, Any]] = found.get("config_groups") or {}
    groups = list(by_name.values())
    weights = groups[0].get("weights") if len(groups) == 1 else None
    if weights:
        return f"{weights.get('num_bits')} bits, group {weights.get('group_size')}"
    return str(found.get("quant_method", "no"))


def _number(value: Any) -> Cell:
    return Cell(f"{value:,}" if isinstance(value, int) else str(value)) if value else NOT_MEASURED


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}" if count < 1e10 else f"{count / 1e6:,.0f}"


def _disk(size: float) -> Callable[[Record], Cell]:
    def get(record: Record) -> Cell:
        stored = record.model.stored_bytes if record.model else 0
        return Cell(f"{stored / size:.3g}") if stored else NOT_MEASURED

    return get


def _context(record: Record) -> Cell:
    return _number(record.model.max_context if record.model else None)
