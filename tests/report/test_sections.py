"""A report from records: what is in it, what it refuses to put beside what, and what it says of bad input."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from evalsuite.core.errors import UsageError
from evalsuite.report.sections import Report, build_report
from evalsuite.report.tables import Table
from evalsuite.report.writers import to_document, to_markdown
from report.record_files import copy_runs, edit, machine, model, speed_record, store

GOLDEN = Path(__file__).parents[1] / "golden" / "report.md"
# named one by one: a run of `make demo` may lie beside them
OF_ONE_NAME = (
    "demo/ppl-20261123T*", "demo/ppl-20261125T021112Z-*", "demo/compare-20261125T021424Z-*",
)  # fmt: skip
PAIR = (
    "demo/ppl-20261123T210622Z-*",
    "demo/quantize-20261123T210636Z-*",
    "demo-rtn-int4-0ffffe92/*-20261123T*",
)


def tables(report: Report, anchor: str) -> list[Table[Any]]:
    section = report.section(anchor)
    assert section is not None, anchor
    return list(section.tables)


def rows(table: Table[Any]) -> list[dict[str, str]]:
    return [dict(zip(table.names(), row, strict=True)) for row in table.cells()]


def test_the_golden_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """HLWQ_EVAL_GOLDEN=write writes the file anew; read the difference before you keep it."""
    monkeypatch.chdir(GOLDEN.parents[2])  # the geometry's folder is named from there
    copy_runs(tmp_path / "results", *PAIR, "qwen3.5-35b-a3b-int4/speed-20261125T011*")
    report = build_report([tmp_path / "results"])
    made = to_markdown(report, ["md"]).replace(str(tmp_path / "results"), "results")
    if os.environ.get("HLWQ_EVAL_GOLDEN") == "write":
        GOLDEN.write_text(made)
    assert made == GOLDEN.read_text()


class TestBadInput:
    def test_an_empty_folder(self, tmp_path: Path):
        with pytest.raises(UsageError, match="holds no finished run that can be read"):
            build_report([tmp_path])

    def test_a_folder_of_one_model(self, tmp_path: Path):
        store(tmp_path, speed_record("a"))
        with pytest.raises(UsageError, match="holds the runs of one model") as refused:
            build_report([tmp_path / "a"])
        assert refused.value.todo == f"give {tmp_path} with --model a."

    def test_no_folder(self, tmp_path: Path):
        with pytest.raises(UsageError, match="There is no folder"):
            build_report([tmp_path / "none"])

    def test_a_model_that_nothing_is_of(self, tmp_path: Path):
        store(tmp_path, speed_record("a"))
        with pytest.raises(UsageError, match="no finished run of b"):
            build_report([tmp_path], models=["b"])

    def test_a_truncated_record_is_named_in_the_report(self, tmp_path: Path):
        store(tmp_path, speed_record("a"), speed_record("b"))
        record = next((tmp_path / "b").iterdir()) / "run.json"
        record.write_text(record.read_text()[:200])
        report = build_report([tmp_path])
        assert [run.record.run_id.partition("/")[0] for run in report.runs] == ["a"]
        assert len(report.warnings) == 1
        assert "left out" in report.warnings[0]
        assert record.parent.name in report.warnings[0]
        assert record.parent.name in to_markdown(report, ["md"])
        assert to_document(report)["warnings"] == list(report.warnings)

    def test_another_schema_version_is_refused_by_name(self, tmp_path: Path):
        store(tmp_path, speed_record("a"), speed_record("b"))
        folder = next((tmp_path / "b").iterdir())
        edit(folder, lambda data: data.update(schema_version=99))
        (warning,) = build_report([tmp_path]).warnings
        assert folder.name in warning
        assert "schema 99" in warning

    def test_an_older_schema_version_is_read(self, tmp_path: Path):
        store(tmp_path, speed_record("a"))
        edit(next((tmp_path / "a").iterdir()), lambda data: data.update(schema_version=1))
        assert build_report([tmp_path]).warnings == ()

    def test_only_damaged_records(self, tmp_path: Path):
        store(tmp_path, speed_record("a"))
        (next((tmp_path / "a").iterdir()) / "run.json").write_text("{")
        with pytest.raises(UsageError, match="no finished run") as caught:
            build_report([tmp_path])
        assert "not valid JSON" in str(caught.value)

    def test_samples_that_are_missing_are_named_and_the_tables_stay(self, tmp_path: Path):
        copy_runs(tmp_path / "results", *PAIR)
        cells = [speed_record(decode=10.0 + size, size=size) for size in (8, 64)]
        store(tmp_path / "results", *cells, speed_record(eager=True))
        for path in (tmp_path / "results").glob("*/*/*.parquet"):
            path.unlink()
        report = build_report([tmp_path / "results"], figures=tmp_path / "figures")
        assert len(tables(report, "perplexity")) == 2
        assert "same tokens [%] ↑" not in tables(report, "cache")[0].names()
        said = " ".join(report.warnings)
        assert "no picture convergence" in said
        assert "no tokens compared for m/speed" in said

    @pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a|b", "50%_&#$x", "[x](http://y)", "*b*"])
    def test_special_characters_stay_text(self, tmp_path: Path, name: str):
        store(tmp_path, speed_record("safe", model=model(name)))
        report = build_report([tmp_path])
        made = to_markdown(report, ["md"])
        assert "<script" not in made.replace("\\<script", "")
        for section in report.sections:
            for table in section.tables:
                for line in table.to_markdown().split("\n\n")[0].split("\n"):
                    assert line.replace("\\|", "").count("|") == len(table.columns) + 1
                assert json.loads(json.dumps(table.to_json())) is not None
                body = table.to_latex().splitlines()
                assert all(
                    line.replace("\\&", "").count("&") == len(table.columns) - 1
                    for line in body
                    if line.endswith(r" \\")
                )
        assert rows(tables(report, "headline")[0])[0]["model"] == name


class TestPerplexity:
    def test_protocols_have_tables_of_their_own(self, tmp_path: Path):
        copy_runs(tmp_path, "smollm2/ppl-*")
        report = build_report([tmp_path])
        found = [t for t in tables(report, "perplexity") if t.title.startswith("Perplexity")]
        assert [len(t.rows) for t in found] == [1, 1]
        assert {t.title for t in found} == {
            "Perplexity: wikitext-2, card-1155, 1,186 windows", "Perplexity: wikitext-2, paper, 592 windows",
        }  # fmt: skip
        values = {row["perplexity ↓"] for t in found for row in rows(t)}
        assert values == {"18.7 ± 1.2", "19.0 ± 1.0"}, "never averaged"
        section = report.section("perplexity")
        assert section is not None
        assert "not to be compared" in section.note

    def test_runs_of_one_name_are_told_apart(self, tmp_path: Path):
        copy_runs(tmp_path / "results", *OF_ONE_NAME, PAIR[2])
        report = build_report([tmp_path / "results"], figures=tmp_path / "figures")
        titles = [table.title for section in report.sections for table in section.tables]
        assert len(set(titles)) == len(titles)
        assert {t.partition(": ")[2] for t in titles if t.startswith("Paired")} == {
            "engines, builtin of CPython 3.11.7, card-1155, 1,155 windows",
            "demo, builtin of CPython 3.12.3, card-1155, 1,155 windows",
        }
        for anchor in ("headline", "perplexity"):
            named = [[row["model"] for row in rows(table)] for table in tables(report, anchor)]
            assert ["demo (vllm)", "demo (torch)"] in named, anchor
            assert all(len(set(names)) == len(names) for names in named)
        (both,) = [t for t in tables(report, "perplexity") if len({r.run_id for r in t.rows}) == 2
                   and t.title.startswith("Perplexity: builtin of CPython 3.11.7")]  # fmt: skip
        assert [row["engine"] for row in rows(both)] == ["vllm", "torch"], "an older record names none"
        pictures = {picture.name: picture for section in report.sections for picture in section.pictures}
        assert "of demo (vllm), demo (torch)" in next(
            p.alt for name, p in pictures.items() if name.startswith("convergence-builtin-of-cpython-3-11")
        )
        drawn = (
            tmp_path / "figures" / "convergence-builtin-of-cpython-3-11-7-card-1155-1-155-windows.svg"
        ).read_text()
        assert "demo (vllm)" in drawn
        assert "demo (torch)" in drawn
        assert not any("demo (vllm) against" in picture.alt for picture in pictures.values()), (
            "one checkpoint"
        )

    def test_a_baseline_that_is_not_there_is_told_from_one_of_its_name(self, tmp_path: Path):
        copy_runs(tmp_path, "demo/ppl-20261123T213431Z-*", "demo/compare-20261125T*", PAIR[2])
        report = build_report([tmp_path])
        titles = [table.title for table in tables(report, "comparison")]
        assert len(set(titles)) == 2
        assert "demo (ppl-20261123T210622Z-e09cfbb4e7ac)" in " ".join(titles)

    def test_the_headline_holds_a_model_against_its_baseline(self, tmp_path: Path):
        copy_runs(tmp_path, *PAIR)
        (table,) = tables(build_report([tmp_path]), "headline")
        base, quantized = rows(table)
        assert base["Δ ln PPL ↓"] == "—"
        assert quantized["Δ ln PPL ↓"] == "0.0667 ± 0.0034"
        assert quantized["of baseline [×] ↓ (derived)"] == "0.274"
        place = table.names().index("Δ ln PPL ↓")
        (cell,) = [row[place] for row in table.grid() if row[place].text]
        assert sorted(run.partition("/")[2].partition("-")[0] for run in cell.runs) == [
            "compare",
            "ppl",
            "ppl",
        ]

    def test_every_number_leads_to_a_run_of_the_report(self, tmp_path: Path):
        copy_runs(tmp_path, *PAIR, "qwen3.5-35b-a3b-int4/speed-20261125T011*")
        report = build_report([tmp_path])
        known = {record.run_id for record in report.records}
        for section in report.sections:
            for table in section.tables:
                for row in table.grid():
                    for cell in row:
                        assert set(cell.runs) <= known
        table = tables(report, "perplexity")[0]
        assert all(row[table.names().index("perplexity ↓")].runs for row in table.grid())


class TestSpeed:
    def test_a_cell_that_failed_shows_and_is_compared_with_nothing(self, tmp_path: Path):
        store(tmp_path, speed_record(eager=True), speed_record(status="oom"))
        report = build_report([tmp_path])
        speeds = {row["mode"]: row["decode [tok/s] ↑"] for row in rows(tables(report, "speed")[0])}
        assert speeds == {"eager": "100.0 ± 1.0", "graphs": "out of memory"}
        (pair,) = rows(tables(report, "modes")[0])
        assert (pair["eager [tok/s] ↑"], pair["graphs [tok/s] ↑"]) == ("100.0 ± 1.0", "out of memory")
        assert pair["graphs over eager"] == "—"
        (failed,) = rows(tables(report, "failures")[0])
        assert failed["why"] == "CUDA out of memory."

    def test_graphs_over_eager(self, tmp_path: Path):
        store(tmp_path, speed_record(decode=20, eager=True, half=1), speed_record(decode=200, half=20))
        (pair,) = rows(tables(build_report([tmp_path]), "modes")[0])
        # relative half widths 5 % and 10 %, in squares 11.2 % of 10
        assert pair["graphs over eager (derived)"] == "10.0 ± 1.1"

    def test_cache_sizes(self, tmp_path: Path):
        cells = [speed_record(decode=10.0 + size, size=size) for size in (64, 8)]
        store(tmp_path, *cells, speed_record(decode=100.0), speed_record("other"))
        (table,) = tables(build_report([tmp_path]), "cache")
        found = rows(table)
        assert [row["cache"] for row in found] == ["8", "64", "all"]
        assert [row["hits [%] ↑"] for row in found] == ["6.2", "50.0", "—"]
        assert [row["moved a step [MB] ↓"] for row in found] == ["5", "5", "—"]
        assert "out of 128" in table.caption

    def test_speeds_are_held_against_the_baseline_of_the_same_conditions_only(self, tmp_path: Path):
        int4 = speed_record("int4", 300.0, stored="INT4 safetensors", half=3)
        store(tmp_path, int4, speed_record("bf16", 150.0, half=1.5))
        by_model = {row["model"]: row for row in rows(tables(build_report([tmp_path]), "headline")[0])}
        assert by_model["int4"]["of baseline [×] ↑ (derived)"] == "2.000 ± 0.028"
        assert by_model["bf16"]["of baseline [×] ↑ (derived)"] == "—"

    def test_a_baseline_with_another_driver_is_none(self, tmp_path: Path):
        int4 = speed_record("int4", 300.0, stored="INT4 safetensors")
        store(tmp_path, int4, speed_record("bf16", 150.0, machine=machine(driver="1")))
        names = tables(build_report([tmp_path]), "headline")[0].names()
        assert not any("baseline" in name for name in names)


def test_models_narrow_the_report(tmp_path: Path):
    store(tmp_path, speed_record("a"), speed_record("b"))
    assert {run.record.run_id[0] for run in build_report([tmp_path], models=["a"]).runs} == {"a"}


def test_pictures_are_drawn_once_each_and_listed(tmp_path: Path):
    copy_runs(tmp_path / "results", *PAIR)
    cells = [speed_record(decode=10.0 + size, size=size, weights=10**9 + size) for size in (8, 64)]
    store(tmp_path / "results", *cells, speed_record(eager=True), speed_record(decode=300.0))
    report = build_report([tmp_path / "results"], figures=tmp_path / "figures")
    pictures = [picture for section in report.sections for picture in section.pictures]
    assert {p.name.partition("-")[0] for p in pictures} >= {
        "convergence", "paired", "error", "cache", "hit", "modes", "memory", "vram",
    }  # fmt: skip
    for picture in pictures:
        assert picture.png.read_bytes().startswith(b"\x89PNG")
        assert "<svg" in picture.svg.read_text()
        assert picture.alt
        assert picture.caption
    assert len({picture.png for picture in pictures}) == len(pictures)
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == sorted(
        path.name for picture in pictures for path in (picture.png, picture.svg)
    )
    assert [w for w in report.warnings if "no picture over-time" in w], "the cells have no samples"


def test_a_name_that_looks_like_a_formula_is_drawn_as_it_stands(tmp_path: Path):
    odd = model(r"_a$\frac{x$_b%&<i>")
    cells = [speed_record(size=size, model=odd, weights=10**9 + (size or 0)) for size in (8, 64, None)]
    store(tmp_path / "results", *cells, speed_record(eager=True, model=odd, weights=3 * 10**9))
    report = build_report([tmp_path / "results"], figures=tmp_path / "figures")
    assert len([picture for section in report.sections for picture in section.pictures]) >= 4
