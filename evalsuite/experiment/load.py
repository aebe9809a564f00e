"""From a TOML file to the experiment that it holds."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evalsuite.core.errors import UsageError
from evalsuite.experiment.ablation import Ablation
from evalsuite.experiment.evaluation import Evaluation

EXAMPLES = {
    Ablation: "experiments/hlwq_ablation_demo.toml shows every key of an ablation.",
    Evaluation: "experiments/demo.toml shows an evaluation; a step has the keys of its command's options.",
}


def load_experiment(path: Path) -> Ablation | Evaluation:
    """Read an experiment file: with ``arms`` it is an ablation, with ``steps`` an evaluation.

    Raises:
        UsageError: it is not there, no TOML, or asks for something that does not exist.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read.",
            cause=str(error.strerror),
            todo="give the path of an experiment file, such as those in experiments/.",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML.", cause=str(error)) from error
    kind = _kind(path, found)
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        reasons = (
            f"{_place(detail['loc'])}: {detail['msg'].removeprefix('Value error, ')}"
            for detail in error.errors()
        )
        raise UsageError(
            f"{path.name} is no experiment that can be run.", cause="; ".join(reasons), todo=EXAMPLES[kind]
        ) from error


def _kind(path: Path, found: Mapping[str, Any]) -> type[Ablation] | type[Evaluation]:
    if ("arms" in found) == ("steps" in found):
        raise UsageError(
            f"{path.name} is no experiment that can be run.",
            cause="it has both arms and steps." if "arms" in found else "it has neither arms nor steps.",
            todo=" ".join(EXAMPLES.values()),
        )
    return Ablation if "arms" in found else Evaluation


def _place(location: tuple[int | str, ...]) -> str:
    """``steps.2.limit``: steps and arms are counted from 1, and the tag of a union is left out."""
    parts = [str(part + 1) if isinstance(part, int) else part for part in location]
    if len(parts) > 2 and parts[0] == "steps":
        del parts[2]
    return ".".join(parts) or "file"
