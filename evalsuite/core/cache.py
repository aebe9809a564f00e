"""What an expert cache counted."""

from evalsuite.core.value import Value

# `engaged["experts"]` of an engine that keeps all experts on the device, since the cache asked for holds them
# all: it has no counters then
ALL_RESIDENT = "all resident"


class LayerCounters(Value):
    """One layer's expert cache since its counters were last reset.

    A step is one call of the layer's experts, whatever number of tokens it has. Every distinct expert of a
    step counts once, as a hit or as a miss; a step with more distinct experts than slots is also an overflow
    step. Bytes are those of all ranks of a tensor-parallel group together.
    """

    layer: int
    steps: int
    hits: int
    misses: int
    overflow_steps: int
    bytes_moved: int
    copy_s: float | None = None


class CacheCounters(Value):
    """An expert cache over a run: its settings, its sums, and the layers they come from.

    Attributes:
        expert_bytes: of a whole expert, whatever number of ranks share it.
    """

    size: int
    experts: int
    policy: str
    store: str
    expert_bytes: int
    layers: tuple[LayerCounters, ...]

    def of_group(self, ranks: int) -> "CacheCounters":
        """Those of a tensor-parallel group, from one rank's: all move equal shares of the same experts."""
        layers = tuple(
            layer.model_copy(update={"bytes_moved": layer.bytes_moved * ranks}) for layer in self.layers
        )
        return self.model_copy(update={"expert_bytes": self.expert_bytes * ranks, "layers": layers})

    @property
    def hits(self) -> int:
        return sum(layer.hits for layer in self.layers)

    @property
    def misses(self) -> int:
        return sum(layer.misses for layer in self.layers)

    @property
    def overflow_steps(self) -> int:
        return sum(layer.overflow_steps for layer in self.layers)

    @property
    def bytes_moved(self) -> int:
        return sum(layer.bytes_moved for layer in self.layers)

    @property
    def hit_rate(self) -> float | None:
        """hits / (hits + misses); None before the first step."""
        served = self.hits + self.misses
        return self.hits / served if served else None
