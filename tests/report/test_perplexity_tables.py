"""The tables of a run, against a golden file and for what they must not show."""

import os
from pathlib import Path
from typing import Any

import pytest

from evalsuite.core.record import CompareResult, PerplexityResult, Record
from evalsuite.report.perplexity import (
    compare_table,
    p_text,
    plus_minus,
    prefix_table,
    runs_table,
    segment_table,
    summary_table,
    with_interval,
)
from evalsuite.report.tables import Table

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def record() -> Record:
    return Record.model_validate_json((GOLDEN / "record.json").read_text())


@pytest.fixture
def result(record: Record) -> PerplexityResult:
    assert isinstance(record.results, PerplexityResult)
    return record.results


def compared(**changes: Any) -> CompareResult:
    data = {
        "baseline_run": "demo/a", "candidate_run": "demo/b", "windows": 1155, "scored_tokens": 295_680,
        "baseline_perplexity": 6.5613, "candidate_perplexity": 6.6613, "delta_ln_ppl": 0.015126,
        "low": 0.0141, "high": 0.0162, "p_value": 0.0005,
        "divergence": {
            "tokens": 295_680, "mean": 0.012345, "median": 0.004, "p99": 0.123456, "top1_agreement": 0.9512,
            "top1_agreement_low": 0.9496, "top1_agreement_high": 0.9528,
        },
    }  # fmt: skip
    return CompareResult.model_validate(data | changes)


def rows(table: Table[Any]) -> dict[str, str]:
    return dict(table.cells())


def test_the_golden_tables(record: Record, result: PerplexityResult):
    """HLWQ_EVAL_GOLDEN=write writes the file anew; read the difference before you keep it."""
    tables = (
        summary_table(record, result),
        prefix_table(result),
        segment_table(result),
        compare_table(compared()),
        runs_table([record]),
    )
    text = "\n\n".join(f"## {table.title}\n\n{table.to_markdown()}" for table in tables) + "\n"
    path = GOLDEN / "perplexity_tables.md"
    if os.environ.get("HLWQ_EVAL_GOLDEN") == "write":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (6.5613, 6.4713, 6.6573, "6.561 [6.471, 6.657]"),
        (6.5613, 5.0, 8.0, "6.6 [5.0, 8.0]"),
        (654.321, 600.0, 700.0, "654 [600, 700]"),
        (0.015126, 0.0141, 0.0162, "0.0151 [0.0141, 0.0162]"),
        (6.5613, None, None, "6.561"),
        (6.5, 6.5, 6.5, "6.5000 [6.5000, 6.5000]"),
        (-0.1234, -0.2, -0.05, "-0.123 [-0.200, -0.050]"),
    ],
)
def test_the_interval_decides_the_rounding(value: float, low: float | None, high: float | None, text: str):
    assert with_interval(value, low, high) == text


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (6.5613, 6.4713, 6.6573, "6.561 ± 0.093"),
        (654.3, 600.0, 700.0, "654 ± 50"),
        (6.5613, None, None, "6.561"),
    ],
)
def test_half_the_interval(value: float, low: float | None, high: float | None, text: str):
    assert plus_minus(value, low, high) == text


@pytest.mark.parametrize(
    ("p", "text"), [(None, ""), (0.0005, "p < 0.001"), (0.001, "p = 0.001"), (0.25, "p = 0.250")]
)
def test_p_values(p: float | None, text: str):
    assert p_text(p) == text


def test_the_summary_shows_the_sums_divided_once(record: Record, result: PerplexityResult):
    found = rows(summary_table(record, result))
    assert found["nats per token"] == f"{556173.3 / 295680:.4f}"
    assert found["perplexity, 95 % interval"] == "6.561 [6.471, 6.657]"
    assert found["windows"] == "1,155 of 1,155"
    assert found["peak GPU memory allocated"] == "2 GB"


def test_a_run_without_a_gpu_has_no_gpu_row(record: Record, result: PerplexityResult):
    assert record.telemetry is not None
    without = record.telemetry.model_copy(update={"gpu_allocated_peak_bytes": None})
    found = rows(summary_table(record.model_copy(update={"telemetry": without}), result))
    assert "peak memory of the process" in found
    assert not [name for name in found if "GPU" in name]


def test_the_caption_names_protocol_tokenizer_and_device(record: Record, result: PerplexityResult):
    caption = summary_table(record, result).caption
    for part in ("card-1155: context 1536, stride 256", "297,193 tokens", "qwen3.5", "a GPU [0]"):
        assert part in caption


def test_a_comparison_without_a_divergence_shows_dashes_and_why():
    table = compare_table(compared(divergence=None, divergence_absent="ppl-x kept no hidden.npy"))
    found = rows(table)
    unmeasured = [name for name, value in found.items() if value == "—"]
    assert len(unmeasured) == 4
    assert all("KL" in name or "most likely" in name for name in unmeasured)
    assert "ppl-x kept no hidden.npy" in table.caption


def test_a_comparison_without_intervals():
    found = rows(compare_table(compared(low=None, high=None, p_value=None)))
    assert found["Δ ln PPL, 95 % interval"] == "0.01513"


def test_a_comparison_shows_delta_with_interval_and_p():
    found = rows(compare_table(compared()))
    assert found["Δ ln PPL, 95 % interval"] == "0.0151 [0.0141, 0.0162], p < 0.001"
    assert found["same most likely token [%]"] == "95.12 [94.96, 95.28]"


def test_prefixes_and_segments_name_their_windows(result: PerplexityResult):
    assert [row[0] for row in prefix_table(result).cells()] == ["200", "1,155"]
    assert [row[0] for row in segment_table(result).cells()] == ["0–200", "200–1,155"]
    assert segment_table(result).cells()[1][2] == "6.557"  # no interval: four digits


def test_runs_side_by_side(record: Record):
    cells = runs_table([record, record]).cells()
    assert len(cells) == 2
    assert cells[0] == [
        "tiny|model (BF16 safetensors, bfloat16)",
        "torch",
        "wikitext-2, card-1155",
        "1,155",
        "6.561 ± 0.093",
        "0.6254",
        "2,957",
        "a GPU [0]",
    ]
