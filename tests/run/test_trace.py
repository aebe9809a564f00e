"""A trace foretells the torch engine: the same loads, step by step, under every policy and size."""

import numpy as np
import pytest

from evalsuite.core.spec import Serving
from evalsuite.data.corpora import load_corpus
from evalsuite.data.models import find_checkpoint
from evalsuite.data.prompts import cut_prompts
from evalsuite.data.tokens import tokenise
from evalsuite.engines.tokenizer import load_tokenizer
from evalsuite.engines.torch_generator import TorchGenerator
from evalsuite.experts.policy import POLICIES
from evalsuite.experts.simulate import count, layer_steps, simulate
from evalsuite.experts.trace import load_trace
from evalsuite.run.trace import TraceRequest, run_trace

INPUT_LEN, OUTPUT_LEN, REQUESTS, CONCURRENCY = 12, 10, 4, 2
SIZES = (1, 8, 64, 128)


class Quiet:
    def phase(self, text):
        pass

    def traced(self, done, total):
        pass


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("A quick brown fox jumps over the lazy dog, and then it sleeps. " * 20)
    return str(path)


@pytest.fixture(scope="module")
def trace(text, tmp_path_factory):
    request = TraceRequest(
        model="demo", corpus=text, input_len=INPUT_LEN, output_len=OUTPUT_LEN,
        requests=REQUESTS, concurrency=CONCURRENCY,
    )  # fmt: skip
    return load_trace(run_trace(request, tmp_path_factory.mktemp("trace"), Quiet(), replace=False))


@pytest.fixture(scope="module")
def prompts(text):
    tokenizer = load_tokenizer(None, find_checkpoint("demo")).tokenizer
    stream = tokenise(tokenizer, load_corpus(text).text("blank-line"), "never")
    return cut_prompts(stream, INPUT_LEN, REQUESTS, 0)


class Sweep:
    """One loaded engine under many sizes, and what its cache copied and counted."""

    def __init__(self, policy, monkeypatch):
        serving = Serving(moe_expert_cache_size=SIZES[0], moe_expert_cache_policy=policy)
        self.engine = TorchGenerator(find_checkpoint("demo"), serving)
        store = self.engine._loaded.cache.store
        fill = store.fill

        def noted(layer, loads, slots):
            self.loads[layer] += loads
            fill(layer, loads, slots)

        monkeypatch.setattr(store, "fill", noted)

    def run(self, prompts, size):
        """The counters of each phase, a snapshot a batch."""
        self.engine.resize_expert_cache(size)
        self.loads = {layer: [] for layer in self.engine._loaded.cache.layers}
        found = {"prefill": [], "decode": []}

        def note(phase):
            found[phase].append(self.engine.expert_cache())
            self.engine.reset_counters()

        for first in range(0, REQUESTS, CONCURRENCY):
            self.engine.generate(prompts[first : first + CONCURRENCY], OUTPUT_LEN, lambda: note("prefill"))
            note("decode")
        return found


def summed(counters, index):
    """One layer over several snapshots, without its times; bytes in experts, which a CPU may hold as float32."""
    layers = [one.layers[index].model_dump(exclude={"copy_s", "layer"}) for one in counters]
    for layer in layers:
        layer["bytes_moved"] /= counters[0].expert_bytes
    return {name: sum(layer[name] for layer in layers) for name in layers[0]}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_engine_does_what_the_simulator_says(policy, trace, prompts, monkeypatch):
    sweep = Sweep(policy, monkeypatch)
    steps = layer_steps(trace)
    for size in SIZES:
        found = sweep.run(prompts, size)
        expected = simulate(trace, policy, size, steps)
        for index, layer in enumerate(trace.facts.layers):
            events = count(steps[index], policy, size, record_loads=True).loads
            assert sweep.loads[layer] == [tuple(event) for event in events[:, :2].tolist()]
            for phase, counters in found.items():
                assert summed(counters, index) == summed([expected[phase]], index)
    sweep.engine.close()


def test_steps_that_fit_and_steps_that_overflow_were_both_compared(trace):
    distinct = np.concatenate([np.diff(layer.starts) for layer in layer_steps(trace)])
    assert distinct.min() > SIZES[0]
    assert distinct.max() > 64 > distinct.min()
