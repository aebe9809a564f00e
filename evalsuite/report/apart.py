"""Names of runs, told apart: where two share one, what varies between them is said behind it."""

from collections.abc import Callable, Sequence

from evalsuite.core.record import Record
from evalsuite.report.choose import device_of, engine_of, grouped, model_of

Trait = Callable[[Record], str]


def _dtype(record: Record) -> str:
    return record.model.dtype if record.model else ""


def _stored(record: Record) -> str:
    return record.model.stored if record.model else ""


def _experts(record: Record) -> str:
    size = record.spec.get("moe_expert_cache_size")
    return "all experts" if size is None else f"cache {size}"


def _asked(record: Record) -> str:
    """Checkpoints of one name lie in different places."""
    return str(record.spec.get("model", ""))


def _started(record: Record) -> str:
    return record.started.replace("T", " ").replace("+00:00", " UTC")


def _request(record: Record) -> str:
    return f"request {record.spec_hash}"


TRAITS: tuple[Trait, ...] = (engine_of, _dtype, _stored, _experts, device_of)
LAST: tuple[Trait, ...] = (_asked, _started, _request)  # where nothing else varies


def words_apart(records: Sequence[Record], name: Trait) -> dict[str, tuple[str, ...]]:
    """What is to be said behind each run's name, so that no two say the same; for most runs nothing.

    Returns:
        by run id.
    """
    return {run: words for group in grouped(records, name) for run, words in _apart(group).items()}


def _apart(group: Sequence[Record]) -> dict[str, tuple[str, ...]]:
    one_checkpoint = len({r.model.fingerprint if r.model else r.run_id for r in group}) == 1
    traits = [trait for trait in TRAITS if not (one_checkpoint and trait is _stored)]
    varying = [trait for trait in traits if len({trait(record) for record in group}) > 1]
    words = {record.run_id: tuple(trait(record) for trait in varying) for record in group}
    for trait in LAST:
        for alike in grouped(group, lambda record: words[record.run_id]):
            if len({trait(record) for record in alike}) > 1:
                words.update({r.run_id: (*words[r.run_id], trait(r)) for r in alike})
    return words


def names_apart(records: Sequence[Record], title: Trait = model_of) -> dict[str, str]:
    """Run id → the model as tables name it, such as ``demo``, or ``demo (vllm)`` beside ``demo (torch)``.

    Args:
        records: that stand beside each other.
        title: all that is said of a run; runs of which the same is said are told apart.
    """
    words = words_apart(records, title)
    return {
        record.run_id: model_of(record) + (f" ({', '.join(said)})" if (said := words[record.run_id]) else "")
        for record in records
    }


def checkpoint_names(records: Sequence[Record]) -> dict[str, str]:
    """Run id → the model as tables name it, and where it lies where several checkpoints have its name.

    For tables whose other columns say what else varies.
    """
    found: dict[str, str] = {}
    for alike in grouped(records, model_of):
        several = len({record.model.fingerprint if record.model else "" for record in alike}) > 1
        several = several and len(set(map(_asked, alike))) > 1
        found |= {r.run_id: f"{model_of(r)} ({_asked(r)})" if several else model_of(r) for r in alike}
    return found
