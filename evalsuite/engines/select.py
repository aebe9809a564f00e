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
