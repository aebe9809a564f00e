"""What an expert cache would cost and give on a GPU that nobody has measured yet: derived, not measured.

Decoding one sequence, a token takes

    t = t₀ + misses · expert bytes / transfer bandwidth,   misses = (1 − h) · top_k · expert layers

and tokens/s = 1/t. Where t₀ was not measured it is the bytes that a token reads over the memory's bandwidth,
and where the transfer bandwidth was not, it is the host link's: then tokens/s is the most that can be, which
launches, kernels and waiting only lower. Copies are not overlapped with compute.

The hit rate h comes from a trace, or from routing that is uniform and has no memory: N of E experts resident
are hit N/E of the time, whatever the policy. Real routers have favourites, so their h is higher.
"""

from collections.abc import Callable
from dataclasses import dataclass

from evalsuite.core.geometry import Geometry
from evalsuite.core.value import Value
from evalsuite.experts.gpus import GpuSheet

RESERVE_BYTES = 1_500_000_000  # for the driver's context, workspaces and activations: an assumption

HitRate = Callable[[int], float]


class Prediction(Value):
    """One cache size on one GPU.

    Attributes:
        size: experts a layer on the device; equal to the layer's experts where all are resident.
        routing: where the hit rate comes from.
        device_bytes: weights on the device, keys, values and states of one sequence, and the reserve.
        transfer_bytes_per_token: experts copied to the device.
        tokens_per_s: of one sequence.
    """

    gpu: str
    size: int
    routing: str
    hit_rate: float
    device_bytes: int
    fits: bool
    transfer_bytes_per_token: float
    tokens_per_s: float


@dataclass(frozen=True)
class Measured:
    """What is known of a GPU beyond its data sheet.

    Attributes:
        compute_s: time of a decoded token with every expert resident; None derives it.
        transfer_bytes_per_s: of host-to-device copies; None takes the link's peak.
    """

    compute_s: float | None = None
    transfer_bytes_per_s: float | None = None


@dataclass(frozen=True)
class Routing:
    """A source of hit rates: its name, and the hit rate at a cache size of the predicted model."""

    name: str
    hit_rate: HitRate


def uniform_routing(experts: int) -> Routing:
    """Every expert as likely as any other, whatever came before."""
    return Routing("uniform", lambda size: min(size, experts) / experts)


def device_bytes(geometry: Geometry, size: int, context: int) -> int:
    """What has to fit with `size` expert slots a layer, for one sequence of `context` tokens."""
    return geometry.device_bytes(size) + geometry.request_bytes(1, context) + RESERVE_BYTES


def largest_cache(geometry: Geometry, memory_bytes: int, context: int) -> int | None:
    """The most experts of each layer that fit, all of them at most; None where not even one does."""
    each = geometry.expert_layers * geometry.expert_bytes
    room = memory_bytes - device_bytes(geometry, 0, context)
    return min(room // each, geometry.experts) if room >= each else None


def predict(
    geometry: Geometry, gpu: GpuSheet, size: int, routing: Routing, context: int, measured: Measured
) -> Prediction:
    """Speed and memory of one cache size.

    Args:
        context: tokens of the sequence; its keys and values take memory, and are read for each token.
    """
    size = min(size, geometry.experts)
    hit_rate = 1.0 if size == geometry.experts else routing.hit_rate(size)
    compute_s = measured.compute_s
    if compute_s is None:
        compute_s = geometry.step_bytes(1, context) / gpu.bandwidth_bytes_per_s
    moved = (1 - hit_rate) * geometry.top_k * geometry.expert_layers * geometry.expert_bytes
    needed = device_bytes(geometry, size, context)
    return Prediction(
        gpu=gpu.key,
        size=size,
        routing=routing.name,
        hit_rate=hit_rate,
        device_bytes=needed,
        fits=needed <= gpu.memory_bytes,
        transfer_bytes_per_token=moved,
        tokens_per_s=1 / (compute_s + moved / (measured.transfer_bytes_per_s or gpu.link_bytes_per_s)),
    )
