"""`hlwq-eval speed`: one cell or a sweep."""

from pathlib import Path
from typing import Annotated

import typer

from evalsuite.cli.app import app
from evalsuite.cli.choices import (
    ALL,
    EXCLUSIVE,
    GPU_KIND,
    ROUTING,
    ROUTINGS,
    CachePolicy,
    CacheStore,
    Cluster,
    Dtype,
    Engine,
    LoadFormat,
    cluster_choice,
    json_object,
    numbers,
    refuse_on_a_cluster,
    sizes,
)
from evalsuite.cli.show import Screen
from evalsuite.core.errors import UsageError
from evalsuite.core.sweep import Mode


@app.command(short_help="Tokens/s of a model, over cache sizes and GPUs.")
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
    moe_expert_cache_policy: Annotated[
        CachePolicy, typer.Option(help="Which experts stay.")
    ] = CachePolicy.lru,
    moe_expert_store: Annotated[
        CacheStore, typer.Option(help="Where the other experts are.")
    ] = CacheStore.pinned,
    moe_routing: Annotated[str, typer.Option(metavar=ROUTINGS, help=ROUTING)] = "model",
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
    cluster: Cluster = None,
    gpu_kind: Annotated[
        list[str] | None, typer.Option(help=f"{GPU_KIND} Several measure every cell on each.")
    ] = None,
    exclusive: Annotated[bool, typer.Option("--exclusive", help=EXCLUSIVE)] = False,
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
    from evalsuite.data.models import DEMO
    from evalsuite.run.options import SpeedOptions, asked

    screen = Screen(as_json)
    chosen = cluster_choice(cluster, {"--gpu-kind": gpu_kind, "--exclusive": exclusive})
    options = asked(
        SpeedOptions,
        {
            "cache_sizes": sizes("--cache-sizes", cache_sizes), "modes": _modes(modes),
            "gpus": None if gpus is None else numbers("--gpus", gpus, 0),
            "tensor_parallel_size": numbers("--tensor-parallel-size", tensor_parallel_size, 1),
            "concurrency": numbers("--concurrency", concurrency, 1), "input_len": input_len,
            "output_len": output_len, "repeats": repeats, "warmup": warmup, "timeout": timeout,
            "engine": engine.value, "dtype": dtype.value, "load_format": load_format.value,
            "moe_expert_cache_policy": moe_expert_cache_policy.value,
            "moe_expert_store": moe_expert_store.value, "moe_routing": moe_routing,
            "max_model_len": max_model_len, "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "gpu_memory_utilization": gpu_memory_utilization,
            "additional_config": json_object("--additional-config", additional_config),
            "server_url": server_url, "corpus": corpus, "tokenizer": tokenizer, "seed": seed,
            "trust_remote_code": trust_remote_code,
        },
    )  # fmt: skip
    from evalsuite.cli.speed_run import LiveSweep, Place, measure  # slow: after what can be refused at once
    from evalsuite.telemetry.gpu import count_visible
    from evalsuite.telemetry.machine import read_machine

    if chosen is None:
        place = Place(read_machine(), None)
        gpu_count = count_visible(len(place.machine.gpus))
    else:
        from evalsuite.cluster.benches import survey

        refuse_on_a_cluster({"--gpus": gpus, "--server-url": server_url, "--dry-run": dry_run})
        machine, gpu_count = survey(chosen, LiveSweep(screen))
        place = Place(machine, chosen)
    measure(
        screen, place, options.sweep((model or DEMO, *(baseline or ())), gpu_count), results,
        dry_run=dry_run, mode="auto" if resume is None else "resume" if resume else "fresh",
        no_model=model is None,
    )  # fmt: skip


def _modes(text: str | None) -> tuple[Mode, ...] | None:
    if text is None:
        return None
    known: dict[str, Mode] = {"eager": "eager", "graphs": "graphs"}
    parts = [part.strip() for part in text.split(",")]
    if unknown := [part for part in parts if part not in known]:
        raise UsageError(f"There is no mode {unknown[0]!r}.", todo="choose eager, graphs, or eager,graphs.")
    return tuple(dict.fromkeys(known[part] for part in parts))
