"""How fast weights are quantized, next to how fast their bytes can move at all.

Quantity: bytes of BF16 input per second (GB = 10⁹), on expert layers of the real size: 256 experts of gate
and up [1024, 2048] and down [2048, 512], which are 96 % of the 35B-A3B's quantized weights. Two settings:

- compute: BF16 weights already on the device through `evalsuite.quant.steps.code` and the error sums, the
  pieces as large as the pipeline makes them. Its bound is memory: every input byte must be read and every
  output byte written once, so GB/s ≤ copy bandwidth · in / (in + out), the copy measured in the same run.
- end to end: a checkpoint of one layer on the disk through `evalsuite.quant.pipeline.quantize`. Its bound is
  what reading the input and writing the output take at the rate of a plain copy of the input's file, which
  may use the system's cache just as the run itself may.

The time for the whole 35B is the quantized weights' bytes over the rate of one layer.

    python experiments/benchmarks/quantize_speed.py --out speed.json
"""

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

from evalsuite.engines.dequantize import decode_int4
from evalsuite.quant import grid, hlwq
from evalsuite.quant.hadamard import walsh_hadamard
from evalsuite.quant.pack import pack_int4
from evalsuite.quant.pipeline import CPU_PIECE, CUDA_PIECE, quantize
from evalsuite.quant.plan import TensorInfo, plan_shards
from evalsuite.quant.quality import error_sums, squared_sums
from evalsuite.quant.recipe import HlwqScheme, Int4Grid, Recipe
from evalsuite.quant.rules import FAMILIES
from evalsuite.quant.steps import code

EXPERTS, HIDDEN, INTERMEDIATE = 256, 2048, 512
RECIPES = {
    "rtn → int4": Recipe(method="rtn"),
    "rtn, searched scale → int4": Recipe(method="rtn", scale="mse"),
    "hlwq → int4": Recipe(),
    "hlwq → codes": Recipe(format="hlwq"),
}


def quantized_tensors() -> list[TensorInfo]:
    """The 35B-A3B's quantized weights: 40 layers, of which every fourth has full attention."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(40):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.mlp.experts.gate_up_proj"] = (EXPERTS, 2 * INTERMEDIATE, HIDDEN)
        shapes[f"{layer}.mlp.experts.down_proj"] = (EXPERTS, HIDDEN, INTERMEDIATE)
        shapes[f"{layer}.mlp.shared_expert.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{layer}.mlp.shared_expert.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{layer}.mlp.shared_expert.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        if i % 4 == 3:
            shapes[f"{layer}.self_attn.q_proj.weight"] = (8192, HIDDEN)
            shapes[f"{layer}.self_attn.k_proj.weight"] = (512, HIDDEN)
            shapes[f"{layer}.self_attn.v_proj.weight"] = (512, HIDDEN)
            shapes[f"{layer}.self_attn.o_proj.weight"] = (HIDDEN, 4096)
        else:
            shapes[f"{layer}.linear_attn.in_proj_qkv.weight"] = (8192, HIDDEN)
            shapes[f"{layer}.linear_attn.in_proj_z.weight"] = (4096, HIDDEN)
            shapes[f"{layer}.linear_attn.out_proj.weight"] = (HIDDEN, 4096)
    return [TensorInfo(name, "BF16", shape) for name, shape in shapes.items()]


def timed(work: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each repeat after one warm-up."""
    seconds = []
    for i in range(repeats + 1):
        synchronize(device)
        begun = time.perf_counter()
        work()
        synchronize(device)
        if i:
            seconds.append(time.perf_counter() - begun)
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def expert_layer(experts: int, device: torch.device) -> list[Tensor]:
    """The matrices of some experts, BF16: [2E, 512, 2048] and [E, 2048, 512]."""
    shapes = [(2 * experts, INTERMEDIATE, HIDDEN), (experts, HIDDEN, INTERMEDIATE)]
    return [(torch.randn(shape, device=device) * 0.02).bfloat16() for shape in shapes]


def pieces(layer: list[Tensor], limit: int) -> list[Tensor]:
    return [part for stack in layer for part in stack.split(max(1, limit // stack[0].numel()))]


def measure_copy(stack: Tensor, repeats: int) -> float:
    """Bytes read and written per second when the device copies a stack."""
    target = torch.empty_like(stack)
    return 2 * stack.nbytes / statistics.median(timed(lambda: target.copy_(stack), stack.device, repeats))


def measure_compute(layer: list[Tensor], limit: int, copy_bytes_per_s: float, repeats: int) -> list[dict]:
    device, bytes_in = layer[0].device, sum(stack.nbytes for stack in layer)
    rows = []
    for name, recipe in RECIPES.items():
        bytes_out = 0

        def work(recipe: Recipe = recipe) -> None:
            nonlocal bytes_out
            bytes_out = 0
            for piece in pieces(layer, limit):
                weights = piece.float()
                coded = code(weights, recipe, "benchmark")
                error_sums(weights, coded.decoded, squared_sums(weights) / weights[0].numel()).cpu()
                bytes_out += sum(part.nbytes for part in coded.parts.values())

        seconds = timed(work, device, repeats)
        bound = copy_bytes_per_s * bytes_in / (bytes_in + bytes_out)
        rows.append(row("compute", name, seconds, bytes_in, bytes_out, bound))
    return rows


def measure_stages(piece: Tensor, repeats: int) -> dict[str, float]:
    """Where the time of hlwq → int4 goes: median seconds of each stage on one piece."""
    scheme, weights, device = HlwqScheme(), piece.float(), piece.device
    codes, norms = hlwq.encode(weights, scheme, "benchmark")
    decoded = hlwq.decode(codes, norms, scheme, weights.shape[-1])
    int4, scales = grid.encode(decoded, Int4Grid(), "benchmark")
    blocks = weights.unflatten(-1, (-1, scheme.block))
    means = squared_sums(weights)
    stages: dict[str, Callable[[], Any]] = {
        "to float32": lambda: piece.float(),
        "hadamard": lambda: walsh_hadamard(blocks),
        "nearest level": lambda: hlwq.nearest(blocks, scheme),
        "encode, all": lambda: hlwq.encode(weights, scheme, "benchmark"),
        "decode": lambda: hlwq.decode(codes, norms, scheme, weights.shape[-1]),
        "int4 grid": lambda: grid.encode(decoded, Int4Grid(), "benchmark"),
        "int4 decode": lambda: decode_int4(int4, scales),
        "int4 pack": lambda: pack_int4(int4),
        "error sums": lambda: error_sums(weights, decoded, means),
    }
    return {name: statistics.median(timed(work, device, repeats)) for name, work in stages.items()}


def measure_end_to_end(experts: int, device: torch.device, scratch: Path | None) -> list[dict]:
    """One layer's experts from disk to disk, once each; files come from and go to the system's cache."""
    rows = []
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        source = Path(folder) / "source"
        source.mkdir()
        (source / "config.json").write_text('{"model_type": "qwen3_5_moe_text"}')
        gate_up, down = expert_layer(experts, torch.device("cpu"))
        prefix = "model.layers.0.mlp.experts"
        state = {
            f"{prefix}.gate_up_proj": gate_up.view(experts, 2 * INTERMEDIATE, HIDDEN),
            f"{prefix}.down_proj": down,
        }
        save_file(state, source / "model.safetensors")
        for name, recipe in RECIPES.items():
            begun = time.perf_counter()
            shutil.copyfile(source / "model.safetensors", Path(folder) / "copy")
            copy_s = time.perf_counter() - begun
            (Path(folder) / "copy").unlink()
            begun = time.perf_counter()
            report = quantize(source, Path(folder) / "out", recipe, device=str(device))
            seconds = time.perf_counter() - begun
            shutil.rmtree(Path(folder) / "out")
            bound = report.bytes_before / (copy_s * (1 + report.bytes_after / report.bytes_before) / 2)
            rows.append(row("end to end", name, [seconds], report.bytes_before, report.bytes_after, bound))
    return rows


def row(setting: str, name: str, seconds: list[float], bytes_in: int, bytes_out: int, bound: float) -> dict:
    rate = bytes_in / statistics.median(seconds)
    whole = sum(info.bytes for info in quantized_tensors())
    return {
        "setting": setting, "recipe": name, "seconds": seconds, "bytes_in": bytes_in, "bytes_out": bytes_out,
        "bf16_gb_per_s": rate / 1e9, "bound_gb_per_s": bound / 1e9, "share_of_bound": rate / bound,
        "whole_model_bytes_in": whole, "whole_model_s": whole / rate,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput of the quantizer, next to its bounds.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--experts", type=int, help="experts of the layer: 256 on a GPU, 8 on a CPU by default"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="folder for the end-to-end checkpoint")
    args = parser.parse_args()

    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    experts = args.experts or (EXPERTS if on_gpu else 8)
    torch.manual_seed(0)
    layer = expert_layer(experts, device)
    copy_bytes_per_s = measure_copy(layer[0], args.repeats)

    limit = CUDA_PIECE if on_gpu else CPU_PIECE
    rows = measure_compute(layer, limit, copy_bytes_per_s, args.repeats)
    stages = measure_stages(pieces(layer, limit)[0], args.repeats)
    rows += measure_end_to_end(experts, device, args.scratch)
    plan = plan_shards({"35B-A3B": quantized_tensors()}, FAMILIES["qwen3_5_moe_text"], Recipe())
    result = {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "torch": torch.__version__, "threads": torch.get_num_threads(), "experts": experts,
        "copy_bytes_per_s": copy_bytes_per_s, "stages_s": stages, "rows": rows,
        "whole_model_quantized_bytes_out": plan.bytes_after,
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n")

    print(f"{result['device']}, torch {torch.__version__}, copy {copy_bytes_per_s / 1e9:.1f} GB/s")
    print(f"{'':12}{'recipe':30}{'GB/s BF16':>10}{'bound':>9}{'share':>8}{'35B':>10}")
    for r in rows:
        print(
            f"{r['setting']:12}{r['recipe']:30}{r['bf16_gb_per_s']:10.3f}{r['bound_gb_per_s']:9.2f}"
            f"{r['share_of_bound']:8.1%}{r['whole_model_s']:8.1f} s"
        )
    piece_weights = pieces(layer, limit)[0].numel()
    print(
        "hlwq → int4, ps a weight: "
        + ", ".join(f"{n} {s / piece_weights * 1e12:.1f}" for n, s in stages.items())
    )


if __name__ == "__main__":
    main()
