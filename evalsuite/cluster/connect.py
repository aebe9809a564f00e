"""The way into a Ray cluster that runs already; the suite never starts one.

Ray trusts its network: whoever reaches a port of the cluster can run code on every node of it, as the user
who started it. The address is loopback by default.
"""

import ipaddress
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evalsuite.core.errors import MissingDependency, UsageError, first_line

START = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 ray start --head --node-ip-address 127.0.0.1"
LOOPBACK_VARIABLE = (
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # the one switch that makes Ray take 127.0.0.1 as it is
)


@dataclass(frozen=True)
class ClusterChoice:
    """Which cluster, and how much of it.

    Attributes:
        address: ``auto``, or HOST:PORT of the head.
        gpu_kinds: use only nodes with these kinds of GPU; a perplexity run takes one.
        workers: of a perplexity run, at most so many.
        exclusive: a cell of a sweep takes its whole node.
    """

    address: str
    gpu_kinds: tuple[str, ...] = ()
    workers: int | None = None
    exclusive: bool = False


def resolve(address: str) -> str:
    """HOST:PORT, before anything of Ray is imported.

    Raises:
        MissingDependency: Ray is not installed.
        UsageError: it is no such address, or no cluster of this machine was found.
    """
    if find_spec("ray") is None:
        raise MissingDependency(
            "--cluster needs Ray, which is not installed.", todo="pip install 'hlwq-eval[ray]'"
        )
    if address == "auto":
        temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
        current = Path(temporary) / "ray" / "ray_current_cluster"
        known = os.environ.get("RAY_ADDRESS", "").removeprefix("auto")
        known = known or (current.read_text().strip() if current.is_file() else "")
        if not known:
            raise UsageError(
                "No Ray cluster was found on this machine.",
                cause=f"{current} names none; one started elsewhere or with --temp-dir is not written there.",
                todo=f"give the address of its head: --cluster HOST:PORT; or start one: {START}",
            )
        address = known
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise UsageError(
            f"--cluster {address} is neither auto nor HOST:PORT.",
            cause="Ray's client protocol (ray://) cannot wait for results as they come." * ("://" in address),
            todo="run the command on a machine of the cluster, with --cluster auto or the head's HOST:PORT.",
        )
    return address


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches the address."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_to_others(address: str) -> str | None:
    """What a user must know about the address; None where it is loopback."""
    if is_loopback(address):
        return None
    return (
        f"the cluster at {address} can be reached over the network, and Ray asks nobody who they are: "
        "whoever reaches it can run code as you. Keep it behind a firewall."
    )


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module ``ray``, connected as a driver to the cluster at HOST:PORT; its actors end with it.

    While it is connected, standard output is closed to Ray, which prints notices there that are no result;
    they are in its own logs.

    Raises:
        UsageError: nothing answers there, or it has another Ray or Python.
    """
    if is_loopback(address):
        os.environ.setdefault(LOOPBACK_VARIABLE, "0")  # read when ray is imported
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if not _answers(address):
        raise UsageError(
            f"No Ray cluster answers at {address}.",
            cause="it was stopped, or a firewall is between.",
            todo=f"start one: {START}",
        )
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"The Ray cluster at {address} cannot be used.",
                cause=first_line(error),
                todo="give every machine the same Python and the same Ray.",
            ) from error
        try:
            yield ray
        finally:
            ray.shutdown()


def _answers(address: str) -> bool:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            return True
    except OSError:
        return False
