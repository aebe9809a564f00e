"""The real vLLM on the CPU: tiny models with the expert cache, of every size and policy, and without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from vllm_cpu.cached import AT_ONCE, EXPERTS, KINDS, ONE_AT_A_TIME, PROMPTS, TOP_K, geometry
from vllm_cpu.present import ENVIRONMENT, needs_vllm, run_two_ranks
from vllm_cpu.tiny_moe import write_tiny_moe

from evalsuite.experts.policy import make_policy

TESTS = Path(__file__).resolve().parents[2]
ONE_PROCESS = ENVIRONMENT | {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "",
    "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
}  # fmt: skip

pytestmark = [pytest.mark.slow, needs_vllm]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("cached") / "result.json"
    command = [sys.executable, str(TESTS / "vllm_cpu" / "cached.py"), str(out)]
    run = subprocess.run(command, env=os.environ | ONE_PROCESS, check=False, capture_output=True, text=True)
    assert out.exists(), run.stderr[-5000:]
    return json.loads(out.read_text())


def test_a_plugin_that_is_not_asked_for_changes_nothing(found):
    assert found["without_plugin"] == found["bf16"]["plain"][str(AT_ONCE)]
    for kind in KINDS:
        facts = found[kind]["plain_facts"]
        assert facts["worker"] == "CPUWorker"
        assert not any(facts["cached"])
        assert facts["parameters"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_experts_are_in_the_store_and_nowhere_else(found, kind):
    facts = found[kind]["cached_facts"]
    assert facts["worker"] == "CachedCPUWorker"
    assert facts["cached"] == [True, True]
    assert facts["parameters"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_fit_give_the_same_bits(found, kind):
    """A prompt of n tokens routes to at most n · top-k experts of a layer, a decoded token to top-k."""
    compared, (experts, top_k) = 0, geometry(kind)
    for row in found[kind]["cached"]:
        for concurrency in (ONE_AT_A_TIME, AT_ONCE):
            pairs = zip(
                answers_of(row, concurrency), found[kind]["plain"][str(concurrency)], PROMPTS, strict=True
            )
            for mine, plain, prompt in pairs:
                tokens = sum(map(len, PROMPTS)) if concurrency == AT_ONCE else len(prompt)
                if row["size"] >= min(experts, top_k * tokens):
                    assert mine == plain
                    compared += 1
    assert compared >= 2 * len(PROMPTS) + 10


def test_random_weights_are_those_that_vllm_would_draw(found):
    fitting = [n for n, prompt in enumerate(PROMPTS) if TOP_K * len(prompt) < EXPERTS]
    plain, cached = ([answers[n] for n in fitting] for answers in found["random"])
    assert plain == cached
    assert logprobs(plain).std() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_steps_in_groups_agree_within_bfloat16(found, kind):
    """Several bfloat16 sums instead of one; a wrong expert in any place would move these by whole nats."""
    for row in found[kind]["cached"]:
        for concurrency in (ONE_AT_A_TIME, AT_ONCE):
            plain = found[kind]["plain"][str(concurrency)]
            assert np.abs(logprobs(answers_of(row, concurrency)) - logprobs(plain)).mean() < 0.02
    assert logprobs(plain).std() > 0.5  # the scale that 0.02 is to be seen on


@pytest.mark.parametrize("kind", KINDS)
def test_counters_are_those_of_the_policy_on_the_same_routing(found, kind):
    overflows, (experts, _) = 0, geometry(kind)
    for row in found[kind]["cached"]:
        assert (row["counters"]["size"], row["counters"]["experts"]) == (row["size"], experts)
        for counted, trace in zip(row["counters"]["layers"], row["traces"], strict=True):
            rule = make_policy(row["policy"], row["size"], experts)
            placements = [placement for wanted in trace for placement in rule.serve(wanted)]
            misses = sum(len(placement.loads) for placement in placements)
            assert counted["steps"] == len(trace)
            assert counted["hits"] == sum(placement.hits for placement in placements)
            assert counted["misses"] == misses
            assert counted["overflow_steps"] == sum(len(wanted) > row["size"] for wanted in trace)
            assert counted["bytes_moved"] == misses * row["counters"]["expert_bytes"]
            overflows += counted["overflow_steps"]
        assert all(layer["steps"] == layer["hits"] == 0 for layer in row["after_reset"]["layers"])
    assert overflows > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_serves_as_memory_does_and_is_written_once(found, kind):
    asked = ("lru", geometry(kind)[1])
    (in_memory,) = (r for r in found[kind]["cached"] if (r["policy"], r["size"]) == asked)
    written, reused = found[kind]["disk"]
    assert (written["written"], reused["written"]) == (True, False)
    assert written["answers"] == reused["answers"] == answers_of(in_memory, ONE_AT_A_TIME)
    assert written["counters"] == reused["counters"]
    assert written["counters"]["store"] == "disk"


def test_a_file_takes_what_memory_has_no_room_for(found):
    """While the model is loaded, too: its layers are then in files of their own, which are gone after it."""
    in_memory, result = found["int4"]["disk"][0], found["without_memory"]
    assert result["written"]
    assert result["layers_spilled"] == 2
    assert result["answers"] == in_memory["answers"]
    assert result["left"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_counts_for_nothing(found, kind):
    layers = found[kind]["fresh_counters"]["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1]
    assert all(layer["steps"] == layer["misses"] == 0 for layer in layers)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ("expert parallelism", "--tensor-parallel-size without --enable-expert-parallel"),
        ("data parallelism", "one server for each GPU"),
        ("LoRA", "merge the adapter"),
        ("offloading", "--cpu-offload-gb"),
        ("speculation", "--moe-expert-store pinned, or leave --speculative-config away"),
        ("worker", "--worker-extension-cls can be combined"),
        ("dense", "no experts to cache"),
        ("misspelt", "moe_expert_cache_sizes is set"),
        ("more than there are", "below 16, or leave it away"),
        ("activations", "unset VLLM_MARLIN_INPUT_DTYPE"),
        ("policy", "'lru', 'lfu', 'fifo', 'slru' or 'lfru'"),
        ("version", "does not know vLLM 0.31.0"),
        ("memory", "--moe-expert-store disk"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(found, request_, words):
    assert words in found["refusals"][request_]


def test_room_for_every_expert_needs_no_cache(found):
    assert found["refusals"]["cached"].endswith("CachedCPUWorker")
    assert found["refusals"]["all there are"] == "vllm.v1.worker.cpu_worker.CPUWorker"


def answers_of(row, concurrency):
    return row["answers"][str(concurrency)]


def logprobs(answers):
    return np.concatenate([answer["logprobs"] for answer in answers])


def test_two_ranks_count_the_bytes_of_both(tmp_path):
    folder = write_tiny_moe(tmp_path / "moe", int4=False, intermediate=128)
    out = tmp_path / "found.json"
    run_two_ranks("two_cached_ranks.py", folder, out)
    many, few = json.loads(out.read_text())
    assert few["tokens"] == many["tokens"]
    for found, size in ((many, 8), (few, 2)):
        counters = found["counters"]
        assert counters["size"] == size
        assert counters["expert_bytes"] == 3 * 64 * 128 * 2
        for layer in counters["layers"]:
            assert layer["hits"] + layer["misses"] == layer["steps"] * TOP_K
            assert layer["bytes_moved"] == layer["misses"] * counters["expert_bytes"] > 0
