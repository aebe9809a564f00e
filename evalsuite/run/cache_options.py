"""What `hlwq-eval cache` may be asked for, and what follows from it, as in `evalsuite.run.options`."""

from typing import Literal

from pydantic import Field, PositiveInt

from evalsuite.core.errors import UsageError
from evalsuite.core.spec import Dtype
from evalsuite.core.value import Value
from evalsuite.run.cache_prediction import PredictionRequest
from evalsuite.run.options import Gpus, Names, Sizes, default_corpus, one_device, slots_of
from evalsuite.run.trace import TraceRequest


class TraceOptions(Value):
    """Of `hlwq-eval cache trace`."""

    engine: Literal["torch", "vllm"] = "torch"
    corpus: str | None = None
    tokenizer: str | None = None
    input_len: PositiveInt = 512
    output_len: int = Field(default=128, ge=2)
    requests: PositiveInt = 8
    concurrency: PositiveInt = 1
    seed: int = 0
    dtype: Dtype = "auto"
    gpus: Gpus = ()
    load_format: Literal["auto", "dummy"] = "auto"
    trust_remote_code: bool = False

    def request(self, model: str) -> TraceRequest:
        """Raises UsageError for GPUs that the engine cannot be given."""
        if self.gpus and self.engine == "vllm":
            raise UsageError(
                "vLLM's trace runs on the first GPU it sees.",
                todo="choose it with CUDA_VISIBLE_DEVICES, and leave --gpus out.",
            )
        given = self.model_dump(include=set(TraceRequest.model_fields) - {"corpus"})
        return TraceRequest(
            model=model,
            corpus=self.corpus or default_corpus(model),
            device=one_device(self.gpus, "a trace runs on one device."),
            **given,
        )


class SimulationOptions(Value):
    """Of `hlwq-eval cache simulate`."""

    sizes: Sizes = (8, 64, 128)
    policies: Names = ("lru", "lfu", "lfru", "belady")
    gpu: Names = ()
    geometry: str | None = None
    context: PositiveInt = 4096
    compute_ms: float | None = None
    transfer_gb_per_s: float | None = None

    @property
    def slots(self) -> list[int | None]:
        """Cache sizes; None is all experts."""
        return [slots_of(size) for size in self.sizes]

    def prediction(self) -> PredictionRequest | None:
        """What is predicted for GPUs, None where none is named.

        Raises:
            UsageError: a measurement is no positive number, or belongs to no GPU.
        """
        for flag, value in (
            ("--compute-ms", self.compute_ms), ("--transfer-gb-per-s", self.transfer_gb_per_s)
        ):  # fmt: skip
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{flag} {value:g} is no measurement.", todo="give a positive number.")
        if self.gpu:
            return PredictionRequest(
                gpus=self.gpu, model=self.geometry, context=self.context,
                compute_s=None if self.compute_ms is None else self.compute_ms / 1e3,
                transfer_bytes_per_s=None if self.transfer_gb_per_s is None else self.transfer_gb_per_s * 1e9,
            )  # fmt: skip
        if (self.geometry, self.compute_ms, self.transfer_gb_per_s) != (None, None, None):
            raise UsageError(
                "--geometry, --compute-ms and --transfer-gb-per-s belong to a prediction.",
                todo="say for which GPU with --gpu.",
            )
        return None
