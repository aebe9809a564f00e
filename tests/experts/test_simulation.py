"""A trace under many sizes and policies."""

import pytest

from evalsuite.experts.simulate import layer_steps, simulate
from evalsuite.experts.simulation import Simulation, Simulator
from experts.traces import trace


def test_every_cell_is_what_it_is_alone():
    source = trace()
    found = Simulator(source).run(["lru", "belady"], [2, 8])
    assert found.policies == ("lru", "belady")
    assert found.sizes == (2, 8)
    alone = simulate(source, "belady", 8, layer_steps(source))
    for phase in ("decode", "prefill", "all"):
        cell = found.cell("belady", 8, phase)
        assert cell.counters == alone[phase]
        assert cell.tokens == source.tokens(phase)
        assert cell.bytes_per_token == alone[phase].bytes_moved / source.tokens(phase)
    with pytest.raises(KeyError):
        found.cell("lru", 3, "decode")


def test_it_survives_json():
    found = Simulator(trace()).run(["lfu"], [4])
    assert Simulation.model_validate_json(found.model_dump_json()) == found


def test_routing_of_the_traced_model_is_its_own_decode_hit_rate():
    source = trace()
    simulator = Simulator(source)
    routing = simulator.routing("lru", 16)
    assert routing.name == "trace, lru"
    assert routing.hit_rate(6) == simulator.run(["lru"], [6]).cell("lru", 6, "decode").counters.hit_rate


def test_routing_of_another_model_goes_by_the_share_of_experts_and_says_so():
    simulator = Simulator(trace())
    routing = simulator.routing("lru", 256)
    assert routing.name == "trace, lru, by share"
    assert routing.hit_rate(128) == simulator.routing("lru", 16).hit_rate(8)
    assert routing.hit_rate(1) == simulator.routing("lru", 16).hit_rate(1)
