"""What to do with the weights: a frozen value, complete before the first tensor is read. Imports no torch.

A weight matrix goes through one or both of two steps, and is then written in one of three formats:

    rtn   BF16 ─────────────────────────► INT4 grid ─► int4 | bf16
    hlwq  BF16 ─► HLWQ codes ─► decoded ─► INT4 grid ─► int4
                      │            └──────────────────► bf16
                      └───────────────────────────────► hlwq
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from evalsuite.core.errors import UsageError

Method = Literal["hlwq", "rtn"]
Format = Literal["int4", "hlwq", "bf16"]
CodebookKind = Literal["lloyd-max", "absmax"]
ScaleRule = Literal["max", "mse"]
GroupSize = Literal[32, 64, 128]
Bits = Literal[2, 3, 4, 5, 6]


@dataclass(frozen=True)
class HlwqScheme:
    """How one row's block becomes codes and a norm.

    The published ablation is the four combinations of `codebook` and `hadamard` at 5 bits; "absmax" alone is
    plain uniform rounding, "lloyd-max" with the rotation is HLWQ. https://arxiv.org/abs/2603.29078

    Attributes:
        bits: of a code.
        block: consecutive weights of a row that share a norm; a row's last block is padded with zeros.
        codebook: ``lloyd-max`` codes z = √block · b/‖b‖₂ with the quantizer of N(0,1); ``absmax`` codes
            b/max|b| with evenly spaced levels.
        hadamard: whether a block is rotated first.
    """

    bits: int = 5
    block: int = 128
    codebook: CodebookKind = "lloyd-max"
    hadamard: bool = True

    @property
    def bits_per_weight(self) -> float:
        """Codes and float16 norm, where the block divides the row: 5.125 for 5 bits and blocks of 128."""
        return self.bits + 16 / self.block


@dataclass(frozen=True)
class Int4Grid:
    """Symmetric 4-bit integers, each `group` of a row's weights with one scale.

    Attributes:
        group: consecutive weights that share a scale.
        scale: ``max`` is max|w|/7; ``mse`` searches below it for the least squared error.
    """

    group: int = 128
    scale: ScaleRule = "max"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A quantization as the command line spells it.

    Attributes:
        method: ``rtn`` rounds the weights straight to the INT4 grid, ``hlwq`` passes them through HLWQ first.
        format: ``int4`` is what vLLM loads; ``hlwq`` stores the codes themselves; ``bf16`` writes the decoded
            weights as a plain checkpoint, which any engine scores.
        hlwq_bits, codebook, hadamard: the HLWQ scheme; 5 bits, Lloyd–Max and rotated unless an ablation asks.
        group_size: weights that share a norm, and likewise a scale. vLLM's kernels take 32, 64 and 128.
        scale: how the INT4 grid finds its scale.

    Raises:
        UsageError: a value is out of range, or asks for something that this method and format do not do.
    """

    method: Method = "hlwq"
    format: Format = "int4"
    hlwq_bits: int = 5
    codebook: CodebookKind = "lloyd-max"
    hadamard: bool = True
    group_size: int = 128
    scale: ScaleRule = "max"

    def __post_init__(self) -> None:
        for name, choices in (
            ("method", Method), ("format", Format), ("hlwq_bits", Bits), ("codebook", CodebookKind),
            ("group_size", GroupSize), ("scale", ScaleRule),
        ):  # fmt: skip
            if getattr(self, name) not in get_args(choices):
                raise UsageError(
                    f"There is no {name.replace('_', ' ')} {getattr(self, name)!r}.",
                    todo=f"choose one of {', '.join(map(str, get_args(choices)))}.",
                )
        if self.method == "rtn" and self.format == "hlwq":
            raise UsageError(
                "Method rtn makes INT4 codes, and the format hlwq stores HLWQ codes.",
                todo="use the format int4 or bf16, or the method hlwq.",
            )
        self._refuse_unused()

    @property
    def scheme(self) -> HlwqScheme | None:
        """The HLWQ step, or None where weights are rounded directly."""
        if self.method == "rtn":
            return None
        return HlwqScheme(self.hlwq_bits, self.group_size, self.codebook, self.hadamard)

    @property
    def grid(self) -> Int4Grid | None:
        """The INT4 step, or None where HLWQ codes are the result."""
        if self.method == "hlwq" and self.format != "int4":
            return None
        return Int4Grid(self.group_size, self.scale)

    def as_dict(self) -> dict[str, Any]:
        """For records and resumption: JSON values only."""
        return asdict(self)

    def _refuse_unused(self) -> None:
        """A choice that would change nothing is a mistake of the caller, not a detail to drop."""
        unused = ("hlwq_bits", "codebook", "hadamard") if self.scheme is None else ()
        unused += ("scale",) if self.grid is None else ()
        for name in unused:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UsageError(
                    f"{name.replace('_', ' ')} = {getattr(self, name)!r} has no effect with method "
                    f"{self.method} and format {self.format}.",
                    todo="leave it out, or choose another method or format.",
                )
