"""Drafts from cards: what a table says is taken, what it does not stays a comment, and the draft loads."""

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.core.errors import UsageError
from evalsuite.report.claim_draft import draft
from evalsuite.report.claim_verdicts import judge
from evalsuite.report.claims import Claims

CARD = """\
# A **Model**, 7B

Fast.

## Results

| Metric | INT4 | BF16 |
|---|---|---|
| Perplexity | 6.10 | not measured |
| Speed | ~1,234.5 tok/s | 16 tokens/s |
| Download | 19.5 GB | 72 GiB |
| vs BF16 | 1.46x faster | baseline |
| Stars | 17 | |

## By prefix

| Windows | Tokens scored | PPL |
|---|---:|:---:|
| 200 | 51,200 | 6.58 |
| 1,155 | 295,680 | **6.56** |

## GPUs

| GPU | VRAM | Config | Expected speed |
|---|---|---|---|
| RTX 4090 | 24 GB | `--moe-expert-cache-size 4` | ~30 tok/s |
| A100 80GB | 80 GB | eager | see issue |

## Architecture

| Property | Value |
|---|---|
| Total Parameters | 35B |
| Active per token | ~3B (8 of 256) |
| Layers | 28 transformer layers |
| Load | 90 |
"""


def drafted(card: str) -> dict[str, dict[str, Any]]:
    found = draft(card, "card.md")
    claims = Claims.model_validate(tomllib.loads(found.text))
    assert len(claims.claim) == found.claims
    return {c.id: c.model_dump(exclude_defaults=True) for c in claims.claim}


def test_a_card_becomes_claims():
    claims = drafted(CARD)
    expected = {
        "perplexity-int4": {"metric": "perplexity", "value": 6.1, "quote": "6.10", "where": "Results"},
        "perplexity-bf16": {"words": "not measured", "model": "bf16"},
        "speed-int4": {
            "metric": "speed",
            "value": 1234.5,
            "approximate": True,
            "unit": "tok/s",
            "model": "int4",
        },
        "speed-bf16": {"metric": "speed", "value": 16, "unit": "tok/s"},
        "download-int4": {"metric": "download", "value": 19.5, "unit": "GB"},
        "download-bf16": {"value": 72, "unit": "GiB"},
        "200-tokens-scored": {"metric": "scored_tokens", "value": 51_200, "windows": 200, "model": "model"},
        "1-155-ppl": {"metric": "perplexity", "value": 6.56, "windows": 1155, "where": "By prefix"},
        "rtx-4090-vram": {"metric": "gpu_memory", "value": 24, "gpu": "RTX 4090"},
        "rtx-4090-expected-speed": {"metric": "speed", "value": 30, "cache": 4, "gpu": "RTX 4090"},
        "a100-80gb-expected-speed": {"metric": "speed", "words": "see issue", "gpu": "A100"},
        "total-parameters-value": {"metric": "parameters", "value": 35, "unit": "billion"},
        "active-per-token-value": {"metric": "active_parameters", "value": 3, "approximate": True},
        "layers-value": {"metric": "layers", "value": 28},
    }
    for name, keys in expected.items():
        assert keys.items() <= claims[name].items(), name
    assert not {name for name in claims if name.startswith(("vs-bf16", "stars", "load"))}


def test_what_is_not_understood_stays_as_a_comment():
    found = draft(CARD, "card.md")
    comments = [line for line in found.text.splitlines() if line.startswith("# not understood")]
    assert len(comments) == found.left == 3
    for words in ("1.46x faster", "17", "90"):
        assert any(line.endswith(f": {words}") for line in comments)
    assert 'metric = "ratio"' in found.text


def test_a_draft_can_be_checked_at_once_and_finds_shifted_columns():
    claims = Claims.model_validate(tomllib.loads(draft(CARD, "card.md").text))
    judged = {item.claim.id: item for item in judge(claims)}
    assert "columns shifted" in judged["a100-80gb-expected-speed"].notes[0]
    assert judged["1-155-tokens-scored"].verdict == "holds"
    assert not {item.verdict for item in judged.values()} - {"holds", "not measured"}


def test_a_card_copied_without_blank_lines():
    card = "Some words\nMore words\n| Model | PPL |\n|---|---|\n| A | 6.5 |\nA sentence with 12 GB.\n"
    claims = drafted(card)
    assert list(claims) == ["a-ppl"]
    assert claims["a-ppl"]["where"] == "More words"


@pytest.mark.parametrize("card", ["", "No table, 37.4 tok/s.", "| A | B |\n|---|---|\n| x | y |\n"])
def test_a_card_without_claims_is_refused(card: str):
    with pytest.raises(UsageError, match="no table with a number"):
        draft(card, "card.md")


CELL = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


FIGURE = st.text("0123456789.,~×x%GBtok/s ٣", max_size=14)


@given(label=FIGURE, cells=st.tuples(FIGURE, FIGURE, FIGURE))
def test_whatever_number_stands_in_a_card_the_draft_loads(label: str, cells: tuple[str, str, str]):
    card = (
        f"| Windows | PPL | Speed | --moe-expert-cache-size {cells[0]} |\n|---|---|---|---|\n"
        f"| {label} | {cells[0]} | {cells[1]} | --moe-expert-cache-size {cells[2]} |\n"
        "\n| Model | Speed |\n|---|---|\n| x | 1 tok/s |\n"
    )
    found = draft(card, "card.md")
    assert len(Claims.model_validate(tomllib.loads(found.text)).claim) == found.claims >= 1


def test_a_paragraph_of_white_space_is_no_heading():
    assert draft("\xa0\n\n| Model | Speed |\n| - | - |\n| x | 5 tok/s |\n", "card").claims == 1


@given(title=CELL, label=CELL, cell=CELL, number=st.integers(1, 10**6), name=CELL)
def test_whatever_stands_in_a_card_the_draft_loads(title: str, label: str, cell: str, number: int, name: str):
    card = (
        f"# {title}\n\n| {title} | PPL | {cell} |\n|---|---|---|\n| {label} | {number} | {cell} |\n"
        f"\n| Model | Speed |\n|---|---|\n| x | {number} tok/s |\n"
    )
    found = draft(card, name)
    assert len(Claims.model_validate(tomllib.loads(found.text)).claim) == found.claims >= 1
