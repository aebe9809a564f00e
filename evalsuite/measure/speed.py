"""Speed of generation, from time stamps alone.

For a request of n output tokens, submitted at s, its tokens visible at t₁ … tₙ:

    TTFT = t₁ − s                       time to first token
    ITL  = tᵢ₊₁ − tᵢ                    gaps between tokens; 0 within tokens that came together
    TPOT = (tₙ − t₁) / (n − 1)          which is (end to end − TTFT) / (n − 1)
    decode tokens/s = 1 / TPOT          of one sequence

and for a repeat, which sends its requests at once:

    output tokens/s  = Σ output tokens / (last token − first submission)
    prefill tokens/s = Σ prompt tokens / (last first token − first submission)

Times are seconds. TTFT and TPOT of a repeat are means over its requests; a quantity's estimate is the mean
over repeats with its t-interval. Warm-ups are kept and not counted.

The nearest rival convention divides all output tokens by the whole time, prefill included, and calls that
tokens/s; it is the number called output tokens/s here. Another takes the mean of ITL over all chunks, which
exceeds TPOT as soon as several tokens arrive in one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from evalsuite.core.errors import MeasurementError
from evalsuite.core.speed import Estimate, LoadTimes, SpeedResult
from evalsuite.core.stats import Floats, t_interval
from evalsuite.engines.base import Generated

COLUMNS = ("repeat", "warmup", "request", "position", "token", "submitted_s", "stamp_s")


def token_rows(repeat: int, warmup: bool, requests: Sequence[Generated]) -> pd.DataFrame:
    """One repeat as rows, a token each; stamps are as the engine gave them, on the monotonic clock.

    Raises:
        MeasurementError: stamps that cannot be: before the submission, or going back.
    """
    frames: list[pd.DataFrame] = []
    for number, request in enumerate(requests):
        times = np.concatenate([[request.submitted_s], request.token_s])
        if len(request.ids) != len(request.token_s) or not np.all(np.diff(times) >= 0):
            raise MeasurementError(
                f"The time stamps of request {number} in repeat {repeat} go back, or are not one a token.",
                todo="this is a fault of the engine's driver: please report it with the record.",
            )
        columns: dict[str, Any] = {
            "repeat": repeat, "warmup": warmup, "request": number, "position": np.arange(len(request.ids)),
            "token": request.ids, "submitted_s": request.submitted_s, "stamp_s": request.token_s,
        }  # fmt: skip
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def summarise(tokens: pd.DataFrame, *, input_len: int, load: LoadTimes) -> SpeedResult:
    """The result that follows from the tokens of all repeats.

    Args:
        tokens: rows of `token_rows`, warm-ups included; at least one repeat that counts.
    """
    counted = tokens[~tokens["warmup"]].sort_values(["repeat", "request", "position"])
    requests = counted.groupby(["repeat", "request"]).agg(
        submitted=("submitted_s", "first"), first=("stamp_s", "first"), last=("stamp_s", "last"),
        n=("stamp_s", "size"),
    )  # fmt: skip
    requests["ttft"] = requests["first"] - requests["submitted"]
    requests["tpot"] = (requests["last"] - requests["first"]) / (requests["n"] - 1)
    repeats = requests.groupby("repeat").agg(
        ttft=("ttft", "mean"), tpot=("tpot", "mean"), start=("submitted", "min"), prefilled=("first", "max"),
        stop=("last", "max"), n=("n", "sum"), requests=("n", "size"),
    )  # fmt: skip
    _refuse_no_time(repeats)
    gaps = _floats(counted["stamp_s"].diff()[counted["position"] > 0])
    p50, p90, p99 = np.quantile(gaps, [0.5, 0.9, 0.99])
    return SpeedResult(
        input_len=input_len,
        output_len=int(requests["n"].iloc[0]),
        concurrency=int(repeats["requests"].iloc[0]),
        repeats=len(repeats),
        warmups=int(tokens.loc[tokens["warmup"], "repeat"].nunique()),
        ttft_s=estimate(_floats(repeats["ttft"])),
        tpot_s=estimate(_floats(repeats["tpot"])),
        itl_p50_s=float(p50),
        itl_p90_s=float(p90),
        itl_p99_s=float(p99),
        decode_tokens_per_s=estimate(_floats(1 / repeats["tpot"])),
        output_tokens_per_s=estimate(_floats(repeats["n"] / (repeats["stop"] - repeats["start"]))),
        prefill_tokens_per_s=estimate(
            _floats(input_len * repeats["requests"] / (repeats["prefilled"] - repeats["start"]))
        ),
        load=load,
    )


def estimate(values: Floats) -> Estimate:
    """Mean, sample standard deviation and t-interval of repeats."""
    interval = t_interval(values)
    return Estimate(
        mean=float(np.mean(values)),
        std=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        n=len(values),
    )


def _floats(series: Any) -> Floats:
    return np.asarray(series, dtype=np.float64)


def _refuse_no_time(repeats: pd.DataFrame) -> None:
    """Rates of no time at all would be infinite, and JSON has no infinity."""
    if not ((repeats["tpot"] > 0) & (repeats["prefilled"] > repeats["start"])).all():
        raise MeasurementError(
            "In some repeat all tokens came at one time.",
            cause="the server sends its answer in one piece instead of streaming it.",
            todo="let it stream, or give a larger --output-len.",
        )
