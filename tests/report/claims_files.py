"""Claims for tests: the shipped file, changed or not, and small ones made on the spot."""

import tomllib
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from evalsuite.report.claim_verdicts import RULES
from evalsuite.report.claims import Claims

SHIPPED = Path(__file__).resolve().parents[2] / "experiments" / "claims" / "qwopus_35b_a3b.toml"


@cache
def _shipped() -> dict[str, Any]:
    return tomllib.loads(SHIPPED.read_text(encoding="utf-8"))


def shipped(changes: dict[str, dict[str, Any] | None] | None = None, **tables: Any) -> Claims:
    """The shipped file; a claim's keys are replaced (None removes one), or the claim is left out (None)."""
    data = deepcopy(_shipped()) | tables
    changes = changes or {}
    kept = []
    for claim in data["claim"]:
        change = changes.get(claim["id"], {})
        if change is not None:
            whole = claim | change
            kept.append({key: value for key, value in whole.items() if value is not None})
    return Claims.model_validate(data | {"claim": kept})


def claim(claim_id: str = "a", metric: str = "speed", value: Any = 10, unit: str = "tok/s", **keys: Any):
    if not {"low", "words"} & keys.keys():
        keys["value"] = value
    known = {
        "id": claim_id,
        "where": "a table",
        "quote": "some words",
        "model": "m",
        "metric": metric,
        "unit": unit,
    }
    return known | keys


def small(*claims: dict[str, Any], **tables: Any) -> Claims:
    """A file of these claims about model ``m`` (INT4) and its BF16 ``b``, both of the shipped geometry."""
    geometry = _shipped()["geometry"]
    models = {
        "m": {"title": "M", "names": ["owner/m"], "stored": "INT4", "geometry": "qwen3_5_moe_35b"},
        "b": {"title": "B", "stored": "BF16", "geometry": "qwen3_5_moe_35b"},
        "other": {"title": "Other"},
    }
    data = {
        "card": {"title": "A card", "source": "here"}, "models": models, "geometry": geometry,
        "gpus": _shipped()["gpus"], "texts": _shipped()["texts"], "claim": list(claims),
    }  # fmt: skip
    return Claims.model_validate(data | tables)


def found(claims: Claims) -> dict[tuple[str, str], str]:
    """Rule and claim of every finding that speaks against a claim or asks about it, with the kind."""
    return {
        (rule.__name__, finding.claim): finding.kind
        for rule in RULES
        for finding in rule(claims)
        if finding.kind not in ("holds", "agrees")
    }
