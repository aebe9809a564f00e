"""How to serve a measured model with vLLM: flags that were looked up, not remembered."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from evalsuite.core.errors import EvalError, MissingDependency
from evalsuite.core.record import Record
from evalsuite.core.spec import FootprintSpec, Serving, SpeedSpec
from evalsuite.data.models import DEMO, SMOLLM2, Checkpoint, find_checkpoint
from evalsuite.engines.vllm_arguments import engine_arguments, engine_fields, require_vllm
from evalsuite.engines.vllm_server import server_flags

BUILT_IN = (DEMO, SMOLLM2)  # names that are neither a hub id nor a folder
# that the suite sets to measure, and nobody else needs
FOR_MEASURING = ("skip_tokenizer_init", "seed", "enable_prefix_caching", "worker_extension_cls")


@dataclass(frozen=True)
class QuickStart:
    """Commands, and what is known of them.

    Attributes:
        statement: on which vLLM the flags were probed, or why they were not.
    """

    commands: tuple[str, ...]
    statement: str


def quick_start(records: Sequence[Record]) -> QuickStart | None:
    """Commands for the newest way in which a model was served, and for an expert cache if one was measured.

    Args:
        records: of one model, newest first.

    Returns:
        None where there is nothing to serve: the weights are random, or the model is one that comes with
        this suite, whose name vLLM does not know.
    """
    served = [found for record in records if (found := _serving(record)) is not None]
    real = [(name, serving) for name, serving in served if serving.load_format != "dummy"]
    if served and not real:
        return None
    name = real[0][0] if real else next((str(r.spec["model"]) for r in records if "model" in r.spec), "")
    if not name or name in BUILT_IN:
        return None
    plain = next((serving for _, serving in real if serving.moe_expert_cache_size is None), Serving())
    cached = next((serving for _, serving in real if serving.moe_expert_cache_size is not None), None)
    servings = [plain] if cached is None else [plain, cached]
    try:
        version, known = require_vllm(), engine_fields()
    except MissingDependency as error:
        lines = tuple(_line(name, _asked(serving)) for serving in servings)
        return QuickStart(lines, f"The flags were not probed: {error.what}")
    try:
        checkpoint = replace(find_checkpoint(name, download=False), name=name)
        flags = [_probed(checkpoint, serving) for serving in servings]
        knows = "every flag is one that it has" if any(flags) else "it needs no flag"
        said = f"Probed on vLLM {version}: {knows}."
    except EvalError as error:
        flags = [_asked(serving) for serving in servings]
        asked = {flag for one in flags for flag in one if flag.startswith("--")}
        unknown = sorted(asked - _names(known))
        said = f"vLLM {version} was not asked to serve it here: {error.what}"
        if asked:
            said += f" It does not know {', '.join(unknown)}." if unknown else " It knows every flag."
    if not any(record.engaged.get("engine") in ("vllm", "server") for record in records):
        said += " No run here served it with vLLM."
    if cached is not None:
        said += " The expert cache comes with hlwq-eval, whose plugin vLLM loads by itself."
    return QuickStart(tuple(_line(name, one) for one in flags), said)


def _serving(record: Record) -> tuple[str, Serving] | None:
    if record.status != "ok" or record.kind not in ("speed", "footprint"):
        return None
    kind = SpeedSpec if record.kind == "speed" else FootprintSpec
    spec = kind.model_validate(record.spec)
    if spec.serving.server_url is not None:
        return None
    # modes are compared in the tables; what is served needs no eager mode, and any GPUs
    return spec.model, spec.serving.model_copy(update={"gpus": (), "enforce_eager": False})


def _probed(checkpoint: Checkpoint, serving: Serving) -> list[str]:
    arguments = engine_arguments(checkpoint, serving)
    kept = {name: value for name, value in arguments.items() if name not in FOR_MEASURING}
    for name, value in (("dtype", "auto"), ("tensor_parallel_size", 1), ("trust_remote_code", False)):
        if kept.get(name) == value:
            del kept[name]
    return server_flags(kept)[1:]  # the model's folder comes first


def _asked(serving: Serving) -> list[str]:
    """What was asked of vLLM where nobody can ask it again."""
    arguments: dict[str, object] = {"model": ""}
    unset = Serving()
    for name in (
        "dtype", "tensor_parallel_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
        "gpu_memory_utilization", "additional_config", "trust_remote_code", "moe_expert_cache_size",
    ):  # fmt: skip
        if (value := getattr(serving, name)) != getattr(unset, name):
            arguments[name] = value
    return server_flags(arguments)[1:]


def _names(fields: frozenset[str]) -> set[str]:
    """Flags of the fields, and the one that this package's plugin adds."""
    return {f"--{name.replace('_', '-')}" for name in (*fields, "moe_expert_cache_size")}


def _line(name: str, flags: Sequence[str]) -> str:
    return shlex.join(["vllm", "serve", name, *flags])
