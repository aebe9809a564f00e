"""Which engine runs a request, and why; and that engine, loaded."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from evalsuite.core.errors import EvalError, UsageError
from evalsuite.core.spec import Serving
from evalsuite.data.models import Checkpoint, find_checkpoint
from evalsuite.engines.base import Generator
from evalsuite.engines.vllm_arguments import engine_arguments, vllm_installed


def choose_engine(serving: Serving, checkpoint: Checkpoint) -> tuple[str, str]:
    """The engine for a request, ``torch``, ``vllm`` or ``server``, and why in half a sentence.

    ``auto`` takes vLLM where it is installed and can honour the request on a GPU, and torch elsewhere; a
    server only when there is a URL.

    Raises:
        EvalError: an engine was asked for by name that cannot honour the request, or none can.
    """
    name, why = _choose(serving, checkpoint)
    refuse_settings(name, serving)
    if serving.moe_routing != "model" and (name == "torch" or serving.server_url is not None):
        raise UsageError(
            f"--moe-routing {serving.moe_routing} needs a vLLM that is started here, and the engine would be "
            f"{name}: {why}.",
            todo="give --engine vllm where it is installed, or leave --moe-routing out.",
        )
    if name == "torch" and not checkpoint.weights:
        raise UsageError(
            f"Dummy weights need vLLM, and the engine would be torch: {why}.",
            todo="give --engine vllm where it is installed, or a checkpoint with weights.",
        )
    return name, why


def _choose(serving: Serving, checkpoint: Checkpoint) -> tuple[str, str]:
    if serving.server_url is not None:
        if serving.engine not in ("auto", "server"):
            raise UsageError(
                f"--server-url was given, and --engine {serving.engine} uses no server.",
                todo="leave one of them out.",
            )
        return "server", "a server's URL was given"
    if serving.engine == "torch":
        return "torch", "asked for"
    if serving.engine in ("vllm", "server"):
        engine_arguments(checkpoint, serving)
        return serving.engine, "asked for"
    version = vllm_installed()
    if version is None or find_spec("vllm") is None:
        return "torch", "vLLM is not installed"
    if "cpu" in version:
        return "torch", (f"vLLM {version} is built for the CPU, where it runs fewer models than torch")
    try:
        engine_arguments(checkpoint, serving)
    except EvalError as error:
        return "torch", f"vLLM cannot: {error.what}"
    return "vllm", f"vLLM {version} is installed and can honour the request"


def open_generator(
    model: str, serving: Serving, log: Path, on_progress: Callable[[str], None] = lambda _: None
) -> Generator:
    """Load a model in this process with the engine that `choose_engine` chooses.

    Args:
        log: where standard error of this process goes; a server's output is appended to it.
        on_progress: told the last line of a server's log while it loads.

    Raises:
        EvalError: the request cannot be honoured, or loading failed.
    """
    checkpoint = find_checkpoint(model, weights=serving.load_format != "dummy")
    name, _ = choose_engine(serving, checkpoint)
    if name == "server":
        from evalsuite.engines.vllm_server import ServerGenerator

        return ServerGenerator(checkpoint, serving, log, on_progress)
    if name == "vllm":
        from evalsuite.engines.vllm_offline import VllmGenerator

        return VllmGenerator(checkpoint, serving, log)
    from evalsuite.engines.torch_generator import TorchGenerator

    return TorchGenerator(checkpoint, serving)


def refuse_settings(name: str, serving: Serving) -> None:
    """Raises UsageError for a setting that this engine does not have, or that a running server decides."""
    if name == "torch":
        _refuse_for_torch(serving)
    elif serving.server_url is not None:
        _refuse_for_attached(serving)


def _refuse_for_torch(serving: Serving) -> None:
    for given, flag, todo in (
        (serving.tensor_parallel_size > 1, "--tensor-parallel-size", "leave it out, or give --engine vllm."),
        (len(serving.gpus) > 1, "more than one GPU", "give one index to --gpus, or --engine vllm."),
        (serving.server_url is not None, "--server-url", "give --engine server."),
        (bool(serving.additional_config), "--additional-config", "leave it out, or give --engine vllm."),
        (serving.max_num_seqs is not None, "--max-num-seqs", "leave it out, or give --engine vllm."),
        (
            serving.max_num_batched_tokens is not None,
            "--max-num-batched-tokens",
            "leave it out, or give --engine vllm.",
        ),
        (
            serving.gpu_memory_utilization is not None,
            "--gpu-memory-utilization",
            "leave it out: this engine takes what it needs.",
        ),
    ):
        if given:
            raise UsageError(f"The torch engine does not know {flag}.", todo=todo)


def _refuse_for_attached(serving: Serving) -> None:
    """What only a start of the server could honour."""
    unset = Serving()
    for name in (
        "dtype", "tensor_parallel_size", "enforce_eager", "moe_expert_cache_size", "max_model_len",
        "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "additional_config",
    ):  # fmt: skip
        if getattr(serving, name) != getattr(unset, name):
            raise UsageError(
                f"{name} was given, and the server at {serving.server_url} runs already.",
                todo="give it to the server when it is started, or leave --server-url out.",
            )
