"""Which nodes are let in, and the reasons that others are given."""

import pytest

from evalsuite.cluster.nodes import Demand, choose, read_node, refusal
from evalsuite.core.errors import ModelError, UsageError
from evalsuite.telemetry.machine import read_machine


def node(number, resources, labels=None):
    found = {"NodeID": f"id{number}", "NodeManagerAddress": f"10.0.0.{number}", "Resources": resources}
    return read_node(number, found | {"Labels": labels})


H100 = node(
    1, {"CPU": 8.0, "GPU": 4.0, "accelerator_type:H100": 1.0, "node:10.0.0.1": 1.0}, {"ray.io/node-id": "x"}
)
RTX = node(2, {"CPU": 8.0, "GPU": 1.0, "rtx-4090": 1.0})
LABELLED = node(3, {"CPU": 8.0, "GPU": 2.0}, {"ray.io/accelerator-type": "A100", "shelf": "top"})
PLAIN = node(4, {"CPU": 3.0})


def test_kinds_come_from_ray_custom_resources_and_labels():
    assert (H100.kinds, H100.accelerator) == ({"h100"}, "H100")
    assert (RTX.kinds, RTX.accelerator) == ({"rtx-4090"}, None)
    assert (LABELLED.kinds, LABELLED.accelerator) == ({"a100", "top"}, "A100")
    assert (PLAIN.kinds, PLAIN.gpus, PLAIN.cpus) == (set(), 0, 3.0)


@pytest.mark.parametrize(
    ("demand", "places"),
    [(Demand(1, 0), 8), (Demand(1, 1), 4), (Demand(1, 3), 1), (Demand(4, 1), 2), (Demand(1, 8), 0)],
)
def test_places(demand, places):
    assert demand.places(H100) == places


def test_a_kind_chooses_and_several_kinds_must_be_chosen_from():
    every = [H100, RTX, LABELLED, PLAIN]
    assert choose(every, Demand(1, 1), "RTX-4090") == [RTX]
    assert choose(every, Demand(1, 1), "top") == [LABELLED]
    assert choose([H100, RTX], Demand(1, 4), None) == [H100]
    with pytest.raises(UsageError, match="several kinds: A100, H100") as found:
        choose(every, Demand(1, 1), None)
    assert "--gpu-kind A100" in found.value.todo
    with pytest.raises(UsageError, match="No node of the cluster has 8 GPUs"):
        choose(every, Demand(1, 8), None)
    with pytest.raises(UsageError, match="of the kind b200"):
        choose(every, Demand(1, 1), "b200")


def test_other_versions_other_weights_and_another_commit_are_refused():
    here = read_machine()
    assert refusal(here, here, "same", "same") is None
    torch = here.model_copy(update={"packages": here.packages | {"torch": "2.0.0"}})
    assert refusal(here, torch, "same", "same") == f"it has torch 2.0.0, not {here.packages['torch']}"
    without = here.model_copy(update={"packages": {k: v for k, v in here.packages.items() if k != "numpy"}})
    assert refusal(here, without, "same", "same") == f"it has numpy missing, not {here.packages['numpy']}"
    assert refusal(here, here, "other", "same") == "its copy of the model has other weights"
    assert refusal(here, here, ModelError("No model."), "same") == "the model is not there: No model."
    commits = [here.model_copy(update={"git_commit": c * 40}) for c in "ab"]
    assert refusal(*commits, "same", "same") == f"it has hlwq-eval at commit {'b' * 12}, not {'a' * 12}"
    wheel = here.model_copy(update={"git_commit": None})
    assert refusal(commits[0], wheel, "same", "same") is None
