"""The experts of a checkpoint as records: read from its files, or taken from a model that is loaded.

Two layouts. *Plain* experts are as the engine computes with them: ``gate_up_proj`` [2 · intermediate, hidden]
and ``down_proj`` [hidden, intermediate]. *INT4* experts stay packed as compressed-tensors packs them
(engines/dequantize.py), a quarter of the size, and are decoded where they are used.
"""

import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evalsuite.core.errors import ModelError
from evalsuite.data.models import Checkpoint
from evalsuite.engines.cpu_experts import expert_modules
from evalsuite.engines.dequantize import (
    PACKED,
    SCALE,
    SHAPE,
    decode_int4,
    decode_stored,
    quantization_of,
    quantized_parts,
    unpack_int4,
)
from evalsuite.experts.layout import RecordLayout, layout_of

# names in the files, of the decoder's own layers: not of a multi-token head's or an image encoder's
EXPERT = re.compile(
    r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(?P<layer>\d+)\.mlp\.experts\."
    r"(?:(?P<expert>\d+)\.(?P<projection>gate|up|down)_proj\.(?P<part>\w+)|(?P<stack>gate_up|down)_proj)"
)
MODULE = re.compile(r"(?:.*\.)?layers\.(\d+)\..*")
GATE_UP, DOWN = "gate_up_proj", "down_proj"
PACKED_FIELDS = ("gate_up_packed", "gate_up_scale", "down_packed", "down_scale")


@dataclass(frozen=True)
class ExpertShape:
    """Sizes of a model's experts."""

    experts: int
    hidden: int
    intermediate: int

    @property
    def parameters(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.intermediate


def shape_of(module: Any) -> ExpertShape:
    """The sizes of an expert module, which may be without its weights."""
    return ExpertShape(module.num_experts, module.hidden_dim, module.intermediate_dim)


def without_experts(model_class: Any) -> Any:
    """A model class whose expert modules have no weights to allocate, load or initialise."""

    def build(self: Any, *args: Any, **options: Any) -> None:
        model_class.__init__(self, *args, **options)
        for module in expert_modules(self):
            module._parameters.pop(GATE_UP)
            module._parameters.pop(DOWN)
            module._is_hf_initialized = True

    # transformers looks tensors' names up by the class's name, and reads the source of its module
    return type(
        model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__}
    )


def modules_by_layer(model: Any) -> dict[int, Any]:
    """The expert modules of a model by the number of their layer; empty for a dense model."""
    names = {module: name for name, module in model.named_modules()}
    return {int(match[1]): m for m in expert_modules(model) if (match := MODULE.fullmatch(names[m]))}


def weights_of(tensors: dict[str, Tensor], slots: Any, shape: ExpertShape, dtype: torch.dtype) -> Any:
    """The weights of the experts in some slots, decoded where they are packed.

    Args:
        tensors: fields of all slots, as `RecordLayout.views` gives them.
        slots: one slot, or several as an index.

    Returns:
        gate and up [..., 2 · intermediate, hidden] and down [..., hidden, intermediate] in `dtype`.
    """
    if GATE_UP in tensors:
        return tensors[GATE_UP][slots], tensors[DOWN][slots]
    packed, scale, down_packed, down_scale = (tensors[name][slots] for name in PACKED_FIELDS)
    gate_up = decode_int4(unpack_int4(packed, shape.hidden), scale).to(dtype)
    return gate_up, decode_int4(unpack_int4(down_packed, shape.intermediate), down_scale).to(dtype)


class ModelExperts:
    """An `ExpertSource` over the expert modules of a loaded model."""

    def __init__(self, model: Any) -> None:
        self._modules = modules_by_layer(model)
        self.layers = tuple(self._modules)
        first = self._modules[self.layers[0]]
        self.experts = len(first.gate_up_proj)
        self.layout = layout_of({GATE_UP: first.gate_up_proj[0], DOWN: first.down_proj[0]})

    def read_layer(self, layer: int, out: Tensor) -> None:
        views, module = self.layout.views(out), self._modules[layer]
        views[GATE_UP].copy_(module.gate_up_proj.detach())
        views[DOWN].copy_(module.down_proj.detach())


class CheckpointExperts:
    """An `ExpertSource` over the safetensors of a checkpoint, read without loading the model.

    Args:
        dtype: of plain experts, whatever the type they are stored in.
    """

    def __init__(self, checkpoint: Checkpoint, shape: ExpertShape, dtype: torch.dtype) -> None:
        """Raises ModelError: experts are missing or have another shape than the configuration says."""
        self._name, self._shape, self._dtype = checkpoint.name, shape, dtype
        self._quantization = quantization_of(checkpoint.config())
        self._parts = quantized_parts(checkpoint.name, self._quantization) if self._quantization else None
        self._files = ExitStack()
        self._home: dict[str, Any] = {}
        self._stems: dict[tuple[int, int | None, str], str] = {}
        for path in checkpoint.weight_files():
            file = self._files.enter_context(safe_open(path, "pt"))
            for name in file.keys():  # noqa: SIM118 not a dict
                if match := EXPERT.fullmatch(name):
                    self._home[name] = file
                    expert = None if match["expert"] is None else int(match["expert"])
                    stem = name if expert is None else name.rpartition(".")[0]
                    self._stems[int(match["layer"]), expert, match["projection"] or match["stack"]] = stem
        self.layers = tuple(sorted({layer for layer, _, _ in self._stems}))
        self.experts = shape.experts
        self._refuse_incomplete()
        self.packed = self._all_packed()
        self.layout = self._packed_layout() if self.packed else self._plain_layout()

    @staticmethod
    def are_in(checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint's files hold experts under the names that are known here."""
        if checkpoint.gguf:
            return False
        for path in checkpoint.weight_files():
            with safe_open(path, "pt") as file:
                if any(EXPERT.fullmatch(name) for name in file.keys()):  # noqa: SIM118 not a dict
                    return True
        return False

    def _refuse_incomplete(self) -> None:
        for layer in self.layers:
            if (layer, None, "gate_up") in self._stems:
                keys = [(layer, None, "gate_up"), (layer, None, "down")]
            else:
                keys = [(layer, e, p) for e in range(self.experts) for p in ("gate", "up", "down")]
            found = {key for key in self._stems if key[0] == layer}
            if found != set(keys):
                odd = sorted(map(str, found ^ set(keys)))
                raise ModelError(
                    f"Layer {layer} of {self._name} does not hold {self.experts} whole experts.",
                    cause=f"{len(odd)} matrices are missing or too many, such as {odd[0]}.",
                    todo="download the checkpoint again, or check that config.json belongs to it.",
                )

    def _all_packed(self) -> bool:
        return self._quantization.get("quant_method") == "compressed-tensors" and all(
            expert is not None and f"{stem}.{PACKED}" in self._home
            for (_, expert, _), stem in self._stems.items()
        )

    def _plain_layout(self) -> RecordLayout:
        hidden, intermediate = self._shape.hidden, self._shape.intermediate
        return layout_of(
            {
                GATE_UP: torch.empty(2 * intermediate, hidden, dtype=self._dtype, device="meta"),
                DOWN: torch.empty(hidden, intermediate, dtype=self._dtype, device="meta"),
            }
        )

    def _packed_layout(self) -> RecordLayout:
        layer = self.layers[0]
        gate, down = self._packed(layer, 0, "gate"), self._packed(layer, 0, "down")
        return layout_of(
            {
                "gate_up_packed": torch.cat([gate[0], gate[0]]),
                "gate_up_scale": torch.cat([gate[1], gate[1]]),
                "down_packed": down[0],
                "down_scale": down[1],
            }
        )

    def read_layer(self, layer: int, out: Tensor) -> None:
        """Raises ModelError: a file is damaged, or a matrix has the wrong shape."""
        views = self.layout.views(out)
        try:
            if self.packed:
                self._read_packed(layer, views)
            elif (layer, None, "gate_up") in self._stems:
                _put(views[GATE_UP], self._tensor(self._stems[layer, None, "gate_up"]))
                _put(views[DOWN], self._tensor(self._stems[layer, None, "down"]))
            else:
                rows = self._shape.intermediate
                for expert in range(self.experts):
                    _put(views[GATE_UP][expert, :rows], self._plain(layer, expert, "gate"))
                    _put(views[GATE_UP][expert, rows:], self._plain(layer, expert, "up"))
                    _put(views[DOWN][expert], self._plain(layer, expert, "down"))
        except (SafetensorError, KeyError, ValueError) as error:
            raise ModelError(
                f"The experts of layer {layer} of {self._name} are damaged or have the wrong shape.",
                cause=str(error),
                todo="download or quantize the checkpoint again.",
            ) from error

    def _read_packed(self, layer: int, views: dict[str, Tensor]) -> None:
        rows = self._shape.intermediate
        for expert in range(self.experts):
            for field, part in (("packed", 0), ("scale", 1)):
                _put(views[f"gate_up_{field}"][expert, :rows], self._packed(layer, expert, "gate")[part])
                _put(views[f"gate_up_{field}"][expert, rows:], self._packed(layer, expert, "up")[part])
                _put(views[f"down_{field}"][expert], self._packed(layer, expert, "down")[part])

    def _packed(self, layer: int, expert: int, projection: str) -> tuple[Tensor, Tensor]:
        stem = self._stems[layer, expert, projection]
        rows, columns = self._tensor(f"{stem}.{SHAPE}").tolist()
        hidden, intermediate = self._shape.hidden, self._shape.intermediate
        if (rows, columns) != ((hidden, intermediate) if projection == "down" else (intermediate, hidden)):
            raise ValueError(f"{stem} is [{rows}, {columns}]")
        return self._tensor(f"{stem}.{PACKED}"), self._tensor(f"{stem}.{SCALE}")

    def _plain(self, layer: int, expert: int, projection: str) -> Tensor:
        stem = self._stems[layer, expert, projection]
        if self._parts is None or f"{stem}.{self._parts[0]}" not in self._home:
            return self._tensor(f"{stem}.weight")
        payload, scales, size = (self._tensor(f"{stem}.{part}") for part in self._parts)
        return decode_stored(payload, scales, int(size[1]), self._quantization)

    def _tensor(self, name: str) -> Tensor:
        return self._home[name].get_tensor(name)

    def close(self) -> None:
        self._files.close()


def _put(place: Tensor, value: Tensor) -> None:
    """Raises ValueError: another shape, which `copy_` might stretch."""
    if place.shape != value.shape:
        raise ValueError(f"a matrix is {list(value.shape)} instead of {list(place.shape)}")
    place.copy_(value)


def other_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of an unquantized checkpoint that belongs to no expert, as it is stored."""
    state: dict[str, Tensor] = {}
    for path in checkpoint.weight_files():
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 not a dict
                if not EXPERT.fullmatch(name):
                    state[name] = file.get_tensor(name)
    return state


def experts_in_config(checkpoint: Checkpoint) -> int | None:
    """How many routed experts a layer has by config.json; None for a dense model, or a GGUF file."""
    config = checkpoint.config()
    text = config.get("text_config") or {}
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        count = text.get(key) or config.get(key)
        if count:
            return int(count)
    return None
