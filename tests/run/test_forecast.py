"""Predictions and refusals of cells on machines that are not this one."""

import pytest

from evalsuite.core.bandwidth import Bandwidth
from evalsuite.core.errors import EngineDied, UsageError
from evalsuite.core.record import Gpu, Machine
from evalsuite.core.spec import Serving, Workload
from evalsuite.core.sweep import Axes, cells
from evalsuite.data.corpora import load_corpus
from evalsuite.run.forecast import forecast, refuse_impossible
from evalsuite.run.subject import prepare

GPU = Bandwidth(
    device="g", copy_bytes_per_s=1e10, transfer_bytes_per_s=2e9, transfer_pieces_bytes_per_s=1e9,
    matrix_flop_per_s=1e12,
)  # fmt: skip


def machine(memory, gpus=1):
    names = tuple(Gpu(name="g", memory_bytes=memory) for _ in range(gpus))
    return Machine(platform="p", cpu="c", cpu_cores=1, ram_bytes=memory, gpus=names, python="3", packages={})


@pytest.fixture
def sweep(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a text that is long enough for a few prompts. " * 20)
    workload = Workload(corpus=str(path), input_len=8, output_len=4, repeats=2)
    serving = Serving(engine="torch", dtype="bfloat16")
    subjects = {"demo": prepare("demo", serving, workload, load_corpus(str(path)))}

    def span(**axes):
        return cells(Axes(**{"models": ("demo",)} | axes), serving, workload), subjects

    return span


def test_a_cell_fits_if_weights_and_requests_do(sweep):
    chosen, subjects = sweep(gpus=(0,), cache_sizes=(8, None))
    (small, whole) = forecast(
        chosen, {name: one.checkpoint for name, one in subjects.items()}, machine(26_000_000), lambda gpu: GPU
    )
    assert (small.fits, whole.fits) == (True, True)
    (small, whole) = forecast(
        chosen, {name: one.checkpoint for name, one in subjects.items()}, machine(20_000_000), lambda gpu: GPU
    )
    assert (small.fits, whole.fits) == (True, False)
    assert whole.weights_bytes - small.weights_bytes == 2 * (128 - 8) * 98_304


def test_bounds_with_and_without_misses(sweep):
    chosen, subjects = sweep(gpus=(0,), cache_sizes=(8,))
    (one,) = forecast(
        chosen, {name: one.checkpoint for name, one in subjects.items()}, machine(10**9), lambda gpu: GPU
    )
    copied = 2 * 8 * 98_304
    assert 1 / one.all_misses_tokens_per_s - 1 / one.tokens_per_s == pytest.approx(copied / 1e9)


def test_a_device_that_cannot_be_measured_has_no_bound(sweep):
    def fails(gpu):
        raise EngineDied("It is busy.")

    chosen, subjects = sweep(gpus=(0,))
    (one,) = forecast(chosen, {name: one.checkpoint for name, one in subjects.items()}, machine(10**9), fails)
    assert (one.tokens_per_s, one.fits, one.absent) == (None, True, "It is busy.")


@pytest.mark.parametrize(
    ("axes", "gpus", "said"),
    [
        ({"gpus": (0, 3)}, 2, "There is no GPU 3: this machine has 2"),
        ({"tensor_parallel_sizes": (2,)}, 0, "needs as many GPUs"),
        ({"modes": ("graphs",)}, 0, "CUDA graphs need a GPU"),
        ({"modes": ("graphs",), "gpus": (0,)}, 1, "The torch engine has no CUDA graphs"),
        ({"concurrencies": (500,)}, 0, "too few for 1500 different prompts"),
    ],
)
def test_what_no_engine_can_do_is_refused(sweep, axes, gpus, said):
    with pytest.raises(UsageError, match=said):
        refuse_impossible(*sweep(**axes), machine(10**9, gpus))
    refuse_impossible(*sweep(), machine(10**9, gpus))
