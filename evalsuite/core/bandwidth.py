"""What a device moves and computes at best, by measurement."""

from evalsuite.core.value import Value


class Bandwidth(Value):
    """One device; see `evalsuite.engines.bandwidth` for how each is measured.

    Attributes:
        copy_bytes_per_s: on the device, bytes read plus bytes written.
        transfer_bytes_per_s, transfer_pieces_bytes_per_s: from pinned host memory, in one large piece and in
            pieces of 1.6 MB; None where the device is the host.
        matrix_flop_per_s: of a large square product, in bfloat16 on a GPU and float32 on a CPU.
    """

    device: str
    copy_bytes_per_s: float
    transfer_bytes_per_s: float | None = None
    transfer_pieces_bytes_per_s: float | None = None
    matrix_flop_per_s: float
