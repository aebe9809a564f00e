"""Reading checkpoints as they are stored, and spoiling copies of them."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def load_state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint as it is stored, read by the safetensors library."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def spoil(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Replace one tensor of a checkpoint by `change` of it."""
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        if name in state:
            state[name] = change(state[name])
            save_file(state, path, metadata={"format": "pt"})
            return
    raise KeyError(name)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
