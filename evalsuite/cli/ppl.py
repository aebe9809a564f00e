"""`hlwq-eval ppl`: sliding-window perplexity."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from evalsuite.cli.app import app
from evalsuite.cli.choices import (
    GPU_KIND,
    WORKERS,
    CachePolicy,
    CacheStore,
    Cluster,
    Dtype,
    Engine,
    cluster_choice,
    json_object,
    one_gpu,
)
from evalsuite.cli.show import Screen
from evalsuite.core.errors import UsageError
from evalsuite.core.protocol import PROTOCOLS, protocol


@app.command(short_help="Perplexity of a model on a text.")
def ppl(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, local folder, GGUF file, smollm2, or demo (the built-in model)."),
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="auto takes torch, or vllm for what torch cannot read.")
    ] = Engine.auto,
    protocol_name: Annotated[
        str, typer.Option("--protocol", help=f"One of {', '.join(PROTOCOLS)}.")
    ] = "card-1155",
    context: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between window starts.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first so many windows.")] = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="wikitext-2, builtin, or a text file; wikitext-2 unless demo takes part"),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer folder, file or hub id, if not the model's.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="A model or a finished run to compare with, paired by window.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="auto is bfloat16 where the device has it; under vllm, the weights' own.")
    ] = Dtype.auto,
    batch_size: Annotated[str, typer.Option(help="Windows a forward pass, or auto.")] = "auto",
    gpus: Annotated[str | None, typer.Option(help="Index of the GPU to use.")] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs that share the model (vllm).")] = 1,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(min=0.01, max=1.0, help="Share of the GPU's memory to take (vllm).")
    ] = None,
    additional_config: Annotated[str, typer.Option(help="JSON object, handed to vLLM as it is.")] = "{}",
    moe_expert_cache_size: Annotated[
        int | None, typer.Option(min=1, help="Experts of each layer on the device; else all of them.")
    ] = None,
    moe_expert_cache_policy: Annotated[
        CachePolicy, typer.Option(help="Which experts stay.")
    ] = CachePolicy.lru,
    moe_expert_store: Annotated[
        CacheStore, typer.Option(help="Where the others are: page-locked memory, or a file.")
    ] = CacheStore.pinned,
    cluster: Cluster = None,
    gpu_kind: Annotated[str | None, typer.Option(help=GPU_KIND)] = None,
    workers: Annotated[int | None, typer.Option(min=1, help=WORKERS)] = None,
    keep_hidden: Annotated[
        bool,
        typer.Option("--keep-hidden", help="Keep what a later divergence needs (implied by --baseline)."),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    resume: Annotated[
        bool | None,
        typer.Option("--resume/--fresh", help="Insist on resuming, or start anew; else resume if possible"),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the window arithmetic; load no model.")
    ] = False,
    windows: Annotated[
        int | None, typer.Option(min=1, help="With --explain: windows that a card states.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="With --explain: scored tokens that a card states.")
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder for records.")] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Perplexity of MODEL on a text, with an interval, a record and a picture.

    With no MODEL, the built-in model is scored on the built-in text: no GPU, no network, under two minutes.
    """
    screen = Screen(as_json)
    if (windows is None) != (tokens is None) or (windows is not None and not explain):
        raise UsageError(
            "--windows and --tokens go together, with --explain.",
            todo="hlwq-eval ppl --explain --windows 1155 --tokens 295680",
        )
    if explain:
        from evalsuite.cli.explain import explain_protocols

        chosen = protocol(protocol_name).override(context, stride)
        explain_protocols(screen, model, tokenizer, corpus, chosen, windows, tokens)
        return
    from evalsuite.data.models import DEMO
    from evalsuite.run.options import PerplexityOptions, asked

    options = asked(
        PerplexityOptions,
        {
            "engine": engine.value, "protocol": protocol_name, "context": context, "stride": stride,
            "limit": limit, "corpus": corpus, "tokenizer": tokenizer, "dtype": dtype.value,
            "batch_size": _batch_size(batch_size), "gpus": one_gpu(gpus),
            "tensor_parallel_size": tensor_parallel_size,
            "gpu_memory_utilization": gpu_memory_utilization,
            "additional_config": json_object("--additional-config", additional_config),
            "moe_expert_cache_size": moe_expert_cache_size,
            "moe_expert_cache_policy": moe_expert_cache_policy.value,
            "moe_expert_store": moe_expert_store.value, "keep_hidden": keep_hidden,
            "trust_remote_code": trust_remote_code,
        },
    )  # fmt: skip
    cluster_asked = cluster_choice(cluster, {"--gpu-kind": gpu_kind and [gpu_kind], "--workers": workers})
    given = {"corpus": corpus, "limit": limit, "tokenizer": tokenizer}
    from evalsuite.cli.perplexity_run import measure  # slow: after what can be refused at once

    measure(
        screen,
        options.spec(model or DEMO, *([] if baseline is None else [baseline])),
        results,
        baseline=baseline,
        inherit=[key for key, value in given.items() if value is None]
        + ([] if options.chose_protocol else ["protocol"]),
        mode="auto" if resume is None else "resume" if resume else "fresh",
        cluster=cluster_asked,
    )


def _batch_size(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise UsageError(f"--batch-size {text} is neither auto nor a positive number.", todo="try auto.")
    return int(text)
