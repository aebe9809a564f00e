"""Records as a table: nothing lost, nothing invented, one type a column."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

import evalsuite
from evalsuite.core.errors import UsageError
from evalsuite.core.record import PerplexityResult
from evalsuite.report.export import to_frame
from evalsuite.store.runs import load_records

RESULTS = Path(__file__).resolve().parents[2] / "results"


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return evalsuite.load_results(RESULTS)


def test_a_row_a_run_and_all_kinds(frame: pd.DataFrame):
    records, _ = load_records(RESULTS)
    assert list(frame["run_id"]) == [record.run_id for record in records]
    assert {"ppl", "compare", "quantize"} <= set(frame["kind"])
    assert frame["run_id"].is_unique
    assert list(frame.columns[:3]) == ["run_id", "kind", "status"]


def test_numbers_are_those_of_the_records(frame: pd.DataFrame):
    records, _ = load_records(RESULTS)
    for record, (_, row) in zip(records, frame.iterrows(), strict=True):
        if isinstance(record.results, PerplexityResult):
            assert row["results.perplexity"] == record.results.perplexity
            assert row["results.windows"] == record.results.windows
        else:
            assert pd.isna(row["results.perplexity"]), "what a run does not have is missing"
        assert row["gpus"] == len(record.machine.gpus)
        assert row["machine.packages.torch"] == record.machine.packages["torch"]


def test_it_survives_parquet_and_csv(frame: pd.DataFrame, tmp_path: Path):
    frame.to_parquet(tmp_path / "runs.parquet")
    again = pd.read_parquet(tmp_path / "runs.parquet")
    pd.testing.assert_frame_equal(again, frame)
    frame.to_csv(tmp_path / "runs.csv", index=False)
    assert len(pd.read_csv(tmp_path / "runs.csv")) == len(frame)


def test_numbers_in_some_runs_and_words_in_others_are_words(frame: pd.DataFrame):
    records, _ = load_records(RESULTS)
    one = next(record for record in records if record.kind == "ppl")
    sized = one.model_copy(update={"spec": one.spec | {"batch_size": 8}})
    batch = to_frame([one, sized])["spec.batch_size"]
    assert list(batch) == ["auto", "8"]
    assert pd.api.types.is_float_dtype(frame["results.perplexity"])
    assert pd.api.types.is_integer_dtype(frame["results.windows"])


def test_no_runs_are_an_empty_table_and_no_folder_is_an_error(tmp_path: Path):
    empty = evalsuite.load_results(tmp_path)
    assert len(empty) == 0
    assert "run_id" in empty.columns
    with pytest.raises(UsageError, match="no folder"):
        evalsuite.load_results(tmp_path / "none")


def test_a_damaged_record_is_left_out_with_a_warning(tmp_path: Path):
    run = next((RESULTS / "demo").glob("ppl-*"))
    shutil.copytree(run, tmp_path / "demo" / run.name)
    (tmp_path / "demo" / "ppl-cut-1").mkdir()
    (tmp_path / "demo" / "ppl-cut-1" / "run.json").write_text('{"schema_version": 1, "run_')
    with pytest.warns(UserWarning, match="left out.*ppl-cut-1"):
        frame = evalsuite.load_results(tmp_path)
    assert len(frame) == 1
    assert len(frame.attrs["left_out"]) == 1
