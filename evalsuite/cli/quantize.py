"""`hlwq-eval quantize`: a checkpoint into INT4, HLWQ codes, or decoded weights."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from evalsuite.cli.app import app
from evalsuite.cli.show import Screen
from evalsuite.core.errors import UsageError
from evalsuite.core.record import QuantizeResult, Record
from evalsuite.core.spec import QuantizeSpec


class Method(StrEnum):
    hlwq = "hlwq"
    rtn = "rtn"


class Format(StrEnum):
    int4 = "int4"
    hlwq = "hlwq"
    bf16 = "bf16"


class Scale(StrEnum):
    max = "max"
    mse = "mse"


class Codebook(StrEnum):
    lloyd_max = "lloyd-max"
    absmax = "absmax"


@app.command(short_help="Quantize a model: HLWQ, INT4, baselines.")
def quantize(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Hub id, local folder, GGUF file, smollm2, or demo.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The new folder.")],
    method: Annotated[
        Method, typer.Option(help="hlwq codes the weights before the INT4 grid, rtn rounds them straight.")
    ] = Method.hlwq,
    hlwq_bits: Annotated[int, typer.Option(min=2, max=6, help="Bits of an HLWQ code.")] = 5,
    group_size: Annotated[
        int, typer.Option(help="Weights that share a scale and a norm: 32, 64, 128.")
    ] = 128,
    format_: Annotated[
        Format, typer.Option("--format", help="int4 is what vLLM loads; bf16 writes the decoded weights.")
    ] = Format.int4,
    scale: Annotated[
        Scale, typer.Option(help="INT4 scale: max|w|/7, or searched for the least squared error.")
    ] = Scale.max,
    codebook: Annotated[
        Codebook, typer.Option(help="Levels of an HLWQ code; absmax is for ablations.")
    ] = Codebook.lloyd_max,
    hadamard: Annotated[
        bool, typer.Option("--hadamard/--no-hadamard", help="Rotate blocks before HLWQ codes them.")
    ] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
    gpus: Annotated[str | None, typer.Option(help="Index of the GPU to use, instead of --device.")] = None,
    results: Annotated[Path, typer.Option(help="Folder for records.")] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Quantize SRC into the new folder DST, and show how far the weights moved.

    An interrupted quantization goes on after its last finished shard when the command is repeated.
    """
    from evalsuite.quant.recipe import Recipe

    recipe = Recipe(
        method=method.value, format=format_.value, hlwq_bits=hlwq_bits, codebook=codebook.value,
        hadamard=hadamard, group_size=group_size, scale=scale.value,
    )  # fmt: skip
    spec = QuantizeSpec(source=source, recipe=recipe.as_dict(), device=_device(device, gpus))
    screen = Screen(as_json)
    quantize_model(screen, spec, destination, results)
    screen.note(f"next: hlwq-eval ppl {destination} --baseline {source}")


def quantize_model(screen: Screen, spec: QuantizeSpec, destination: Path, results: Path) -> None:
    """Run and show."""
    from evalsuite.run.quantize import run_quantize
    from evalsuite.store.runs import RunStore

    with screen.quantizing() as progress:
        path, record = run_quantize(spec, destination, RunStore(results), progress)
    _show(screen, path, record)
    screen.note(f"record: {path}")
    screen.document({"path": str(path), **record.model_dump(mode="json")})


def _device(device: str, gpus: str | None) -> str:
    if gpus is not None and device != "auto":
        raise UsageError("--gpus and --device both name a device.", todo="leave one of them out.")
    chosen = device if gpus is None else f"cuda:{gpus}"
    if not re.fullmatch(r"auto|cpu|cuda:\d+", chosen):
        raise UsageError(
            f"{chosen} is no device.",
            cause="a quantization runs on one device.",
            todo="give --device auto, cpu or cuda:0, or the index of one GPU to --gpus.",
        )
    return chosen


def _show(screen: Screen, path: Path, record: Record) -> None:
    from evalsuite.report.plots import quantization_error
    from evalsuite.report.quantization import (
        class_table,
        errors_by_layer,
        quantization_table,
        recipe_text,
        unchanged_table,
    )

    result, recipe = record.results, record.spec["recipe"]
    assert isinstance(result, QuantizeResult)
    screen.table(quantization_table(result, recipe))
    screen.table(class_table(result))
    screen.table(unchanged_table(result))
    for warning in record.warnings:
        screen.warn(warning)
    if lines := errors_by_layer(result):
        whole = 100 * (result.total.relative_error or 0)
        caption = f"{recipe_text(recipe)}. All quantized weights together: {whole:.2f} %."
        paths = quantization_error(
            lines,
            f"{result.source}: error of the quantized weights by layer",
            caption,
            path / "quantization_error",
        )
        screen.note(f"picture: {paths[0]} (and {paths[1].suffix[1:]})")
