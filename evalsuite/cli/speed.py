"""`hlwq-eval speed`: one cell or a sweep."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from evalsuite.cli.app import app
from evalsuite.cli.show import Screen
from evalsuite.core.errors import UsageError
from evalsuite.core.spec import Serving, Workload
from evalsuite.core.sweep import Axes, Mode

DEMO = "demo"
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


class Policy(StrEnum):
    lru = "lru"
    lfu = "lfu"
    fifo = "fifo"
    slru = "slru"
    lfru = "lfru"


class Store(StrEnum):
    pinned = "pinned"
    disk = "disk"


class Routing(StrEnum):
    model = "model"
    uniform_random = "uniform_random"


@app.command()
def speed(
    model: Annotated[
        str | None, typer.Argument(help="Hub id, local folder, smollm2, or demo (the built-in model).")
    ] = None,
    cache_sizes: Annotated[
        str, typer.Option(help="Experts of each layer on the device, such as 8,64,128,all.")
    ] = ALL,
    modes: Annotated[
        str | None, typer.Option(help="eager, graphs or both; by default both where there is a GPU.")
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(help="GPUs to measure on, each with cells of its own, such as 0,1.")
    ] = None,
    tensor_parallel_size: Annotated[
        str, typer.Option(help="GPUs that share one copy of the model, such as 1,2.")
    ] = "1",
    baseline: Annotated[
        list[str] | None, typer.Option(help="A model to measure as well, without an expert cache.")
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Requests at once, such as 1,8.")] = "1",
    input_len: Annotated[
        int | None, typer.Option(min=1, help="Prompt tokens; 512, or 64 on a CPU.", show_default=False)
    ] = None,
    output_len: Annotated[
        int | None, typer.Option(min=2, help="Output tokens; 128, or 32 on a CPU.", show_default=False)
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before them that do not.")] = 1,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for one cell, and as many for loading.")
    ] = 1800.0,
    engine: Annotated[
        Engine, typer.Option(help="auto picks by what is installed, and says why.")
    ] = Engine.auto,
    dtype: Annotated[Dtype, typer.Option(help="As vLLM has it.")] = Dtype.auto,
    load_format: Annotated[
        LoadFormat, typer.Option(help="dummy takes random weights in the shape of config.json.")
    ] = LoadFormat.auto,
    moe_expert_cache_policy: Annotated[Policy, typer.Option(help="Which experts stay.")] = Policy.lru,
    moe_expert_store: Annotated[Store, typer.Option(help="Where the other experts are.")] = Store.pinned,
    moe_routing: Annotated[
        Routing, typer.Option(help="uniform_random draws the experts, for dummy weights.")
    ] = Routing.model,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="As vLLM has it.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="As vLLM has it.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(min=1, help="As vLLM has it.")] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(min=0.01, max=1.0, help="As vLLM has it.")
    ] = None,
    additional_config: Annotated[
        str | None, typer.Option(metavar="JSON", help="Handed to vLLM as it is.")
    ] = None,
    server_url: Annotated[str | None, typer.Option(help="Measure a vLLM server that runs already.")] = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            help="Where prompts are cut from: wikitext-2, builtin, or a text file.", show_default=False
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer folder, file or hub id, if not the model's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides the prompts and the order of the cells.")] = 0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the cells and what each will take; load no model.")
    ] = False,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--fresh", help="Insist on resuming, or measure all anew; else skip finished cells"
        ),
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder for records.")] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Times of MODEL: first token, gaps, decode and prefill speed, each beside its bound.

    With no MODEL, the built-in model is measured: no GPU and no network needed. Every cell of a sweep is a
    record of its own; the same command goes on where it broke off.
    """
    from evalsuite.cli.speed_run import measure
    from evalsuite.telemetry.machine import read_gpus

    available, _driver, _cuda = read_gpus()
    parallel = numbers("--tensor-parallel-size", tensor_parallel_size, 1)
    on_gpu = bool(available) and server_url is None
    axes = Axes(
        models=(model or DEMO, *(baseline or ())),
        cache_sizes=sizes(cache_sizes),
        modes=_modes(modes, on_gpu, server_url),
        gpus=_gpus(gpus, on_gpu, len(available), max(parallel)),
        tensor_parallel_sizes=parallel,
        concurrencies=numbers("--concurrency", concurrency, 1),
    )
    try:
        serving = Serving(
            engine=engine.value, dtype=dtype.value, load_format=load_format.value,
            moe_expert_cache_policy=moe_expert_cache_policy.value, moe_expert_store=moe_expert_store.value,
            moe_routing=moe_routing.value, max_model_len=max_model_len, max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
            additional_config=_json(additional_config), server_url=server_url,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        workload = Workload(
            corpus=corpus or ("builtin" if DEMO in axes.models or load_format == "dummy" else "wikitext-2"),
            tokenizer=tokenizer, input_len=input_len or (512 if available else 64),
            output_len=output_len or (128 if available else 32), repeats=repeats, warmups=warmup, seed=seed,
            timeout_s=timeout,
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}.") from error
    measure(
        Screen(as_json), axes, serving, workload, results, dry_run=dry_run,
        mode="auto" if resume is None else "resume" if resume else "fresh",
        no_model=model is None, any_mode=modes is None,
    )  # fmt: skip


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


def sizes(text: str) -> tuple[int | None, ...]:
    """Cache sizes, with None for ``all``."""
    parts = [part.strip() for part in text.split(",")]
    given = [part for part in parts if part != ALL]
    found = numbers("--cache-sizes", ",".join(given), 1) if given else ()
    if parts.count(ALL) > 1:
        raise UsageError(f"--cache-sizes {text} names a value twice.", todo="leave one of them out.")
    return (*found, None) if len(given) < len(parts) else found


def _modes(text: str | None, on_gpu: bool, server_url: str | None) -> tuple[Mode, ...]:
    if server_url is not None:
        if text is not None:
            raise UsageError(
                "--modes cannot be chosen for a server that runs already.", todo="leave --modes out."
            )
        return ("graphs",)
    if text is None:
        return ("eager", "graphs") if on_gpu else ("eager",)
    known: dict[str, Mode] = {"eager": "eager", "graphs": "graphs"}
    parts = [part.strip() for part in text.split(",")]
    if unknown := [part for part in parts if part not in known]:
        raise UsageError(f"There is no mode {unknown[0]!r}.", todo="choose eager, graphs, or eager,graphs.")
    return tuple(dict.fromkeys(known[part] for part in parts))


def _gpus(text: str | None, on_gpu: bool, count: int, parallel: int) -> tuple[int, ...]:
    if text is not None:
        return numbers("--gpus", text, 0)
    return tuple(range(min(count, parallel))) if on_gpu else ()


def _json(text: str | None) -> dict[str, Any]:
    try:
        value: Any = json.loads(text) if text is not None else {}
    except ValueError as error:
        raise UsageError(f"--additional-config is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UsageError("--additional-config is no JSON object.", todo="write it as '{\"key\": value}'.")
    return value
