"""What a quantization will write, decided from names and shapes before any weight is read.

From the headers of a checkpoint's shards (`plan_shards`) or from a configuration alone (`plan_geometry`), so
that output size, disk space and tensor names are known for a model of any size without touching its weights.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evalsuite.core.errors import ModelError, UsageError
from evalsuite.engines.dequantize import CODES, NORMS, PACKED, SCALE, SHAPE
from evalsuite.quant.recipe import Recipe
from evalsuite.quant.rules import Family, Rule

ITEM_BYTES = {
    "BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1
}  # fmt: skip
Fate = Literal["quantized", "kept", "unfit"]
WEIGHT_DTYPES = ("BF16", "F16", "F32")
IN_LAYER = re.compile(r"(?:.*\.)?(layers\.\d+\..*)")  # without what wrappers put before it
STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as safetensors describes it; `dtype` in its spelling, such as BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.count * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the source and what becomes of it.

    Attributes:
        source: as it is stored.
        layer_class: as in the rule table.
        fate: ``quantized``; or unchanged, ``kept`` by the rule table or ``unfit`` for the group.
        reason: why it is unchanged.
        matrices: names of the weight matrices in it, without ``.weight``. A stack of experts [E, 2I, H] holds
            2E, gate and up of each expert in turn.
        outputs: the tensors written for it, matrix after matrix.
    """

    source: TensorInfo
    layer_class: str
    fate: Fate
    reason: str
    matrices: tuple[str, ...]
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class PlannedShard:
    """A file of the source and the file that it becomes."""

    source: str
    target: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def outputs(self) -> Iterator[TensorInfo]:
        return (output for tensor in self.tensors for output in tensor.outputs)


@dataclass(frozen=True)
class Plan:
    """Every tensor to be written, shard by shard.

    Attributes:
        shards: in the order of the source's files.
        ignore: entries of compressed-tensors' ``ignore`` list: what the rules keep, and what did not fit.
    """

    shards: tuple[PlannedShard, ...]
    ignore: tuple[str, ...]

    @property
    def tensors(self) -> Iterator[PlannedTensor]:
        return (tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def outputs(self) -> Iterator[TensorInfo]:
        return (output for shard in self.shards for output in shard.outputs)

    @property
    def bytes_before(self) -> int:
        return sum(tensor.source.bytes for tensor in self.tensors)

    @property
    def bytes_after(self) -> int:
        return sum(output.bytes for output in self.outputs)


def plan_shards(shards: Mapping[str, Sequence[TensorInfo]], rules: Family, recipe: Recipe) -> Plan:
    """The plan for a checkpoint whose files hold these tensors.

    Raises:
        ModelError: a tensor that the rules do not know.
        UsageError: nothing in it would be quantized.
    """
    misfits = _misfits([info for infos in shards.values() for info in infos], rules, recipe)
    planned = tuple(
        PlannedShard(
            name,
            f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors",
            tuple(_planned(info, rules.rule_for(info.name), misfits, recipe) for info in infos),
        )
        for i, (name, infos) in enumerate(shards.items())
    )
    tensors = [tensor for shard in planned for tensor in shard.tensors]
    if all(tensor.fate != "quantized" for tensor in tensors):
        reasons = sorted({f"{tensor.layer_class}: {tensor.reason}" for tensor in tensors})
        raise UsageError(
            "No weight of this checkpoint would be quantized.",
            cause="; ".join(reasons),
            todo="choose a smaller --group-size, or check that the folder holds the whole model.",
        )
    skipped = tuple(rf"re:(.*\.)?{re.escape(unit)}(\..*)?$" for unit in misfits)
    return Plan(planned, (*rules.ignore, *skipped))


def plan_geometry(config: Any, rules: Family, recipe: Recipe) -> Plan:
    """The plan for the text model of a transformers configuration, in BF16 and one shard; no weight exists.

    Raises:
        UsageError: nothing in it would be quantized.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys)
    infos = [
        TensorInfo(name, "BF16", tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name not in tied
    ]
    return plan_shards({"meta": infos}, rules, recipe)


def _misfits(infos: Sequence[TensorInfo], rules: Family, recipe: Recipe) -> dict[str, str]:
    """Modules whose rows the INT4 group does not divide, and why each stays as it is.

    The experts of a layer run in one kernel, so for INT4 they are quantized together or not at all.
    """
    misfits: dict[str, str] = {}
    if recipe.grid is None:
        return misfits  # HLWQ pads its last block
    for info in infos:
        columns = info.shape[-1] if info.shape else 0
        if rules.rule_for(info.name).keep or columns % recipe.grid.group == 0:
            continue
        module, experts = _units(info.name)
        reason = f"in-dimension {columns} is not a multiple of the group of {recipe.grid.group}"
        if experts and recipe.format == "int4":
            misfits[experts] = f"{reason} in one of its projections, and a layer's experts run in one kernel"
        else:
            misfits[module] = reason
    return misfits


def _units(tensor: str) -> tuple[str, str]:
    """A tensor's module and, for a routed expert, the module of all experts of its layer; else ""."""
    inside = IN_LAYER.fullmatch(tensor.removesuffix(".weight"))
    module = inside[1] if inside else tensor
    experts = module.partition(".mlp.experts.")
    return module, f"{experts[0]}.mlp.experts" if experts[1] else ""


def _planned(info: TensorInfo, rule: Rule, misfits: Mapping[str, str], recipe: Recipe) -> PlannedTensor:
    matrices = _matrices(info)
    if rule.keep:
        return PlannedTensor(info, rule.layer_class, "kept", rule.keep, matrices, (info,))
    for unit in _units(info.name):
        if unit in misfits:
            return PlannedTensor(info, rule.layer_class, "unfit", misfits[unit], matrices, (info,))
    if info.dtype not in WEIGHT_DTYPES:
        raise ModelError(
            f"{info.name} is stored as {info.dtype}, and only {', '.join(WEIGHT_DTYPES)} can be quantized.",
            cause="the checkpoint is already quantized, or was not trained as a language model.",
            todo="start from the BF16 checkpoint.",
        )
    return PlannedTensor(info, rule.layer_class, "quantized", "", matrices, _outputs(info, matrices, recipe))


def _matrices(info: TensorInfo) -> tuple[str, ...]:
    stacked = STACKED.fullmatch(info.name)
    if stacked is None:
        return (info.name.removesuffix(".weight"),)
    projections = ("gate_proj", "up_proj") if stacked[2] == "gate_up_proj" else ("down_proj",)
    return tuple(f"{stacked[1]}.{e}.{p}" for e in range(info.shape[0]) for p in projections)


def _outputs(info: TensorInfo, matrices: Sequence[str], recipe: Recipe) -> tuple[TensorInfo, ...]:
    if recipe.format == "bf16":
        return (TensorInfo(info.name, "BF16", info.shape),)
    columns = info.shape[-1]
    rows = info.count // columns // len(matrices)
    groups = -(-columns // recipe.group_size)
    if recipe.format == "int4":
        parts = ((PACKED, "I32", (rows, columns // 8)), (SCALE, "BF16", (rows, groups)))
    else:
        row_bytes = groups * recipe.group_size * recipe.hlwq_bits // 8
        parts = ((CODES, "U8", (rows, row_bytes)), (NORMS, "F16", (rows, groups)))
    return tuple(
        TensorInfo(f"{matrix}.{part}", dtype, shape)
        for matrix in matrices
        for part, dtype, shape in (*parts, (SHAPE, "I64", (2,)))
    )
