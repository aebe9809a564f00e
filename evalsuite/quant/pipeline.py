"""From a BF16 checkpoint to a quantized one, a piece of a tensor at a time.

Memory in use is a few copies of one piece, whatever the size of the model; the files themselves are mapped
and written piecewise.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from evalsuite.core.errors import UsageError
from evalsuite.core.record import QuantizedPart
from evalsuite.engines.dequantize import SHAPE
from evalsuite.quant.checkpoint import ShardReader, open_checkpoint
from evalsuite.quant.destination import Destination, ShardWriter
from evalsuite.quant.plan import PlannedShard, PlannedTensor, TensorInfo, plan_shards
from evalsuite.quant.quality import QuantReport, error_sums, merged, squared_sums
from evalsuite.quant.recipe import Recipe
from evalsuite.quant.rules import family
from evalsuite.quant.sidecar import small_files
from evalsuite.quant.steps import code

CPU_PIECE = 1 << 20  # weights: a few float32 copies stay in the processor's cache
CUDA_PIECE = 1 << 26  # weights: 256 MB a float32 copy, large enough to fill any GPU
COPY_PIECE = 1 << 26
LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.")
EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Progress:
    """How far a quantization is, in bytes of the source.

    Attributes:
        done: finished, by this run or an earlier one.
        total: of the whole source.
        resumed: finished by an earlier run.
        seconds: since this run began.
        tensor: being worked on.
    """

    done: int
    total: int
    resumed: int
    seconds: float
    tensor: str

    @property
    def bytes_per_s(self) -> float:
        return (self.done - self.resumed) / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """None before there is a rate to judge by."""
        return (self.total - self.done) / self.bytes_per_s if self.bytes_per_s else None


def quantize(
    source: Path,
    destination: Path,
    recipe: Recipe,
    *,
    device: str = "auto",
    on_progress: Callable[[Progress], None] | None = None,
) -> QuantReport:
    """Quantize the checkpoint in folder `source` into the new folder `destination`.

    A run that was interrupted is taken up after its last finished shard by calling this again.

    Args:
        device: ``auto`` is the first CUDA device, else the CPU.
        on_progress: called after every piece.

    Raises:
        ModelError: the source is not a whole unquantized checkpoint of a known architecture, or has a weight
            that is not finite.
        UsageError: the destination exists or lies in the source, nothing would be quantized, or there is no
            such device.
        ResumeMismatch: an unfinished destination was begun with another recipe or source.
        StorageError: the disk has no room, or writing failed.
    """
    place = _place(device)
    checkpoint = open_checkpoint(source)
    rules = family(checkpoint.config)
    plan = plan_shards(checkpoint.shards, rules, recipe)
    output = Destination(destination, checkpoint, plan, recipe)

    meter = _Meter(plan.bytes_before, on_progress)
    rows: list[QuantizedPart] = []
    for shard in plan.shards:
        finished = output.finished(shard)
        if finished is None:
            with checkpoint.open(shard.source) as reader, output.shard(shard) as writer:
                finished = _ShardJob(recipe, reader, writer, place, meter).run(shard)
            output.complete(shard, finished)
        else:
            meter.skip(sum(tensor.source.bytes for tensor in shard.tensors))
        rows += finished
    output.finish(small_files(source, checkpoint.config, rules, plan, recipe))
    return QuantReport(recipe, merged(rows), str(place), meter.seconds, meter.done - meter.resumed)


class _Meter:
    """Counts the bytes that are finished and passes them on."""

    def __init__(self, total: int, listener: Callable[[Progress], None] | None) -> None:
        self.done, self.resumed = 0, 0
        self._total, self._listener, self._begun = total, listener, time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    def skip(self, size: int) -> None:
        self.done, self.resumed = self.done + size, self.resumed + size

    def advance(self, piece: Tensor, tensor: str) -> None:
        self.done += piece.numel() * piece.element_size()
        if self._listener:
            self._listener(Progress(self.done, self._total, self.resumed, self.seconds, tensor))


def _place(device: str) -> torch.device:
    name = ("cuda:0" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"There is no device {name!r}.", todo="choose auto, cpu or cuda:0.")
    place = torch.device(name)
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"There is no device {name}: torch sees {torch.cuda.device_count()} CUDA devices.",
            cause="no GPU, no driver, or a torch built without CUDA.",
            todo="use --device cpu; `hlwq-eval doctor` says what this machine has.",
        )
    return place


@dataclass(frozen=True)
class _ShardJob:
    """One shard of the source on its way into one shard of the result."""

    recipe: Recipe
    reader: ShardReader
    writer: ShardWriter
    place: torch.device
    meter: _Meter

    def run(self, shard: PlannedShard) -> list[QuantizedPart]:
        """Write the shard, and say how far each of its weights is from the original."""
        work = {"quantized": self._quantize, "kept": self._copy, "unfit": self._copy}
        return list(
            merged(row for tensor in shard.tensors for row in _rows(tensor, work[tensor.fate](tensor)))
        )

    def _copy(self, tensor: PlannedTensor) -> Tensor:
        for piece in self.reader.pieces(tensor.source, COPY_PIECE):
            self.writer.append(tensor.source.name, piece)
            self.meter.advance(piece, tensor.source.name)
        return torch.zeros(len(tensor.matrices), 3)

    def _quantize(self, tensor: PlannedTensor) -> Tensor:
        """Write the outputs of one tensor; returns the error sums of its matrices, float64 [matrices, 3]."""
        info, matrices = tensor.source, tensor.matrices
        stacked = len(info.shape) == 3
        columns = info.shape[-1]
        rows = info.count // columns // len(matrices)
        if self.recipe.format != "bf16":
            for matrix in matrices:
                self.writer.append(f"{matrix}.{SHAPE}", torch.tensor([rows, columns]))

        # A single matrix larger than a piece is read once more beforehand: its outliers are counted against
        # the mean square of all of it.
        limit = CUDA_PIECE if self.place.type == "cuda" else CPU_PIECE
        whole_mean = None if stacked or info.count <= limit else self._mean_square(info, limit)
        sums = torch.zeros(len(matrices), 3, dtype=torch.float64)
        first = 0
        for piece in self.reader.pieces(info, limit):
            weights = piece.to(self.place).float().reshape(-1, rows if stacked else len(piece), columns)
            last = first + len(weights)
            coded = code(weights, self.recipe, info.name)
            if self.recipe.format == "bf16":
                self.writer.append(info.name, coded.decoded.cpu())
            for part, values in coded.parts.items():
                for matrix, value in zip(matrices[first:last], values.cpu(), strict=True):
                    self.writer.append(f"{matrix}.{part}", value)
            means = squared_sums(weights) / (rows * columns) if whole_mean is None else whole_mean
            sums[first:last] += error_sums(weights, coded.decoded, means).cpu()
            first = last if stacked else 0
            self.meter.advance(piece, info.name)
        return sums

    def _mean_square(self, info: TensorInfo, limit: int) -> Tensor:
        """Of a single matrix, [1]."""
        total = torch.zeros(1, dtype=torch.float64, device=self.place)
        for piece in self.reader.pieces(info, limit):
            total += squared_sums(piece.to(self.place).float().unsqueeze(0))
        return total / info.count


def _rows(tensor: PlannedTensor, sums: Tensor) -> list[QuantizedPart]:
    """A report row for each matrix, or for each projection of a stack of experts."""
    stacked = len(tensor.matrices) > 1
    projections = len(tensor.matrices) // tensor.source.shape[0] if stacked else 1
    layer = LAYER.match(tensor.source.name)
    bytes_after = sum(output.bytes for output in tensor.outputs)
    return [
        QuantizedPart(
            name=EXPERT.sub(".experts.*.", matrix), layer=int(layer[1]) if layer else None,
            layer_class=tensor.layer_class, fate=tensor.fate, reason=tensor.reason,
            matrices=len(tensor.matrices) // projections,
            weights=tensor.source.count // projections,
            squared_error=float(totals[0]), squared_weight=float(totals[1]), outliers=int(totals[2]),
            bytes_before=tensor.source.bytes // projections,
            bytes_after=bytes_after // projections,
        )
        for matrix, totals in zip(tensor.matrices, sums.view(-1, projections, 3).sum(0), strict=False)
    ]  # fmt: skip
