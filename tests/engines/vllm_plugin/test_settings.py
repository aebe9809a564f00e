"""The cache's settings on their way, known versions, and what vLLM's kernels are asked for; no vLLM needed."""

import subprocess
import sys
from argparse import ArgumentParser, Namespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.core.errors import UsageError
from evalsuite.engines.vllm_plugin import register
from evalsuite.engines.vllm_plugin.arguments import add_flags, move_flags
from evalsuite.engines.vllm_plugin.marlin_order import by_expert, ordered_by_expert
from evalsuite.engines.vllm_plugin.settings import POLICY_NAMES, STORE_NAMES, CacheSettings
from evalsuite.engines.vllm_plugin.triton_tiles import tiles_for, with_all_experts
from evalsuite.engines.vllm_plugin.versions import ADAPTERS, find_adapter
from evalsuite.experts.policy import POLICIES


@given(
    st.integers(1, 10**4),
    st.sampled_from(POLICY_NAMES),
    st.sampled_from(STORE_NAMES),
    st.dictionaries(st.sampled_from(["gdn_prefill_backend", "other"]), st.integers()),
)
def test_flags_arrive_as_settings_and_leave_other_keys_alone(size, policy, store, others):
    parser = ArgumentParser()
    parser.add_argument("--additional-config", default={})
    add_flags(parser)
    given = [
        "--moe-expert-cache-size",
        str(size),
        "--moe-expert-cache-policy",
        policy,
        "--moe-expert-store",
        store,
    ]
    args = parser.parse_args(given)
    args.additional_config = dict(others)
    moved = move_flags(args).additional_config
    assert CacheSettings.read(moved) == CacheSettings(
        moe_expert_cache_size=size, moe_expert_cache_policy=policy, moe_expert_store=store
    )
    assert {k: v for k, v in moved.items() if k in others} == others


def test_without_a_flag_nothing_is_moved():
    parser = ArgumentParser()
    add_flags(parser)
    args = parser.parse_args([])
    assert move_flags(args) is args
    assert not hasattr(args, "additional_config")


def test_a_flag_wins_over_the_key():
    args = Namespace(moe_expert_cache_size=8, additional_config={"moe_expert_cache_size": 4})
    assert move_flags(args).additional_config == {"moe_expert_cache_size": 8}


@pytest.mark.parametrize("config", [None, {}, {"gdn_prefill_backend": "triton"}, object()])
def test_no_key_is_no_cache(config):
    assert CacheSettings.read(config) is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"moe_expert_store": "disk"}, "no expert cache is asked for"),
        ({"moe_expert_cache_size": 0}, "moe_expert_cache_size: Input should be greater"),
        (
            {"moe_expert_cache_size": 8, "moe_expert_cache_policies": "lru"},
            "moe_expert_cache_policies: Extra",
        ),
        ({"moe_expert_cache_size": 8, "moe_expert_store": "tape"}, "'pinned' or 'disk'"),
    ],
)
def test_what_is_not_understood_is_refused(config, words):
    with pytest.raises(UsageError, match=words):
        CacheSettings.read(config)


def test_every_policy_can_be_asked_for():
    assert set(POLICY_NAMES) == set(POLICIES)


@pytest.mark.parametrize(
    ("installed", "index"), [("0.26.0", 0), ("0.26.1+cu130", 0), ("0.32.0+cpu", 1), ("0.33.0", 1)]
)
def test_known_versions_have_an_adapter(installed, index):
    assert find_adapter(installed) is ADAPTERS[index]


@pytest.mark.parametrize("installed", ["0.25.0", "0.27.0", "0.31.9", "0.34.0", "1.0", "dev", "0.0.0"])
def test_unknown_versions_are_refused_with_those_that_are_known(installed):
    with pytest.raises(UsageError, match=r"does not know vLLM[\s\S]*0\.26, 0\.32, 0\.33"):
        find_adapter(installed)


def test_the_plugin_loads_nothing_and_may_be_registered_twice():
    code = (
        "import sys; from evalsuite.engines.vllm_plugin import register; register(); register(); "
        "print(sorted({'torch', 'vllm', 'transformers', 'triton'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    register()


def test_tiles_are_those_of_the_whole_layer():
    seen = []
    choose = with_all_experts(lambda *arguments: seen.append(arguments))
    choose((4, 8, 16), (4, 16, 4), 2)
    with tiles_for(256):
        choose((4, 8, 16), (4, 16, 4), 2)
    choose((4, 8, 16), (4, 16, 4), 2)
    assert seen == [((4, 8, 16), (4, 16, 4), 2), ((256, 8, 16), (256, 16, 4), 2), ((4, 8, 16), (4, 16, 4), 2)]


def test_marlin_sorts_by_expert_and_reads_slots():
    calls = []

    def align(ids, block, experts, expert_map=None, **options):
        calls.append((ids, block, experts, expert_map, options))
        return "sorted", [7, 9], "padded"

    def relabel(expert_ids, slot_of):
        expert_ids[:] = [slot_of[e] for e in expert_ids]

    aligned = by_expert(align, relabel)
    assert aligned("slots", 8, 16, None, ignore_invalid_experts=True) == ("sorted", [7, 9], "padded")
    with ordered_by_expert("experts", {7: 1, 9: 0}):
        assert aligned("slots", 8, 16, None, ignore_invalid_experts=True) == ("sorted", [1, 0], "padded")
        assert aligned("slots", 8, 16, "map", ignore_invalid_experts=True) == ("sorted", [7, 9], "padded")
    options = {"ignore_invalid_experts": True}
    assert calls == [
        ("slots", 8, 16, None, options),
        ("experts", 8, 16, None, options),
        ("slots", 8, 16, "map", options),
    ]
