"""`hlwq-eval footprint`: VRAM, RAM and disk through load, idle, prefill and decode."""

from pathlib import Path
from typing import Annotated

import typer

from evalsuite.cli.app import app
from evalsuite.cli.choices import (
    ROUTING,
    ROUTINGS,
    CachePolicy,
    CacheStore,
    Dtype,
    Engine,
    LoadFormat,
    numbers,
)
from evalsuite.cli.show import Screen


@app.command(short_help="VRAM, RAM and disk of a model while it is used.")
def footprint(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, local folder, GGUF file, smollm2, or demo (the built-in model)."),
    ] = None,
    engine: Annotated[Engine, typer.Option(help="auto picks what is installed and fits.")] = Engine.auto,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens that are generated.")] = 128,
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts that are sent at once.")] = 1,
    idle: Annotated[float, typer.Option(min=0, help="Seconds at rest after loading.")] = 2.0,
    moe_expert_cache_size: Annotated[
        int | None, typer.Option(min=1, help="Experts of each layer on the device; else all.")
    ] = None,
    moe_expert_cache_policy: Annotated[
        CachePolicy, typer.Option(help="Which experts stay.")
    ] = CachePolicy.lru,
    moe_expert_store: Annotated[
        CacheStore, typer.Option(help="Where the other experts are.")
    ] = CacheStore.pinned,
    dtype: Annotated[Dtype, typer.Option(help="auto is bfloat16 where the device has it.")] = Dtype.auto,
    load_format: Annotated[
        LoadFormat, typer.Option(help="dummy: random weights in the geometry of config.json.")
    ] = LoadFormat.auto,
    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager", help="No CUDA graphs, no compilation.")
    ] = False,
    gpus: Annotated[str | None, typer.Option(help="Indices of the GPUs to use, such as 0,1.")] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs that share the model.")] = 1,
    moe_routing: Annotated[str, typer.Option(metavar=ROUTINGS, help=ROUTING)] = "model",
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Context that is reserved for.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="As vLLM has it.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(min=1, help="As vLLM has it.")] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Share of VRAM that vLLM fills.")
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="Text of the prompts: wikitext-2, builtin, or a file; builtin for demo."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer folder, file or hub id, if not the model's.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for loading, and again for the request.")
    ] = 1800.0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    results: Annotated[Path, typer.Option(help="Folder for records.")] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """VRAM, RAM and disk of MODEL through load, idle, prefill and decode, sampled from outside.

    With no MODEL, the built-in model is watched: no GPU, no network.
    """
    from evalsuite.data.models import DEMO
    from evalsuite.run.options import FootprintOptions, asked

    options = asked(
        FootprintOptions,
        {
            "engine": engine.value, "input_len": input_len, "output_len": output_len,
            "concurrency": concurrency, "idle": idle, "moe_expert_cache_size": moe_expert_cache_size,
            "moe_expert_cache_policy": moe_expert_cache_policy.value,
            "moe_expert_store": moe_expert_store.value, "dtype": dtype.value,
            "load_format": load_format.value, "enforce_eager": enforce_eager,
            "gpus": () if gpus is None else numbers("--gpus", gpus, 0),
            "tensor_parallel_size": tensor_parallel_size, "moe_routing": moe_routing,
            "max_model_len": max_model_len, "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "gpu_memory_utilization": gpu_memory_utilization, "corpus": corpus, "tokenizer": tokenizer,
            "timeout": timeout, "trust_remote_code": trust_remote_code,
        },
    )  # fmt: skip
    from evalsuite.cli.footprint_run import watch_model  # slow: after what can be refused at once

    watch_model(Screen(as_json), options.spec(model or DEMO), results)
