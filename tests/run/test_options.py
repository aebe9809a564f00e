"""What a command line leaves out, and how the words of a file become the specs of a command."""

import pytest
from pydantic import ValidationError

from evalsuite.core.errors import UsageError
from evalsuite.run.cache_options import SimulationOptions, TraceOptions
from evalsuite.run.options import (
    FootprintOptions,
    PerplexityOptions,
    SpeedOptions,
    asked,
    default_corpus,
    one_device,
    prompt_corpus,
)


def test_the_built_in_text_goes_with_the_built_in_model():
    assert default_corpus(None) == default_corpus("demo") == default_corpus("x", "demo") == "builtin"
    assert default_corpus("x", None) == default_corpus("x", "y") == "wikitext-2"
    assert prompt_corpus("dummy", "x") == "builtin"
    assert prompt_corpus("auto", "x") == "wikitext-2"


def test_the_card_s_windows_are_the_limit_of_the_built_in_text_alone():
    assert PerplexityOptions().spec("demo").limit == 1155
    assert PerplexityOptions(protocol="paper").spec("demo").limit is None
    assert PerplexityOptions(context=512).spec("demo").limit is None
    assert PerplexityOptions().spec("x").limit is None
    assert PerplexityOptions(limit=7).spec("demo").limit == 7


def test_hidden_states_are_kept_for_a_comparison():
    assert not PerplexityOptions().spec("demo").keep_hidden
    assert PerplexityOptions().spec("x", "demo").keep_hidden
    assert PerplexityOptions(keep_hidden=True).spec("x").keep_hidden


def test_one_device():
    assert (one_device((), "why"), one_device((3,), "why")) == ("auto", "cuda:3")
    with pytest.raises(UsageError, match="--gpus 0,1 is not the index of one GPU"):
        one_device((0, 1), "why")


def test_a_sweep_adapts_to_the_machine_only_where_nothing_is_said():
    options = SpeedOptions()
    without, with_two = options.sweep(("a", "b"), 0), options.sweep(("a",), 2)
    assert (without.axes.modes, without.axes.gpus, without.workload.input_len) == (("eager",), (), 64)
    assert (with_two.axes.modes, with_two.axes.gpus) == (("eager", "graphs"), (0,))
    assert (with_two.workload.input_len, with_two.workload.output_len) == (512, 128)
    assert without.any_mode
    said = SpeedOptions(modes=["graphs"], gpus=[1], input_len=9, output_len=8, tensor_parallel_size=2)
    for count in (0, 4):
        found = said.sweep(("a",), count)
        assert (found.axes.modes, found.axes.gpus, found.workload.input_len) == (("graphs",), (1,), 9)
        assert not found.any_mode
    assert SpeedOptions(tensor_parallel_size=[1, 2]).sweep(("a",), 4).axes.gpus == (0, 1)


def test_all_comes_last_and_one_value_is_a_list_of_one():
    axes = SpeedOptions(cache_sizes=["all", 64, 8], concurrency=8).sweep(("a",), 0).axes
    assert axes.cache_sizes == (64, 8, None)
    assert axes.concurrencies == (8,)
    assert SimulationOptions(sizes=["all", 4]).slots == [None, 4]


def test_a_server_has_a_mode_and_gpus_of_its_own():
    found = SpeedOptions(server_url="http://x").sweep(("a",), 2)
    assert (found.axes.modes, found.axes.gpus) == (("graphs",), ())
    with pytest.raises(UsageError, match="--modes cannot be chosen"):
        SpeedOptions(server_url="http://x", modes=["eager"]).sweep(("a",), 2)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (SpeedOptions, {"cache_sizes": [8, 8]}),
        (SpeedOptions, {"cache_sizes": []}),
        (SpeedOptions, {"cache_sizes": [0]}),
        (SpeedOptions, {"cache_size": [8]}),
        (SpeedOptions, {"modes": ["fast"]}),
        (SpeedOptions, {"output_len": 1}),
        (FootprintOptions, {"gpus": [-1]}),
        (PerplexityOptions, {"batch_size": 0}),
    ],
)
def test_what_is_no_option_or_out_of_its_range_is_refused(kind, values):
    with pytest.raises(ValidationError):
        kind(**values)


def test_an_option_out_of_range_is_named_as_on_the_command_line():
    with pytest.raises(UsageError, match="--output-len"):
        asked(SpeedOptions, {"output_len": 1})


def test_as_many_gpus_as_share_the_model():
    assert FootprintOptions(gpus=[0, 1], tensor_parallel_size=2).spec("x").serving.gpus == (0, 1)
    with pytest.raises(UsageError, match="--tensor-parallel-size is 1"):
        FootprintOptions(gpus=[0, 1]).spec("x")


def test_a_trace_takes_one_gpu_and_vllm_none():
    request = TraceOptions(gpus=[1], requests=3).request("demo")
    assert (request.device, request.requests, request.corpus) == ("cuda:1", 3, "builtin")
    with pytest.raises(UsageError, match="first GPU it sees"):
        TraceOptions(engine="vllm", gpus=[0]).request("demo")


def test_a_prediction_is_of_a_gpu():
    found = SimulationOptions(gpu="h100", compute_ms=5).prediction()
    assert found is not None
    assert (found.gpus, found.compute_s) == (("h100",), 0.005)
    assert SimulationOptions().prediction() is None
    with pytest.raises(UsageError, match="belong to a prediction"):
        SimulationOptions(geometry="x").prediction()
    with pytest.raises(UsageError, match="is no measurement"):
        SimulationOptions(gpu="h100", compute_ms=0).prediction()
