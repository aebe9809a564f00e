"""Values that flags of several commands take, and how their texts are read."""

import json
from enum import StrEnum
from typing import Annotated, Any

import typer

from evalsuite.cluster.connect import ClusterChoice
from evalsuite.core.errors import UsageError

ALL = "all"


class Engine(StrEnum):
    auto = "auto"
    torch = "torch"
    vllm = "vllm"
    server = "server"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class LoadFormat(StrEnum):
    auto = "auto"
    dummy = "dummy"


class CachePolicy(StrEnum):
    lru = "lru"
    lfu = "lfu"
    fifo = "fifo"
    slru = "slru"
    lfru = "lfru"


class CacheStore(StrEnum):
    pinned = "pinned"
    disk = "disk"


Cluster = Annotated[
    str | None,
    typer.Option(
        metavar="auto|HOST:PORT",
        help="Run on the Ray cluster of this machine, or at this head. Ray trusts its network: keep it to "
        "loopback or behind a firewall.",
    ),
]
ROUTINGS = "model|uniform_random|zipf:S"
ROUTING = (
    "Draw each token's experts instead of asking the router, for dummy weights: uniformly, or by Zipf's law."
)
WORKERS = "With --cluster: at most so many workers."
GPU_KIND = "With --cluster: the kind of GPU, as Ray, a custom resource or a node label names it."

EXCLUSIVE = "With --cluster: a cell takes its whole node."


def cluster_choice(address: str | None, given: dict[str, Any]) -> ClusterChoice | None:
    """The cluster that the flags name; None without ``--cluster``.

    Args:
        given: the flags that need one, with their values.

    Raises:
        UsageError: one of them was given without it.
    """
    if address is not None:
        kinds = given["--gpu-kind"] or ()
        return ClusterChoice(address, tuple(kinds), given.get("--workers"), given.get("--exclusive", False))
    for flag, value in given.items():
        if value:
            raise UsageError(f"{flag} is for a cluster.", todo=f"give --cluster auto, or leave {flag} out.")
    return None


def require_use(on: ClusterChoice, *, scores: bool, times: bool) -> None:
    """Refuse what an experiment would not use of a cluster.

    Args:
        scores, times: whether it scores perplexity there, and whether it times cells.

    Raises:
        UsageError: a flag is for steps that it has not, or for others than it has.
    """
    if not scores and not times:
        raise UsageError(
            "None of these steps runs on a cluster.",
            cause="it scores perplexity and times cells.",
            todo="leave --cluster out, or choose other steps.",
        )
    if on.workers is not None and not scores:
        raise UsageError("--workers is for perplexity, and no step scores it.", todo="leave --workers out.")
    if on.exclusive and not times:
        raise UsageError("--exclusive is for timing, and no cell is timed.", todo="leave --exclusive out.")
    if len(on.gpu_kinds) > 1 and scores:
        raise UsageError(
            "Perplexity takes one --gpu-kind.",
            cause="rounding differs between them, so one number cannot come from several.",
            todo="name one, or choose speed steps alone: --only speed.",
        )


def refuse_on_a_cluster(given: dict[str, object]) -> None:
    """Refuse what only a machine of its own can do.

    Args:
        given: the flags that are about this machine, with their values.

    Raises:
        UsageError: one of them was given.
    """
    for flag, value in given.items():
        if value:
            raise UsageError(
                f"{flag} is about this machine, and what is measured on a cluster runs on others.",
                todo=f"leave out {flag} or --cluster.",
            )


def numbers(flag: str, text: str, least: int) -> tuple[int, ...]:
    """Different whole numbers, separated by commas.

    Raises:
        UsageError: one of them is none, is too small, or comes twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) >= least for part in parts):
        raise UsageError(
            f"{flag} {text} is not a list of whole numbers from {least}.",
            todo=f"write {flag} {least + 1},{least + 2} for two of them.",
        )
    found = tuple(map(int, parts))
    if len(set(found)) < len(found):
        raise UsageError(f"{flag} {text} names a value twice.", todo="leave one of them out.")
    return found


def sizes(flag: str, text: str) -> tuple[int | str, ...]:
    """Different cache sizes, separated by commas, with ``all``, which comes last, for every expert."""
    parts = [part.strip() for part in text.split(",")]
    given = [part for part in parts if part != ALL]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in given):
        raise UsageError(
            f"{flag} {text} is not a list of whole numbers from 1.", todo=f"try {flag} 8,64,all."
        )
    found = numbers(flag, ",".join(given), 1) if given else ()
    if parts.count(ALL) > 1:
        raise UsageError(f"{flag} {text} names a value twice.", todo="leave one of them out.")
    return (*found, ALL) if len(given) < len(parts) else found


def one_gpu(text: str | None) -> tuple[int, ...]:
    """The index that ``--gpus`` names, for what runs on a single GPU; none without it."""
    if text is None:
        return ()
    if not (text.isascii() and text.isdigit()):
        raise UsageError(
            f"--gpus {text} is not the index of one GPU.", todo="give one index, such as --gpus 0."
        )
    return (int(text),)


def words(flag: str, text: str) -> tuple[str, ...]:
    """Names separated by commas, each once."""
    found = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    if not found:
        raise UsageError(f"{flag} names nothing.", todo="leave it out, or see --help.")
    return found


def json_object(flag: str, text: str | None) -> dict[str, Any]:
    """A JSON object; an empty one where nothing is given."""
    example = """give a JSON object, such as '{"gdn_prefill_backend": "triton"}'."""
    try:
        value: Any = {} if text is None else json.loads(text)
    except ValueError as error:
        raise UsageError(f"{flag} is not valid JSON.", cause=str(error), todo=example) from error
    if not isinstance(value, dict):
        raise UsageError(f"{flag} is not a JSON object.", todo=example)
    return value
