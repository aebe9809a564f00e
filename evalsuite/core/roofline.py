"""The least time that a decoded token can take, and what a measured time is made of.

    memory    bytes of a step / measured copy bandwidth
    transfer  bytes copied from the host in a step / measured host-to-device bandwidth
    compute   2 · weights that meet a token · sequences / measured matrix rate

A step gives one token to each sequence, so its time is the time per token of one sequence, and

    bound on tokens/s of one sequence = 1 / (memory + transfer)

because a copied expert is read only after it has come. What the measured TPOT has beyond these is overhead:
launches of kernels, Python, synchronisation. Where the same model also ran with CUDA graphs, which launch a
whole step at once, the ratio of the two tells how much of it was launches.

The nearest rival convention divides the vendor's peak bandwidth by the size of all weights; it is no bound
for a mixture of experts, which reads a fraction of them.
"""

from evalsuite.core.bandwidth import Bandwidth
from evalsuite.core.geometry import Geometry
from evalsuite.core.speed import Bound

BINDS = 0.5  # of the measured time: what takes more than this is called the limit
GRAPHS_HELP = 1.2  # times faster with CUDA graphs: launches mattered


def bound(
    geometry: Geometry,
    bandwidth: Bandwidth,
    *,
    sequences: int,
    context: float,
    devices: int,
    transfer_bytes_per_step: int,
    decode_tokens_per_s: float,
) -> Bound:
    """The bound of one cell.

    Args:
        sequences: requests that decode together.
        context: tokens before the decoded one, mean over the run.
        devices: that share the weights, each reading its part at the measured bandwidth.
        transfer_bytes_per_step: experts copied to the device per decoding step, from measured misses.
        decode_tokens_per_s: as measured, of one sequence.
    """
    step = geometry.step_bytes(sequences, context)
    transfer = bandwidth.transfer_pieces_bytes_per_s or bandwidth.copy_bytes_per_s
    least_s = step / devices / bandwidth.copy_bytes_per_s
    if transfer_bytes_per_step:
        least_s += transfer_bytes_per_step / devices / transfer
    return Bound(
        bytes_per_token=step,
        transfer_bytes_per_token=transfer_bytes_per_step,
        bandwidth_bytes_per_s=devices * bandwidth.copy_bytes_per_s,
        transfer_bandwidth_bytes_per_s=devices * transfer if transfer_bytes_per_step else None,
        flop_per_token=2 * geometry.token_weights * sequences,
        flop_per_s=devices * bandwidth.matrix_flop_per_s,
        tokens_per_s=1 / least_s,
        share=decode_tokens_per_s * least_s,
    )


def verdict(bound: Bound, graphs_over_eager: float | None) -> str:
    """What binds a cell, with its share of the time of a token.

    Args:
        graphs_over_eager: decode speed with CUDA graphs over that of eager mode, for a cell that ran in
            eager mode; None where there is no such pair, or the cell itself has graphs.
    """
    memory, transfer, compute = parts(bound)
    if transfer >= max(BINDS, memory):
        return f"transfers {_percent(transfer)}"
    if compute >= max(BINDS, memory):
        return f"compute {_percent(compute)}"
    if memory >= BINDS:
        return f"memory {_percent(memory)}"
    if graphs_over_eager is not None and graphs_over_eager >= GRAPHS_HELP:
        return f"launches: graphs are {graphs_over_eager:.3g}× faster"
    rest = f"overhead {_percent(max(0.0, 1 - memory - transfer - compute))}"
    return f"{rest}, not launches" if graphs_over_eager is not None else rest


def parts(bound: Bound) -> tuple[float, float, float]:
    """Memory, transfer and compute time as shares of the measured time of a step."""
    step_s = 1 / (bound.share * bound.tokens_per_s)
    memory = bound.bytes_per_token / bound.bandwidth_bytes_per_s
    transfer = bound.transfer_bytes_per_token / (bound.transfer_bandwidth_bytes_per_s or 1.0)
    compute = bound.flop_per_token / bound.flop_per_s if bound.flop_per_s else 0.0
    return memory / step_s, transfer / step_s, compute / step_s


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
