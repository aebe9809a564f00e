"""`hlwq-eval quantize` and `run_quantize`: a checkpoint, a record, tables; and what is refused."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM

from evalsuite.cli import app
from evalsuite.core.errors import StorageError, UsageError
from evalsuite.core.record import QuantizeResult, Record
from evalsuite.core.spec import QuantizeSpec
from evalsuite.data.models import Checkpoint
from evalsuite.quant.recipe import Recipe
from evalsuite.run import quantize as quantize_run
from evalsuite.run.quantize import run_quantize
from evalsuite.store.runs import RunStore, load_record
from quant.files import load_state


class Silent:
    """A progress that can end the run at some share of it."""

    def __init__(self, end_at: float = 2.0) -> None:
        self.end_at = end_at
        self.phases: list[str] = []

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def quantized(self, progress: Any) -> None:
        if progress.done >= self.end_at * progress.total:
            raise KeyboardInterrupt


def run(source: Path | str, out: Path, store: Path, watch: Silent | None = None, **recipe: Any):
    spec = QuantizeSpec(source=str(source), recipe=Recipe(**recipe).as_dict(), device="cpu")
    return run_quantize(spec, out, RunStore(store), watch or Silent())


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["hlwq-eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        app.main()
    return int(ended.value.code or 0)


def quantized(record: Record) -> QuantizeResult:
    assert isinstance(record.results, QuantizeResult)
    return record.results


def test_the_record_and_its_rows(llama: Path, tmp_path: Path):
    path, record = run(llama, tmp_path / "out", tmp_path / "results")
    assert path.parent == tmp_path / "results" / "llama"
    assert path.name.startswith("quantize-")
    assert path.name.endswith(record.spec_hash)
    assert load_record(path) == record
    result = quantized(record)
    rows = pd.read_parquet(path / "tensors.parquet")
    assert record.files == ("tensors.parquet",)
    assert rows["bytes_after"].sum() == result.bytes_after
    assert rows["squared_error"].sum() == pytest.approx(result.total.squared_error)
    for field in ("weights", "squared_error", "outliers", "bytes_after"):
        by_layer = sum(getattr(part, field) for part in result.layers)
        assert by_layer == pytest.approx(getattr(result.total, field)), field
    assert {part.layer for part in result.layers} == {0, 1, 2}
    assert result.fingerprint == Checkpoint("out", tmp_path / "out").fingerprint()
    assert result.source_fingerprint == Checkpoint("llama", llama).fingerprint()
    assert result.bits_per_weight == result.code_bits_per_weight
    assert "out" not in json.dumps(record.spec)  # where a result lies decides nothing about it


def test_decoded_weights_count_the_bits_of_their_codes(llama: Path, tmp_path: Path):
    result = quantized(run(llama, tmp_path / "out", tmp_path / "results", format="bf16")[1])
    assert result.bits_per_weight == 16
    assert result.code_bits_per_weight == pytest.approx(5.125, abs=0.02)
    rtn = quantized(run(llama, tmp_path / "rtn", tmp_path / "results", method="rtn", format="bf16")[1])
    assert rtn.code_bits_per_weight == pytest.approx(4.125, abs=0.02)


def test_an_interrupted_run_says_so_and_is_finished_by_the_next(llama: Path, tmp_path: Path):
    out, results = tmp_path / "out", tmp_path / "results"
    with pytest.raises(KeyboardInterrupt):
        run(llama, out, results, Silent(end_at=0.6))
    (unfinished,) = (results / "llama").iterdir()
    assert unfinished.suffix == ".partial"
    assert load_record(unfinished).status == "interrupted"
    assert not out.exists()
    path, record = run(llama, out, results)
    assert list((results / "llama").iterdir()) == [path]
    result = quantized(record)
    assert 0 < result.bytes_read < result.bytes_before  # the finished shards were left alone
    whole = run(llama, tmp_path / "whole", results)[1]
    assert quantized(whole).classes == result.classes


def test_a_refused_request_leaves_no_trace(llama: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="exists"):
        run(llama, tmp_path, tmp_path / "results")
    with pytest.raises(UsageError, match="is the source"):
        run(llama, llama, tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.fixture
def gguf(llama: Path, monkeypatch: pytest.MonkeyPatch):
    """`model.gguf` stands for the tiny Llama: the checkpoint says GGUF, and the export copies a folder."""

    def export(checkpoint: Checkpoint, folder: Path) -> None:
        assert checkpoint.gguf
        shutil.copytree(llama, folder)

    fake = Checkpoint("tiny.gguf", llama, gguf="config.json")
    monkeypatch.setattr(quantize_run, "find_checkpoint", lambda _: fake)
    monkeypatch.setattr("evalsuite.engines.export.export_bf16", export)
    monkeypatch.setattr(quantize_run, "source_plan", _plan_of(llama))


def _plan_of(folder: Path):
    real = quantize_run.source_plan
    return lambda _, recipe, codes: real(Checkpoint("tiny", folder), recipe, codes=codes)


@pytest.mark.parametrize("end_at", [0.5, 2.0], ids=["interrupted", "whole"])
@pytest.mark.usefixtures("gguf")
def test_the_copy_of_a_gguf_is_removed(tmp_path: Path, end_at: float):
    watch = Silent(end_at)
    if end_at < 1:
        with pytest.raises(KeyboardInterrupt):
            run("tiny.gguf", tmp_path / "out", tmp_path / "results", watch)
    else:
        _, record = run("tiny.gguf", tmp_path / "out", tmp_path / "results", watch)
        assert "GGUF" in record.warnings[0]
    assert any("BF16 copy" in phase for phase in watch.phases)
    assert not (tmp_path / "out.source").exists()


class TestExport:
    def test_the_copy_has_the_weights_and_their_time(self, tmp_path: Path):
        from evalsuite.engines import export

        source = Path(app.__file__).parents[1] / "demo"
        checkpoint = Checkpoint("demo", source)
        export.export_bf16(checkpoint, tmp_path / "copy")
        found, expected = load_state(tmp_path / "copy"), load_state(source)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
        assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in expected.values())
        name = "model.embed_tokens.weight"
        assert found[name].equal(expected[name])
        weights = checkpoint.weight_files()[0].stat().st_mtime_ns
        assert {p.stat().st_mtime_ns for p in (tmp_path / "copy").iterdir()} == {weights}

    def test_no_room_is_known_before_the_first_byte(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        from evalsuite.engines import export

        monkeypatch.setattr(export, "free_disk_bytes", lambda _: 1000)
        source = Checkpoint("demo", Path(app.__file__).parents[1] / "demo")
        with pytest.raises(StorageError, match=r"needs 89\.8 MB"):
            export.export_bf16(source, tmp_path / "copy")
        assert not list(tmp_path.iterdir())


def test_the_command_prints_one_document(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out, results = tmp_path / "out", tmp_path / "results"
    options = ("--method", "rtn", "--scale", "mse", "--device", "cpu", "--results", results, "--json")
    assert command(monkeypatch, "quantize", llama, out, *options) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["spec"]["recipe"]["scale"] == "mse"
    assert (out / "config.json").is_file()
    assert "Left as they are" in printed.err
    pictures = {path.name for path in Path(document["path"]).iterdir()}
    assert {"quantization_error.png", "quantization_error.svg", "run.json", "tensors.parquet"} == pictures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--group-size", "96"), "There is no group size 96"),
        (("--hlwq-bits", "7"), "hlwq-bits"),
        (("--method", "rtn", "--format", "hlwq"), "stores HLWQ codes"),
        (("--method", "rtn", "--no-hadamard"), "has no effect"),
        (("--device", "tpu"), "tpu is no device"),
        (("--gpus", "0,1"), "is no device"),
        (("--gpus", "0", "--device", "cpu"), "both name a device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_impossible_options_exit_2(
    options: tuple[str, ...], message: str, llama: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    assert command(monkeypatch, "quantize", llama, tmp_path / "out", *options) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
