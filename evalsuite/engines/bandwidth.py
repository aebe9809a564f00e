"""What a device can move and compute at best, measured here: the bounds that a speed is held against.

    copy bandwidth      (bytes read + bytes written) / time, of one large array on the device
    transfer bandwidth  bytes / time, from pinned host memory to the device: in one large piece, and in
                        pieces of 1.6 MB, about one INT4 expert of the 35B model
    matrix rate         2·n³ / time, of a square bfloat16 product (float32 on a CPU)

Units: bytes/s and operations/s, the best of several repeats; the vendor's figures are not used.
``python -m evalsuite.engines.bandwidth --gpu 0`` prints one JSON object and leaves no CUDA context behind.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from evalsuite.core.bandwidth import Bandwidth
from evalsuite.core.errors import EngineDied
from evalsuite.engines.process import device_environment

GPU_COPY_BYTES, CPU_COPY_BYTES = 2**30, 2**28
TRANSFER_BYTES, PIECE_BYTES, PIECES = 2**30, 1_600_000, 256
GPU_MATRIX, CPU_MATRIX = 8192, 1024
REPEATS = 7
LIMIT_S = 300.0


def measure_bandwidth(gpu: int | None) -> Bandwidth:
    """Measure a GPU, by its index in the driver, or the CPU for None, in a process that then ends.

    Raises:
        EngineDied: it failed, for instance because the device has too little memory free.
    """
    where = () if gpu is None else (gpu,)
    device = "cpu" if gpu is None else "cuda:0"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "evalsuite.engines.bandwidth", device],
            env=device_environment(where), capture_output=True, text=True, timeout=LIMIT_S, check=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise EngineDied(f"The bandwidth of {device} was not measured within {LIMIT_S:.0f} s.") from error
    except subprocess.CalledProcessError as error:
        last = [line for line in error.stderr.splitlines() if line.strip()][-1:]
        raise EngineDied("The bandwidth of the device could not be measured.", cause="".join(last)) from error
    return Bandwidth.model_validate_json(done.stdout.splitlines()[-1])


def best_time(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several repeats, the device idle before and after each."""
    times: list[float] = []
    for _ in range(REPEATS + 1):  # the first also allocates and loads kernels
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measure_here(device: torch.device) -> Bandwidth:
    """Measure in this process."""
    cuda = device.type == "cuda"
    return Bandwidth(
        device=torch.cuda.get_device_name(device) if cuda else "cpu",
        copy_bytes_per_s=_copy(device, GPU_COPY_BYTES if cuda else CPU_COPY_BYTES),
        transfer_bytes_per_s=_transfer(device, TRANSFER_BYTES, 1) if cuda else None,
        transfer_pieces_bytes_per_s=_transfer(device, PIECE_BYTES, PIECES) if cuda else None,
        matrix_flop_per_s=_multiply(device, GPU_MATRIX, torch.bfloat16)
        if cuda
        else _multiply(device, CPU_MATRIX, torch.float32),
    )


def _copy(device: torch.device, size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_time(lambda: target.copy_(source), device)


def _multiply(device: torch.device, n: int, dtype: torch.dtype) -> float:
    left, right = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * n**3 / best_time(lambda: torch.mm(left, right, out=product), device)


def _transfer(device: torch.device, size: int, pieces: int) -> float:
    host = torch.ones(pieces, size, dtype=torch.uint8).pin_memory()
    target = torch.empty(pieces, size, dtype=torch.uint8, device=device)

    def copy(source: Tensor = host) -> None:
        for piece in range(pieces):
            target[piece].copy_(source[piece], non_blocking=True)

    return size * pieces / best_time(copy, device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Print the measurement of one device as JSON."""
    parser = argparse.ArgumentParser(description="Copy bandwidth, transfer bandwidth and matrix rate.")
    parser.add_argument("device", nargs="?", default="cpu", help="cpu, or a device as torch names it")
    parser.add_argument("--gpu", type=int, help="index of a GPU in the driver, instead of a device")
    arguments = parser.parse_args()
    if arguments.gpu is not None:
        print(measure_bandwidth(arguments.gpu).model_dump_json())
        return
    print(measure_here(torch.device(arguments.device)).model_dump_json())


if __name__ == "__main__":
    main()
