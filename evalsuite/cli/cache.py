"""`hlwq-eval cache`: which experts a model chooses, and what a cache of N of them would do."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from evalsuite.cli.app import app
from evalsuite.cli.choices import Dtype, LoadFormat, one_gpu, sizes, words
from evalsuite.cli.show import Screen

cache_app = typer.Typer(no_args_is_help=True, help="Expert caches: traces, simulation, files.")
app.add_typer(cache_app, name="cache")


class TraceEngine(StrEnum):
    torch = "torch"
    vllm = "vllm"


@cache_app.command()
def trace(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, or demo (the built-in model).")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for trace.parquet and its picture.")],
    engine: Annotated[TraceEngine, typer.Option(help="What runs the model.")] = TraceEngine.torch,
    corpus: Annotated[
        str | None, typer.Option(help="wikitext-2, builtin, or a text file; wikitext-2 unless MODEL is demo.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer folder, file or hub id, if not the model's.")
    ] = None,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens generated after it.")] = 128,
    requests: Annotated[int, typer.Option(min=1, help="Prompts.")] = 8,
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts that run at once.")] = 1,
    seed: Annotated[int, typer.Option(help="Decides which stretches of the text are prompts.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="auto is bfloat16 where the device has it.")] = Dtype.auto,
    gpus: Annotated[str | None, typer.Option(help="Index of the GPU to use, with the torch engine.")] = None,
    load_format: Annotated[
        LoadFormat, typer.Option(help="dummy takes random weights, which the trace then says.")
    ] = LoadFormat.auto,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace a trace that is there already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Which experts each token of MODEL chose in each layer, while reading and writing real text."""
    from evalsuite.cli.cache_run import make_trace
    from evalsuite.run.cache_options import TraceOptions
    from evalsuite.run.options import asked

    options = asked(
        TraceOptions,
        {
            "engine": engine.value, "corpus": corpus, "tokenizer": tokenizer, "input_len": input_len,
            "output_len": output_len, "requests": requests, "concurrency": concurrency, "seed": seed,
            "dtype": dtype.value, "gpus": one_gpu(gpus),
            "load_format": load_format.value, "trust_remote_code": trust_remote_code,
        },
    )  # fmt: skip
    make_trace(Screen(as_json), options.request(model), out, replace=fresh)


@cache_app.command()
def simulate(
    trace_path: Annotated[Path, typer.Argument(metavar="TRACE", help="trace.parquet, or its folder.")],
    cache_sizes: Annotated[
        str, typer.Option("--sizes", help="Experts of each layer on the device, or all.")
    ] = "8,64,128",
    policies: Annotated[
        str, typer.Option(help="lru, lfu, fifo, slru, lfru, and belady, which is the bound.")
    ] = "lru,lfu,lfru,belady",
    model: Annotated[str | None, typer.Option(help="Refuse the trace unless it is of this model.")] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Predict for these, such as rtx-4090,h100; or all.")
    ] = None,
    geometry: Annotated[
        str | None,
        typer.Option(help="Predict for this model, a config.json is enough; else for the traced one."),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the sequence that is predicted.")] = 4096,
    compute_ms: Annotated[
        float | None, typer.Option(help="Measured time of a token with all experts resident, of one --gpu.")
    ] = None,
    transfer_gb_per_s: Annotated[
        float | None, typer.Option(help="Measured host-to-device copy in 10⁹ bytes/s, of one --gpu.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder for tables and pictures; the trace's own by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Hit rates and bytes moved at every size under every policy, and what they mean for a GPU."""
    from evalsuite.cli.cache_run import run_simulation
    from evalsuite.run.cache_options import SimulationOptions
    from evalsuite.run.options import asked

    options = asked(
        SimulationOptions,
        {
            "sizes": sizes("--sizes", cache_sizes), "policies": words("--policies", policies),
            "gpu": () if gpu is None else words("--gpu", gpu), "geometry": geometry, "context": context,
            "compute_ms": compute_ms, "transfer_gb_per_s": transfer_gb_per_s,
        },
    )  # fmt: skip
    run_simulation(Screen(as_json), trace_path, options, model=model, results=results)
