"""From a quantization's spec to a checkpoint and its record."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from evalsuite.core.record import QuantizeResult, Record, Status, status_of
from evalsuite.core.spec import QuantizeSpec, spec_hash
from evalsuite.data.models import Checkpoint, find_checkpoint
from evalsuite.engines.compute import out_of_memory
from evalsuite.engines.loading import require_gguf
from evalsuite.quant import pipeline
from evalsuite.quant.checkpoint import open_checkpoint
from evalsuite.quant.plan import Plan, plan_geometry, plan_shards
from evalsuite.quant.quality import QuantReport, merged
from evalsuite.quant.recipe import Recipe
from evalsuite.quant.rules import family
from evalsuite.run.record import new_record
from evalsuite.store.folder import RunFolder, storage_errors
from evalsuite.store.runs import RunStore
from evalsuite.telemetry.machine import package_version

TENSORS = "tensors.parquet"


class Progress(Protocol):
    """Whoever watches a quantization."""

    def phase(self, text: str) -> None:
        """A new stage begins."""
        ...

    def quantized(self, progress: pipeline.Progress) -> None:
        """A piece of a tensor is done."""
        ...


def run_quantize(
    spec: QuantizeSpec, destination: Path, store: RunStore, progress: Progress
) -> tuple[Path, Record]:
    """Quantize into the new folder `destination`, resuming an unfinished one of the same recipe and source.

    Returns:
        The folder of the record, and the record.

    Raises:
        EvalError: see core/errors.py; nothing is written before the request is known to make sense.
    """
    recipe = recipe_of(spec)
    progress.phase("finding the model")
    checkpoint = find_checkpoint(spec.source)
    identity = {
        "spec": spec.model_dump(mode="json"),
        "weights": checkpoint.fingerprint(),
        "torch": package_version("torch"),
    }
    folder: RunFolder | None = None

    def begin() -> RunFolder:
        """Not before the first piece is done: a request that is refused leaves no trace in the store."""
        nonlocal folder
        folder = folder or store.begin(spec.kind, checkpoint.slug, spec_hash(spec), identity, "auto")
        return folder

    def advanced(state: pipeline.Progress) -> None:
        begin()
        progress.quantized(state)

    try:
        with _safetensors(checkpoint, destination, progress) as source:
            progress.phase("quantizing")
            with out_of_memory("A piece of a tensor"):
                report = pipeline.quantize(
                    source, destination, recipe, device=spec.device, on_progress=advanced
                )
            plan = source_plan(Checkpoint(checkpoint.name, source), recipe, codes=True)
        written = Checkpoint(destination.name, destination)
        results = _result(report, checkpoint, identity["weights"], written, bits_per_weight(plan))
        _write_rows(begin(), report)
        record = _record(begin(), spec, "ok", (TENSORS,)).model_copy(
            update={"results": results, "warnings": tuple(_warnings(checkpoint, results))}
        )
        return begin().finish(record), record
    except BaseException as error:
        if folder is not None:
            folder.leave_unfinished(_record(folder, spec, status_of(error), ()), error)
        raise


def recipe_of(spec: QuantizeSpec) -> Recipe:
    """The recipe that a spec holds as plain values.

    Raises:
        UsageError: a value is out of range, or has no effect.
    """
    return Recipe(**spec.recipe)  # pyright: ignore[reportArgumentType]  (it checks every value itself)


@contextmanager
def _safetensors(checkpoint: Checkpoint, destination: Path, progress: Progress) -> Iterator[Path]:
    """The folder to read: the checkpoint's own, or for GGUF a BF16 copy for as long as it is needed."""
    if not checkpoint.gguf:
        yield checkpoint.folder
        return
    from evalsuite.engines.export import export_bf16

    copy = destination.absolute().with_name(destination.name + ".source")
    progress.phase(f"{checkpoint.name} is GGUF: writing a BF16 copy beside the destination for the while")
    with storage_errors(copy.parent):
        copy.parent.mkdir(parents=True, exist_ok=True)
        if copy.exists():
            shutil.rmtree(copy)
    try:
        export_bf16(checkpoint, copy)
        yield copy
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def source_plan(source: Checkpoint, recipe: Recipe, *, codes: bool) -> Plan:
    """What a recipe will write, from names and shapes alone.

    Args:
        codes: what the codes would take, also where the recipe stores them decoded.
    """
    if codes and recipe.format == "bf16":
        recipe = replace(recipe, format="hlwq" if recipe.method == "hlwq" else "int4")
    if source.gguf:
        config = _gguf_config(source)
        return plan_geometry(config, family(config.to_dict()), recipe)
    checkpoint = open_checkpoint(source.folder)
    return plan_shards(checkpoint.shards, family(checkpoint.config), recipe)


@lru_cache(maxsize=1)
def _gguf_config(source: Checkpoint) -> Any:
    from transformers import AutoConfig

    require_gguf()
    return AutoConfig.from_pretrained(str(source.folder), gguf_file=source.gguf)


def bits_per_weight(plan: Plan) -> float:
    """Stored bits over quantized weights, scales, norms and shapes included."""
    quantized = [tensor for tensor in plan.tensors if tensor.fate == "quantized"]
    stored = sum(output.bytes for tensor in quantized for output in tensor.outputs)
    return 8 * stored / sum(tensor.source.count for tensor in quantized)


def _result(
    report: QuantReport, source: Checkpoint, fingerprint: str, written: Checkpoint, code_bits: float
) -> QuantizeResult:
    total = report.quantized()
    in_layers = (row for row in report.rows if row.fate == "quantized" and row.layer is not None)
    return QuantizeResult(
        source=source.name,
        source_fingerprint=fingerprint,
        destination=written.name,
        fingerprint=written.fingerprint(),
        total=total,
        classes=report.by_class(),
        layers=merged(r.model_copy(update={"name": f"layer {r.layer}"}) for r in in_layers),
        unfit=report.unfit(),
        bytes_before=report.bytes_before,
        bytes_after=report.bytes_after,
        bits_per_weight=total.bits_per_weight,
        code_bits_per_weight=code_bits,
        compression_ratio=report.compression_ratio,
        device=report.device,
        quantize_s=report.seconds,
        bytes_read=report.bytes_read,
        bytes_per_s=report.bytes_read / report.seconds,
    )


def _warnings(source: Checkpoint, result: QuantizeResult) -> Iterator[str]:
    if source.gguf:
        yield "the source is GGUF, read as BF16: its own rounding is not part of the errors"
    if result.unfit:
        reason = ", ".join(sorted({part.reason for part in result.unfit}))
        names = ", ".join(part.name for part in result.unfit[:3])
        yield (
            f"{len(result.unfit)} tensors stay as they are, such as {names}: {reason}; "
            "a smaller --group-size may divide it"
        )


def _write_rows(folder: RunFolder, report: QuantReport) -> None:
    frame = pd.DataFrame([row.model_dump() for row in report.rows])
    frame["layer"] = frame["layer"].astype("Int64")
    with storage_errors(folder.path):
        frame.to_parquet(folder.path / TENSORS, index=False)


def _record(folder: RunFolder, spec: QuantizeSpec, status: Status, files: tuple[str, ...]) -> Record:
    return new_record(folder, spec, status).model_copy(update={"files": files})
