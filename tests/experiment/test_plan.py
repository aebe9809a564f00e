"""What an evaluation will take: sizes from configurations, times from measured rates."""

import io

import pytest
from rich.console import Console

from evalsuite.core.bandwidth import Bandwidth
from evalsuite.core.errors import EngineDied
from evalsuite.core.record import Gpu, Machine
from evalsuite.core.spec import Serving
from evalsuite.data.models import find_checkpoint
from evalsuite.engines.predict import predict_geometry
from evalsuite.experiment.evaluation import Evaluation
from evalsuite.experiment.models import Models
from evalsuite.experiment.plan import Planner
from evalsuite.report.evaluation import PlannedCell, StepOutcome, outcome_table, plan_table, refusal_table
from evalsuite.report.terminal import OnTerminal
from evalsuite.store.runs import RunStore

RATES = Bandwidth(
    device="d", copy_bytes_per_s=1e9, transfer_bytes_per_s=1e8, transfer_pieces_bytes_per_s=1e8,
    matrix_flop_per_s=1e11,
)  # fmt: skip
STEPS = {
    "ppl": {"command": "ppl", "limit": 5, "context": 64, "stride": 32, "dtype": "bfloat16"},
    "speed": {
        "command": "speed", "engine": "torch", "dtype": "bfloat16", "modes": "eager", "input_len": 16,
        "output_len": 8, "repeats": 3, "warmup": 2, "cache_sizes": [8, "all"],
    },
    "footprint": {
        "command": "footprint", "engine": "torch", "dtype": "bfloat16", "input_len": 16, "output_len": 8, "idle": 1.5,
    },
    "cache": {"command": "cache", "requests": 2, "input_len": 10, "output_len": 6},
}  # fmt: skip


def machine(*gpus):
    found = tuple(Gpu(name="g", memory_bytes=size) for size in gpus)
    return Machine(platform="p", cpu="c", cpu_cores=1, ram_bytes=10**9, gpus=found, python="3", packages={})


@pytest.fixture
def plan(tmp_path):
    def make(name, on=None, rates=lambda gpu: RATES, **changes):
        evaluation = Evaluation.model_validate(
            {"question": "?", "candidate": "demo", "steps": [STEPS[name] | changes]}
        )
        subjects = Models(evaluation, tmp_path).before(tmp_path)
        store = RunStore(tmp_path / "results")
        planner = Planner(evaluation, subjects, store, tmp_path, on or machine(), rates)
        return planner.cells(evaluation.chosen(())[0])

    return make


@pytest.fixture(scope="module")
def geometry():
    return predict_geometry(find_checkpoint("demo"), Serving(engine="torch", dtype="bfloat16"))


def test_a_perplexity_takes_two_operations_a_number_and_token(plan, geometry):
    (cell,) = plan("ppl")
    assert cell.seconds == pytest.approx(2 * geometry.token_weights * 5 * 64 / 1e11)
    assert cell.weights_bytes == geometry.total_bytes
    assert (cell.fits, cell.done, cell.engine, cell.device_bytes) == (True, False, "torch", 10**9)
    assert cell.disk_bytes is None
    (kept,) = plan("ppl", keep_hidden=True)
    assert kept.disk_bytes == 2 * 128 * (5 * 32 + 257)


def test_a_cell_takes_its_rounds_at_the_bound(plan, geometry):
    cached, whole = plan("speed")
    step_s = geometry.step_bytes(1, 16 + 8 / 2) / 1e9
    for cell in (cached, whole):
        assert cell.seconds == pytest.approx((3 + 2) * 8 * step_s)
    assert whole.weights_bytes - cached.weights_bytes == 2 * (128 - 8) * geometry.expert_bytes
    (footprint,) = plan("footprint")
    assert footprint.seconds == pytest.approx(1.5 + 8 * step_s)


def test_without_rates_there_are_sizes_and_no_times(plan):
    def fails(gpu):
        raise EngineDied("The device is busy.")

    for rates in (None, fails):
        (cell,) = plan("ppl", rates=rates)
        assert (cell.seconds, cell.fits) == (None, True)
        cell, _ = plan("speed", rates=rates)
        assert (cell.seconds, cell.fits) == (None, True)
    assert cell.unknown == "The device is busy."


def test_memory_is_held_against_the_gpu_that_is_there(plan):
    cells = plan("speed", on=machine(20_000_000), gpus=0)
    assert [(cell.device_bytes, cell.fits) for cell in cells] == [(20_000_000, True), (20_000_000, False)]


def test_what_a_machine_cannot_do_is_said_with_its_sizes(plan):
    cells = plan("speed", gpus=3)
    assert all(cell.refused.startswith("There is no GPU 3") for cell in cells)
    assert all(cell.weights_bytes and cell.device_bytes is None and cell.fits is None for cell in cells)
    refused = plan("speed", cache_sizes=[200])
    assert refused[0].refused.startswith("A cache of 200 experts was asked for")


def test_a_trace_counts_its_tokens(plan):
    (cell,) = plan("cache")
    assert "32 tokens" in cell.what
    assert (cell.done, cell.engine) == (False, "torch")


def test_the_tables_say_what_is_missing_and_what_is_not_known():
    there = PlannedCell("a", "x", done=True, seconds=9.0)
    slow = PlannedCell("b", "y", seconds=90.0, weights_bytes=5, device_bytes=10)
    lost = PlannedCell("c", "z", unknown="nobody knows..")
    refused = PlannedCell("d", "w", refused="no\nGPU")
    table = plan_table([there, slow, lost, refused], "a GPU")
    assert table.title == "4 measurements, 1 of them there"
    assert [row[1] for row in table.cells()] == ["there", "missing", "missing", "not possible"]
    assert [row[-1] for row in table.cells()] == ["—", "1 min 30 s", "unknown", "unknown"]
    assert "takes more than 1 min 30 s. For 1 of it no time is known. Nobody knows." in table.said
    assert "takes more" not in plan_table([there, refused], "a GPU").said
    console = Console(width=80, file=io.StringIO())
    console.print(OnTerminal(table))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.rstrip().endswith("at least ┃") for line in lines)  # nothing is cut off
    found = refusal_table([there, refused, refused])
    assert found is not None
    assert found.cells() == [["d", "no GPU"]]
    assert refusal_table([there]) is None


def test_reasons_are_a_column_where_there_are_any():
    fine = StepOutcome("a", "ppl", "ok", 3.0)
    assert outcome_table("?", [fine]).headings() == ["step", "status", "time"]
    failed = StepOutcome("b", "ppl", "failed", 1.0, "it\nbroke")
    assert outcome_table("?", [fine, failed]).cells()[1] == ["b", "failed", "1.0 s", "it broke"]
