"""Command lines made from specs: read by the command line itself, they give the specs back."""

import shlex
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite.cli.app import main
from evalsuite.core.protocol import PROTOCOLS
from evalsuite.core.spec import FootprintSpec, PerplexitySpec, QuantizeSpec, Serving, SpeedSpec, Workload
from evalsuite.core.sweep import cells
from evalsuite.report.commands import command, commands, shell_line, sweeps


class Stopped(Exception):
    pass


@pytest.fixture
def read(monkeypatch):
    """What the command line would run; nothing is run."""

    def run(words):
        found = []

        def stop(*args, **kwargs):
            found.extend((args, kwargs))
            raise Stopped

        for place in (
            "evalsuite.cli.perplexity_run.measure", "evalsuite.cli.speed_run.measure",
            "evalsuite.cli.footprint_run.watch_model", "evalsuite.cli.quantize.quantize_model",
        ):  # fmt: skip
            monkeypatch.setattr(place, stop)
        line = shlex.split(shell_line(words))
        if line[0] == "CUDA_VISIBLE_DEVICES=":
            del line[0]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(Stopped):
            main()
        return found[0]

    return run


def record(spec, results=None):
    return SimpleNamespace(kind=spec.kind, spec=spec.model_dump(mode="json"), results=results)


PERPLEXITIES = (
    PerplexitySpec(model="a/b", corpus="wikitext-2", protocol=PROTOCOLS["card-1155"]),
    PerplexitySpec(model="a folder", corpus="builtin", protocol=PROTOCOLS["paper"], limit=7, keep_hidden=True),
    PerplexitySpec(
        model="demo", corpus="text's.txt", protocol=PROTOCOLS["gptq"].override(512), engine="vllm", dtype="float16",
        tokenizer="t", batch_size=4, tensor_parallel_size=2, moe_expert_cache_size=8, moe_expert_cache_policy="lfru",
        moe_expert_store="disk", gpu_memory_utilization=0.3, additional_config={"x": "y z"}, trust_remote_code=True,
    ),
    PerplexitySpec(model="demo", corpus="builtin", protocol=PROTOCOLS["hf"].override(64, 32), device="cuda:1"),
)  # fmt: skip


@pytest.mark.parametrize("spec", PERPLEXITIES, ids=lambda spec: spec.protocol.name)
def test_a_perplexity_is_read_back(spec, read):
    assert read(command(record(spec)))[1] == spec


def test_a_device_asked_for_by_name_is_the_cpu(read):
    spec = PERPLEXITIES[0].model_copy(update={"device": "cpu"})
    words = command(record(spec))
    assert shell_line(words).startswith("CUDA_VISIBLE_DEVICES= hlwq-eval ppl a/b ")
    assert read(words)[1] == PERPLEXITIES[0]  # auto, which is the CPU where no GPU is visible


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "rtn", "format": "int4", "group_size": 64, "scale": "mse"},
        {
            "method": "hlwq",
            "format": "bf16",
            "hlwq_bits": 4,
            "codebook": "absmax",
            "hadamard": False,
            "group_size": 32,
        },
    ],
    ids=lambda recipe: recipe["method"],
)
def test_a_quantization_is_read_back(recipe, read):
    from evalsuite.quant.recipe import Recipe

    spec = QuantizeSpec(source="demo", recipe=Recipe(**recipe).as_dict(), device="cuda:0")
    assert read(command(record(spec)))[1] == spec


def test_a_footprint_is_read_back(read):
    spec = FootprintSpec(
        model="m",
        serving=Serving(
            engine="vllm", dtype="bfloat16", gpus=(1, 0), tensor_parallel_size=2, load_format="dummy",
            enforce_eager=True, moe_expert_cache_size=8, moe_expert_store="disk", moe_routing="zipf:1.5",
            max_model_len=4096, max_num_seqs=4, max_num_batched_tokens=2048, gpu_memory_utilization=0.5,
        ),
        workload=Workload(corpus="builtin", input_len=9, output_len=3, concurrency=2, repeats=1, warmups=0, timeout_s=60),
        idle_s=0.5,
    )  # fmt: skip
    assert read(command(record(spec)))[1] == spec


def speed(size, eager, concurrency):
    serving = Serving(
        engine="vllm", gpus=(0,), enforce_eager=eager, moe_expert_cache_size=size, moe_routing="uniform_random",
        load_format="dummy", max_num_seqs=8, additional_config={"a": 1},
    )  # fmt: skip
    workload = Workload(
        corpus="builtin", input_len=9, output_len=3, concurrency=concurrency, repeats=2, warmups=0, seed=3
    )
    return SpeedSpec(model="m", serving=serving, workload=workload)


points = st.tuples(st.sampled_from([8, 64, None]), st.booleans(), st.sampled_from([1, 8]))


def test_cells_of_a_sweep_are_one_command_where_they_span_its_axes(read, monkeypatch):
    monkeypatch.setattr("evalsuite.telemetry.machine.read_gpus", lambda: ((), None, None))
    full = [speed(size, eager, n) for size in (None, 8) for eager in (True, False) for n in (8, 1)]
    (words,) = sweeps(full)
    assert "--cache-sizes 8,all --modes eager,graphs --concurrency 1,8" in shell_line(words)
    sweep = read(words)[2]
    found = cells(sweep.axes, sweep.serving, sweep.workload)
    assert sorted(map(str, found)) == sorted(map(str, full))


@settings(max_examples=60, deadline=None)
@given(st.sets(points, min_size=1))
def test_commands_span_exactly_the_cells_that_were_measured(chosen):
    lines = list(sweeps([speed(*point) for point in chosen]))
    spanned = []
    for words in lines:
        flags = dict(zip(words[3::2], words[4::2], strict=False))
        spanned += [
            (None if size == "all" else int(size), mode == "eager", int(n))
            for size in flags["--cache-sizes"].split(",")
            for mode in flags["--modes"].split(",")
            for n in flags["--concurrency"].split(",")
        ]
    assert sorted(spanned, key=str) == sorted(chosen, key=str)


def test_a_line_comes_once_and_a_quantization_goes_where_the_others_read():
    made = QuantizeSpec(source="demo", recipe={"method": "rtn"})
    scored = PERPLEXITIES[0].model_copy(update={"model": "build/x-int4"})
    records = [record(scored), record(scored), record(made)]
    records[2].results = None
    first, second = commands(records)
    assert first.startswith("hlwq-eval quantize demo quantized --method rtn")
    assert second.startswith("hlwq-eval ppl build/x-int4 ")
