"""The torch engine's routing: a hook before every experts module, which transformers hands the chosen ids."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evalsuite.core.errors import MeasurementError, ModelError
from evalsuite.data.models import Checkpoint
from evalsuite.engines.compute import out_of_memory, resolve_compute
from evalsuite.engines.loading import load_model, quiet_transformers
from evalsuite.engines.routing import RoutedPass
from evalsuite.telemetry.machine import package_version

LAYER = re.compile(r"\blayers\.(\d+)\.")
CHOSEN = "top_k_index"


class TorchRouting:
    """A `RoutingRecorder` over transformers, with its key-value cache."""

    def __init__(self, checkpoint: Checkpoint, *, device: str, dtype: str, trust_remote_code: bool) -> None:
        """Load the model.

        Raises:
            ModelError, MissingDependency, OutOfMemory: as `load_model`; ModelError too where no layer has
                experts whose choices transformers shows.
        """
        self._device, torch_dtype = resolve_compute(device, dtype)
        self._model = load_model(
            checkpoint, self._device, torch_dtype, trust_remote_code=trust_remote_code
        ).model
        self.name = f"torch {package_version('torch')}, transformers {package_version('transformers')}"
        self.computed = f"{str(torch_dtype).removeprefix('torch.')} on {self._device.type}"
        modules = expert_modules(self._model)
        if not modules:
            raise ModelError(
                f"{type(self._model).__name__} shows no layer with experts.",
                cause="it is dense, or its experts are not of the form that transformers models share.",
            )
        self.layers = tuple(modules)
        self._seen: dict[int, list[NDArray[np.int64]]] = {layer: [] for layer in self.layers}
        self._hooks = [
            module.register_forward_pre_hook(self._hook(layer), with_kwargs=True)
            for layer, module in modules.items()
        ]

    def _hook(self, layer: int) -> Any:
        def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs[CHOSEN] if CHOSEN in kwargs else args[1]
            self._seen[layer].append(ids.cpu().numpy().astype(np.int64))

        return note

    @torch.inference_mode()
    def record(self, prompts: Sequence[NDArray[np.int64]], output_len: int, first: int) -> list[RoutedPass]:
        ids = torch.from_numpy(np.stack(prompts)).to(self._device)
        requests, length = ids.shape
        numbers = np.arange(first, first + requests)
        passes: list[RoutedPass] = []
        past: Any = None
        with quiet_transformers(), out_of_memory(f"{requests} requests of {length} tokens"):
            for step in range(output_len):
                for seen in self._seen.values():
                    seen.clear()
                out = self._model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
                positions = np.arange(length) if step == 0 else np.array([length + step - 1])
                passes.append(
                    RoutedPass(
                        request=np.repeat(numbers, len(positions)),
                        position=np.tile(positions, requests),
                        prefill=step == 0,
                        chosen=self._chosen(requests * len(positions)),
                    )
                )
                past = out.past_key_values
                ids = out.logits[:, -1:].argmax(-1)
        return passes

    def _chosen(self, tokens: int) -> NDArray[np.int64]:
        """What every layer noted in one pass: [tokens, layers, top_k]."""
        for layer, seen in self._seen.items():
            if len(seen) != 1 or len(seen[0]) != tokens:
                raise MeasurementError(
                    f"Layer {layer} ran its experts {len(seen)} times, on {sum(map(len, seen))} tokens, in a "
                    f"pass of {tokens} tokens.",
                    cause="this architecture does not call its experts once a pass with every token.",
                )
        return np.stack([seen[0] for seen in self._seen.values()], axis=1)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        del self._model
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def expert_modules(model: Any) -> dict[int, Any]:
    """The experts of each decoder layer that has some: layer to module, in ascending order.

    They are the modules that transformers gives (hidden states, chosen experts, weights).
    """
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        place = LAYER.search(name)
        if place and name.endswith(".experts") and hasattr(module, "num_experts"):
            found[int(place[1])] = module
    return dict(sorted(found.items()))
