"""A model as a plain BF16 safetensors checkpoint, for readers that know nothing else."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from evalsuite.core.errors import StorageError
from evalsuite.core.units import si_bytes
from evalsuite.data.models import Checkpoint
from evalsuite.engines.loading import load_model, quiet_transformers
from evalsuite.engines.tokenizer import load_tokenizer
from evalsuite.telemetry.probes import free_disk_bytes

SPARE_BYTES = 64_000_000  # tokenizer and other files


def export_bf16(checkpoint: Checkpoint, folder: Path) -> None:
    """Write `checkpoint` with its tokenizer into the new folder `folder`, which appears once it is whole.

    The files get the time of the original weights: an export repeated from the same weights counts as the
    same checkpoint.

    Raises:
        ModelError, MissingDependency, OutOfMemory: as `load_model`.
        StorageError: the disk has no room, or writing failed.
    """
    tokenizer = load_tokenizer(None, checkpoint)
    loaded = load_model(checkpoint, torch.device("cpu"), torch.bfloat16, trust_remote_code=False)
    needed = 2 * sum(p.numel() for p in loaded.model.parameters()) + SPARE_BYTES
    free = free_disk_bytes(folder)
    if free < needed:
        raise StorageError(
            f"{checkpoint.name} as BF16 needs {si_bytes(needed)}, and {folder.parent} has {si_bytes(free)}.",
            todo="free some space, or choose a destination on another disk.",
        )
    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    options: dict[str, Any] = {"gguf_file": checkpoint.gguf} if checkpoint.gguf else {}
    try:
        with quiet_transformers():
            _plain(loaded.model).save_pretrained(unfinished)
            whole: Any = AutoTokenizer.from_pretrained(str(checkpoint.folder), **options)
            whole.save_pretrained(unfinished)
        tokenizer.tokenizer.save(str(unfinished / "tokenizer.json"))  # the one that scores the original
        when = checkpoint.weight_files()[0].stat().st_mtime_ns
        for path in unfinished.iterdir():
            os.utime(path, ns=(when, when))
        unfinished.rename(folder)
    except OSError as error:
        raise StorageError(
            f"Writing {checkpoint.name} as BF16 to {folder} failed: {error.strerror or error}.",
            todo="mend it and run the same command again.",
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _plain(model: Any) -> Any:
    """The same weights in a model that was never loaded: transformers does not save what came from GGUF."""
    config = type(model.config).from_dict(
        {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain
