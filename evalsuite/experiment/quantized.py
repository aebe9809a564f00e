"""Checkpoints that an experiment makes: their recipes in a file, and the folders that they lie in."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

import evalsuite
from evalsuite.core.errors import UsageError
from evalsuite.core.spec import canonical_json
from evalsuite.data.models import Checkpoint
from evalsuite.quant.recipe import Recipe


def _recipe(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    known = [field.name for field in fields(Recipe)]
    for key in value:
        if key not in known:
            raise UsageError(f"A recipe has no {key!r}.", todo=f"it may have {', '.join(known)}.")
    return Recipe(**value)


RecipeTable = Annotated[Recipe, BeforeValidator(_recipe)]


def quantized_folder(
    work: Path, source: Checkpoint, fingerprint: str, name: str, recipe: Mapping[str, Any]
) -> Path:
    """The folder of a checkpoint, named by all that its weights depend on.

    Args:
        fingerprint: of the source, which takes a while to read.
        name: what people call it; only letters, digits and dashes.
    """
    whole = {"weights": fingerprint, "recipe": dict(recipe), "version": evalsuite.__version__}
    digest = hashlib.sha256(canonical_json(whole).encode()).hexdigest()[:8]
    return work / f"{source.slug}-{name}-{digest}"


def slug_of(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
