"""What a claim can be about: every metric with its units, its tolerance and what decides its value.

A unit's factor turns a number into the metric's base unit: bytes, seconds, tokens per second, or a plain
number. GB is 10⁹ bytes and GiB is 2³⁰; a claim says which it means.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

BYTES = {"GB": 1e9, "GiB": 2.0**30, "MB": 1e6, "MiB": 2.0**20, "TB": 1e12}
SECONDS = {"s": 1.0, "min": 60.0}
COUNT = {"": 1.0}
WEIGHTS = {"billion": 1e9, "million": 1e6}

Command = Literal["speed", "footprint", "ppl"]
FLAG_STATES = ("required", "used", "recommended", "optional", "removed")


@dataclass(frozen=True)
class Metric:
    """One quantity.

    Attributes:
        noun: written after a number that has no unit.
        units: accepted units and their factors; the first is the usual one.
        tolerance: relative, where a claim states none; 0 is for counts.
        decides: conditions without which the number says nothing; two claims are rivals only where these
            agree.
        command: the command that measures it; None where none does.
        how: what it would take where no command measures it.
    """

    name: str
    noun: str = ""
    units: Mapping[str, float] = field(default_factory=lambda: COUNT)
    tolerance: float = 0.0
    decides: tuple[str, ...] = ()
    command: Command | None = None
    how: str = ""

    @property
    def counts(self) -> bool:
        """Whether it counts things: then its last digit is no rounding."""
        return self.units is COUNT and not self.tolerance


_MACHINE = "the machine itself"
_CONFIG = "the published config.json"
_HEADERS = "the headers of the checkpoint's files"

METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("speed", "", {"tok/s": 1.0}, 0.10, ("gpu", "cache"), "speed"),
        Metric("perplexity", "PPL", COUNT, 0.01, ("text", "windows"), "ppl"),
        Metric("windows", "windows", COUNT, decides=("text",), command="ppl"),
        Metric("scored_tokens", "tokens", COUNT, decides=("text", "windows"), command="ppl"),
        Metric("load", "", SECONDS, 0.20, ("gpu", "cache"), "speed"),
        Metric("vram", "", BYTES, 0.10, ("cache",), "footprint"),
        Metric("expert_buffer", "", BYTES, 0.10, ("cache",), "footprint"),
        Metric("download", "", BYTES, 0.05, (), "footprint"),
        Metric("disk", "", BYTES, 0.10, ("component",), "footprint"),
        Metric("host_ram", "", BYTES, 0.15, ("component",), "footprint"),
        Metric("gpu_memory", "", BYTES, 0.05, ("gpu",), how=_MACHINE),
        Metric("host_ram_installed", "", BYTES, 0.05, ("gpu",), how=_MACHINE),
        Metric("disk_installed", "", BYTES, 0.05, ("gpu",), how=_MACHINE),
        Metric("parameters", "", WEIGHTS, how=_HEADERS),
        Metric("active_parameters", "", WEIGHTS, how=_CONFIG),
        Metric("layers", "layers", COUNT, how=_CONFIG),
        Metric("experts", "experts", COUNT, how=_CONFIG),
        Metric("experts_per_token", "experts a token", COUNT, how=_CONFIG),
        Metric("vision_width", "columns", COUNT, how=_CONFIG),
        Metric("weight_bits", "", {"bit": 1.0}, 0.0, ("component",), how=_HEADERS),
        Metric("group_size", "weights a group", COUNT, 0.0, ("component",), how=_HEADERS),
        Metric("distinct_experts", "experts a pass", COUNT, 0.0, ("phase",), how="a routing trace"),
        Metric("overflow", "", {"%": 0.01}, 0.05, ("cache",), "speed"),
        Metric("cache_slots", "slots", COUNT, 0.0, ("gpu",), how="a sweep over cache sizes"),
        Metric("ratio", "", {"x": 1.0}, 0.02, ("of",), how="both of its claims"),
        Metric("plugins", "plugins", COUNT, how="serving it with vLLM alone"),
        Metric("custom_code", "pieces of code", COUNT, how="the files of the repository"),
        Metric("prompts", "prompts", COUNT, how="the check's own log"),
        Metric("flag", "", COUNT, 0.0, ("flag", "argument"), how="vllm serve --help of the version meant"),
    )
}


def listed(words: Mapping[str, object] | tuple[str, ...]) -> str:
    return ", ".join(word or "no unit" for word in words)
