"""From a sweep's records to the rows of its table: verdicts, and tokens held against the uncached arm."""

from collections.abc import Hashable, Sequence
from dataclasses import replace

from evalsuite.core.agreement import token_agreement
from evalsuite.core.errors import NotComparable, StorageError
from evalsuite.core.roofline import verdict
from evalsuite.core.spec import SpeedSpec
from evalsuite.core.speed import SpeedResult
from evalsuite.report.choose import device_of
from evalsuite.report.speed_cell import Row, mode_pairs
from evalsuite.store.runs import RunStore, StoredRun, load_record, load_tokens


def speed_rows(finished: Sequence[StoredRun], unread: list[str] | None = None) -> list[Row]:
    """A row for every cell that succeeded, in the order given.

    Args:
        unread: takes a sentence for each cell whose tokens cannot be compared; without it that is an error.

    Raises:
        StorageError: tokens are missing or damaged.
        NotComparable: two cells of one workload hold different requests.
    """
    measured = [one for one in finished if one.record.status == "ok"]
    rows = [Row(one.record) for one in measured]
    ratios = {
        eager.record.run_id: graphs.result.decode_tokens_per_s.mean / eager.result.decode_tokens_per_s.mean
        for eager, graphs in mode_pairs(rows)
    }
    return [
        _with_agreement(
            replace(row, verdict=_verdict(row.result, ratios.get(row.record.run_id))), one, measured, unread
        )
        for row, one in zip(rows, measured, strict=True)
    ]


def rows_of_other_devices(store: RunStore, rows: Sequence[Row]) -> list[Row]:
    """The newest of the quietest finished runs of the same cells on other devices, whatever their index."""
    wanted = {_without_gpus(row.spec) for row in rows}
    there = {(_without_gpus(row.spec), row.device) for row in rows}
    found: dict[Hashable, Row] = {}
    for slug in dict.fromkeys(row.record.run_id.partition("/")[0] for row in rows):
        for path in store.finished("speed", slug):
            row = Row(load_record(path))
            if row.record.status != "ok":
                continue
            key = _without_gpus(row.spec), row.device
            if key[0] in wanted and key not in there:
                quieter = key in found and row.record.beside < found[key].record.beside
                found[key] = row if quieter else found.get(key, row)
    return list(found.values())


def _verdict(result: SpeedResult, graphs_over_eager: float | None) -> str:
    if result.bound is None:
        return f"no bound: {result.bound_absent}"
    return verdict(result.bound, graphs_over_eager)


def _with_agreement(row: Row, one: StoredRun, measured: Sequence[StoredRun], unread: list[str] | None) -> Row:
    reference = _reference(one, measured)
    if reference is None or row.spec.serving.moe_routing != "model":  # what is drawn at random differs anyway
        return row
    if reference is one:
        return replace(row, is_reference=True)
    try:
        found = token_agreement(load_tokens(reference.path), load_tokens(one.path))
    except (StorageError, NotComparable) as error:
        if unread is None:
            raise
        unread.append(f"no tokens compared for {one.record.run_id}: {error.what}")
        return row
    return replace(row, agreement=found.share)


def _reference(one: StoredRun, measured: Sequence[StoredRun]) -> StoredRun | None:
    """The uncached cell of the same model and workload: eager and on the same device, if there is one."""
    mine = SpeedSpec.model_validate(one.record.spec)

    def distance(other: StoredRun) -> tuple[bool, bool, bool, bool]:
        theirs = SpeedSpec.model_validate(other.record.spec).serving
        return (
            device_of(other.record) != device_of(one.record),
            not theirs.enforce_eager,
            theirs.tensor_parallel_size != 1,
            theirs.gpus != mine.serving.gpus,
        )

    candidates = [
        other
        for other in measured
        if (theirs := SpeedSpec.model_validate(other.record.spec)).model == mine.model
        and theirs.workload == mine.workload
        and theirs.serving.moe_expert_cache_size is None
    ]
    return min(candidates, key=distance, default=None)


def _without_gpus(spec: SpeedSpec) -> str:
    serving = spec.serving.model_copy(update={"gpus": ()})
    return spec.model_copy(update={"serving": serving}).model_dump_json()
