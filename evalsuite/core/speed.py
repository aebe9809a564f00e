"""The result of a speed run: one model, one engine setting, one prompt and output length, one concurrency."""

from typing import Literal

from pydantic import Field

from evalsuite.core.value import Value


class Estimate(Value):
    """Mean over repeats, standard deviation, and the 95 % t-interval, which needs two repeats."""

    mean: float
    std: float | None
    low: float | None
    high: float | None
    n: int


class LoadTimes(Value):
    """Seconds until ready, split as far as the engine reports it.

    Attributes:
        total_s: from the start of loading until the first request can be sent; None for a server that was
            running already, whose loading nobody saw.
        weights_s: reading the weights; compile_s: compiling and capturing graphs; warmup_s: profiling runs.
        resident_share: of the checkpoint's bytes, in the page cache before loading: 0 is a cold load and 1 a
            warm one; None where it cannot be read, or there are no weights to read.
    """

    total_s: float | None
    weights_s: float | None = None
    compile_s: float | None = None
    warmup_s: float | None = None
    resident_share: float | None = None


class Bound(Value):
    """The least time a decoded token can take on this machine, and what of it was reached.

    Attributes:
        bytes_per_token: weights, keys, values and states read in a decoding step, which gives one token to
            each sequence.
        transfer_bytes_per_token: experts copied to the device per step, from measured misses.
        bandwidth_bytes_per_s: measured device copy, reads plus writes, of all devices together.
        transfer_bandwidth_bytes_per_s: measured host-to-device copy; None where nothing is transferred.
        flop_per_token, flop_per_s: operations of a step, and the measured matrix rate.
        tokens_per_s: 1 / (bytes / bandwidth + transfer bytes / transfer bandwidth), per sequence.
        share: measured decode tokens/s over `tokens_per_s`.
    """

    bytes_per_token: int
    transfer_bytes_per_token: int
    bandwidth_bytes_per_s: float
    transfer_bandwidth_bytes_per_s: float | None
    flop_per_token: int = 0
    flop_per_s: float | None = None
    tokens_per_s: float
    share: float


class SpeedResult(Value):
    """Times over the repeats that are not warm-ups; every time stamp lies in ``tokens.parquet``.

    Attributes:
        ttft_s: from submission of a request to its first token.
        tpot_s: (end to end − TTFT) / (output tokens − 1), mean over the requests of a repeat.
        itl_p50_s, itl_p90_s, itl_p99_s: percentiles of the gaps between tokens, over all repeats.
        decode_tokens_per_s: 1 / TPOT, of one sequence.
        output_tokens_per_s: output tokens of all requests over the time from the first submission to the
            last token.
        prefill_tokens_per_s: prompt tokens of all requests over the time to the last first token.
    """

    kind: Literal["speed"] = "speed"
    input_len: int
    output_len: int
    concurrency: int
    repeats: int
    warmups: int
    ttft_s: Estimate
    tpot_s: Estimate
    itl_p50_s: float
    itl_p90_s: float
    itl_p99_s: float
    decode_tokens_per_s: Estimate
    output_tokens_per_s: Estimate
    prefill_tokens_per_s: Estimate
    load: LoadTimes
    bound: Bound | None = None
    bound_absent: str | None = None


class FootprintResult(Value):
    """Memory and disk through load, idle, prefill and decode; the series lie in the record's telemetry.

    Attributes:
        checkpoint_bytes: the weight files; 0 for dummy weights.
        disk_bytes: what the model takes on disk, by purpose: checkpoint, hub cache, expert-cache files.
        disk_absent: purposes that could not be read, with the reason.
    """

    kind: Literal["footprint"] = "footprint"
    checkpoint_bytes: int
    disk_bytes: dict[str, int]
    disk_absent: dict[str, str] = Field(default={})
    load: LoadTimes
    input_len: int
    output_len: int
