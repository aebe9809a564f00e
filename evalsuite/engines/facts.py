"""What a record says about a model that the torch engine has loaded."""

from collections.abc import Mapping
from typing import Any

import torch

from evalsuite.core.record import ModelFacts
from evalsuite.data.models import Checkpoint
from evalsuite.engines.loading import Loaded
from evalsuite.telemetry.machine import read_machine


def read_facts(
    checkpoint: Checkpoint,
    loaded: Loaded,
    device: torch.device,
    dtype: torch.dtype,
    *,
    engaged: Mapping[str, Any],
    warnings: tuple[str, ...] = (),
) -> ModelFacts:
    """The facts of a checkpoint as it was loaded.

    Args:
        engaged, warnings: the engine's own, beside those of the loading.
    """
    config: Any = loaded.model.config.get_text_config()
    name = str(dtype).removeprefix("torch.")
    all_engaged = dict(loaded.engaged)
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    else:
        device_name = read_machine().cpu
        all_engaged["cpu_threads"] = torch.get_num_threads()
    head = loaded.model.get_output_embeddings()
    files = [] if loaded.random else checkpoint.weight_files()
    return ModelFacts(
        name=checkpoint.name,
        architecture=type(loaded.model).__name__,
        parameters=loaded.parameters,
        vocabulary=config.vocab_size if head is None else head.weight.shape[0],
        max_context=getattr(config, "max_position_embeddings", None),
        fingerprint=checkpoint.fingerprint(),
        stored=loaded.stored,
        stored_bytes=sum(path.stat().st_size for path in files),
        computed=f"{name} on {device.type}",
        dtype=name,
        device=str(device),
        device_name=device_name,
        engaged=all_engaged | {"attention": getattr(config, "_attn_implementation", None)} | dict(engaged),
        warnings=loaded.warnings + warnings,
    )
