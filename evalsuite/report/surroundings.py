"""What else differs between two sides than what was asked for: weights, machines and the libraries on them.

A difference of two folders may be due to it as well as to the change that is looked for; so it is named.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from evalsuite.core.record import Record
from evalsuite.report.choose import devices_of, model_of


@dataclass(frozen=True)
class Surrounding:
    """A driver, library, part of a machine or a model's weights: others in some pairs, and in how many."""

    name: str
    old: str
    new: str
    pairs: int


def surroundings(pairs: Iterable[tuple[Record, Record]]) -> list[Surrounding]:
    """Everything that differs in any of these pairs, old before new, in the order in which it is met."""
    found: dict[tuple[str, str, str], int] = {}
    for old, new in pairs:
        before, after = _facts(old), _facts(new)
        for name in before | after:
            values = before.get(name, "absent"), after.get(name, "absent")
            if values[0] != values[1]:
                found[name, *values] = found.get((name, *values), 0) + 1
    return [Surrounding(*what, count) for what, count in found.items()]


def sentence(found: Iterable[Surrounding], pairs: int) -> str:
    """All of them in a line; how many of the `pairs` each is in, where it is not in all."""
    parts = [
        f"{one.name} {one.old} → {one.new}"
        + (f" ({one.pairs} of {pairs} pairs)" if one.pairs < pairs else "")
        for one in found
    ]
    return f"Different on the new side, besides what is compared: {'; '.join(parts)}." if parts else ""


def _facts(record: Record) -> dict[str, str]:
    machine, model = record.machine, record.model
    facts = {
        "device": model.device_name if model else None,
        f"weights of {model_of(record)}": model.fingerprint[:12] if model else None,
        "GPUs": " + ".join(gpu.name for gpu in machine.gpus) or None,
        "driver": machine.gpu_driver,
        "CUDA": machine.cuda,
        "CPU": machine.cpu,
        "CPU cores": str(machine.cpu_cores),
        "RAM": f"{machine.ram_bytes / 1e9:.0f} GB",
        "platform": machine.platform,
        "Python": machine.python,
        **machine.packages,
        "other GPUs at work beside": str(record.beside or "none"),
        **machine.variables(devices_of(record)),
    }
    return {name: value for name, value in facts.items() if value is not None}
