"""What a cell of a sweep will take, by prediction."""

from dataclasses import asdict, dataclass
from typing import Any

from evalsuite.core.spec import SpeedSpec


@dataclass(frozen=True)
class Forecast:
    """One cell, predicted from its configuration and from measured bandwidths.

    Attributes:
        weights_bytes, request_bytes: on each device: weights and expert slots; keys, values and states.
        device_bytes: memory of each device, which is the machine's on a CPU.
        tokens_per_s: bound on the decode speed of one sequence, every expert found on the device.
        all_misses_tokens_per_s: the same where every expert has to be copied; None without an expert cache.
        absent: why there is no prediction.
    """

    cell: SpeedSpec
    engine: str
    weights_bytes: int | None = None
    request_bytes: int | None = None
    device_bytes: int | None = None
    tokens_per_s: float | None = None
    all_misses_tokens_per_s: float | None = None
    absent: str = ""

    @property
    def fits(self) -> bool | None:
        """Whether weights and requests are less than a device has; None where that is not known."""
        if self.weights_bytes is None or self.request_bytes is None or self.device_bytes is None:
            return None
        return self.weights_bytes + self.request_bytes < self.device_bytes

    def as_dict(self) -> dict[str, Any]:
        """For a JSON document."""
        return asdict(self) | {"cell": self.cell.model_dump(mode="json"), "fits": self.fits}
