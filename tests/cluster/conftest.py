"""A Ray cluster of small nodes on loopback, one for all tests, and the run of one machine beside it."""

import os

import pytest

from evalsuite.cluster.connect import LOOPBACK_VARIABLE
from evalsuite.core.protocol import PROTOCOLS
from evalsuite.core.spec import PerplexitySpec
from evalsuite.run.perplexity import run_perplexity
from evalsuite.store.runs import RunStore

os.environ.setdefault(LOOPBACK_VARIABLE, "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# the death of a node is noticed within a second
HASTY = {
    "health_check_initial_delay_ms": 500, "health_check_period_ms": 300,
    "health_check_timeout_ms": 2000, "health_check_failure_threshold": 3,
}  # fmt: skip


class Watcher:
    """Notes what a run says, and does one thing each time that windows were written, while there are any."""

    def __init__(self, *acts):
        self.phases, self.counts, self.done, self._acts = [], [], [], list(acts)
        self.warnings = []

    def phase(self, text):
        self.phases.append(text)

    def warn(self, text):
        self.warnings.append(text)

    def workers(self, count):
        self.counts.append(count)

    def scored(self, done, total, perplexity):
        self.done.append(done)
        if done and self._acts:
            self._acts.pop(0)()


@pytest.fixture(scope="session")
def ray_cluster():
    """A head that can hold no worker; tests add the nodes that they need, and take them away."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0, "include_dashboard": False, "node_ip_address": "127.0.0.1", "_system_config": HASTY,
        },
    )  # fmt: skip
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="session")
def pair(ray_cluster):
    """Two nodes of the kind "pair", one of which is also "alpha" and the other "beta"."""
    for kind in ("alpha", "beta"):
        ray_cluster.add_node(num_cpus=2, node_ip_address="127.0.0.1", resources={kind: 1, "pair": 1})
    return ray_cluster.address


@pytest.fixture
def nodes(ray_cluster):
    """Adds nodes for one test, of a kind that keeps it among them."""
    added = []

    def add(kind, **options):
        node = ray_cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1", resources={kind: 1}, **options)
        added.append(node)
        return node

    add.cluster, add.address = ray_cluster, ray_cluster.address
    yield add
    for node in added:
        if node in ray_cluster.list_all_nodes():
            ray_cluster.remove_node(node, allow_graceful=True)


def small_spec(**changes):
    """Twelve short windows of the built-in model in six batches."""
    settings = {
        "model": "demo", "corpus": "builtin", "protocol": PROTOCOLS["card-1155"].override(256, 64),
        "limit": 12, "batch_size": 2,
    }  # fmt: skip
    return PerplexitySpec(**settings | changes)


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """The run of one machine, without Ray."""
    store = RunStore(tmp_path_factory.mktemp("alone"))
    return run_perplexity(small_spec(keep_hidden=True), store, Watcher())
