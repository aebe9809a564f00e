"""What a request will take, before anything loads: the engine that would run it, and its sizes."""

from evalsuite.core.errors import UsageError
from evalsuite.core.geometry import Geometry
from evalsuite.core.spec import Serving
from evalsuite.data.models import Checkpoint
from evalsuite.engines.compute import resolve_compute
from evalsuite.engines.geometry import read_geometry
from evalsuite.engines.select import choose_engine

WITHOUT_GRAPHS = ("torch",)


def predict_geometry(checkpoint: Checkpoint, serving: Serving) -> Geometry:
    """Sizes as the engine that `choose_engine` chooses would hold the model.

    Raises:
        EvalError: no engine can honour the request, or the sizes are not known.
    """
    name, _ = choose_engine(serving, checkpoint)
    if serving.dtype != "auto":
        dtype = serving.dtype
    elif serving.gpus:
        dtype = "bfloat16"
    else:
        dtype = str(resolve_compute("cpu", "auto")[1]).removeprefix("torch.")
    return read_geometry(checkpoint, dtype, dequantised=name == "torch")


def has_graphs(checkpoint: Checkpoint, serving: Serving) -> bool:
    """Whether the engine that `choose_engine` chooses can capture CUDA graphs on a GPU."""
    return choose_engine(serving, checkpoint)[0] not in WITHOUT_GRAPHS


def require_graphs(checkpoint: Checkpoint, serving: Serving, has_gpu: bool) -> None:
    """Raises UsageError where CUDA graphs are asked for and the machine or the engine has none."""
    if not has_gpu:
        raise UsageError("CUDA graphs need a GPU, and this machine has none.", todo="give --modes eager.")
    if not has_graphs(checkpoint, serving):
        name, why = choose_engine(serving, checkpoint)
        raise UsageError(
            f"The {name} engine has no CUDA graphs; it was chosen because: {why}.",
            todo="give --modes eager, or install vLLM.",
        )
