"""A trace: which experts each token chose in each layer, as one parquet file.

A row is one token that went through the model. A *step* is one forward pass: the prefill of a prompt, or one
decoded token of every request that runs at once; rows of one step have one number, and numbers rise in the
order in which the passes ran. A pass with any prompt token counts as prefill. An expert layer's *set* of a
step is the union over the step's tokens.

Columns: ``request``, ``position`` and ``step`` (uint32), ``prefill`` (bool), and ``layer_N`` for each expert
layer N, a list of the ``top_k`` chosen experts (uint8, or uint16 where the model has more than 256). What the
trace is of stands in the file's own metadata; pages carry checksums, which are verified on reading.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from evalsuite.core.errors import NotComparable, StorageError, UsageError, first_line
from evalsuite.core.geometry import Geometry
from evalsuite.core.value import Value

METADATA_KEY = b"hlwq_eval_trace"
TRACE_AGAIN = "make it again with `hlwq-eval cache trace`."
ROW_GROUP = 1 << 16

Phase = Literal["all", "prefill", "decode"]
PHASES: tuple[Phase, ...] = ("decode", "prefill", "all")


class TraceFacts(Value):
    """What a trace is of.

    Attributes:
        model, fingerprint: as in `evalsuite.core.record.ModelFacts`.
        corpus, corpus_sha256, tokenizer, tokenizer_sha256: as in `evalsuite.core.record.TextFacts`.
        prompts_sha256: of the prompts' token ids, int64 little-endian, one prompt after the other.
        geometry: sizes of the weights as the checkpoint stores them; it has experts.
        layers: numbers of the decoder layers that have experts.
        engine, computed: what ran the model, and its arithmetic; near-ties in the router depend on both.
        dummy: the weights were random, so that the routing says nothing about the model.
        input_len, output_len, concurrency: tokens of a prompt and after it, and requests at once.
    """

    format: Literal[1] = 1
    model: str
    fingerprint: str
    corpus: str
    corpus_sha256: str
    prompts_sha256: str
    tokenizer: str
    tokenizer_sha256: str
    geometry: Geometry
    layers: tuple[int, ...] = Field(min_length=1)
    engine: str
    computed: str
    dummy: bool = False
    input_len: int
    output_len: int
    concurrency: int


@dataclass(frozen=True)
class Trace:
    """The rows of a trace in the order in which the model saw them.

    Attributes:
        request, position, step: uint32 [tokens]; `step` never falls.
        prefill: bool [tokens], alike within a step.
        chosen: uint8 or uint16 [tokens, layers, top_k].
    """

    facts: TraceFacts
    request: NDArray[np.uint32] = field(repr=False)
    position: NDArray[np.uint32] = field(repr=False)
    step: NDArray[np.uint32] = field(repr=False)
    prefill: NDArray[np.bool_] = field(repr=False)
    chosen: NDArray[np.uint8] | NDArray[np.uint16] = field(repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError where the arrays contradict one another or the facts."""
        tokens = len(self.step)
        shape = (tokens, len(self.facts.layers), self.facts.geometry.top_k)
        if tokens == 0:
            raise ValueError("it holds no tokens")
        if self.chosen.shape != shape or {len(self.request), len(self.position), len(self.prefill)} != {
            tokens
        }:
            raise ValueError(
                f"its columns are not all of {tokens} tokens, {shape[1]} layers and top-{shape[2]}"
            )
        if int(self.chosen.max()) >= self.facts.geometry.experts:
            raise ValueError(f"it names expert {int(self.chosen.max())} of {self.facts.geometry.experts}")
        same = self.step[1:] == self.step[:-1]
        if np.any(self.step[1:] < self.step[:-1]) or np.any(same & (self.prefill[1:] != self.prefill[:-1])):
            raise ValueError("its steps are out of order, or both prefill and decode")

    def starts(self) -> NDArray[np.int64]:
        """Row of the first token of each step, and the number of rows: int64 [steps + 1]."""
        changes = np.flatnonzero(np.diff(self.step)) + 1
        return np.concatenate([[0], changes, [len(self.step)]]).astype(np.int64)

    def step_is_prefill(self) -> NDArray[np.bool_]:
        """bool [steps]."""
        return self.prefill[self.starts()[:-1]]

    def tokens(self, phase: Phase) -> int:
        prefill = int(self.prefill.sum())
        return {"all": len(self.prefill), "prefill": prefill, "decode": len(self.prefill) - prefill}[phase]

    def sets(self) -> Iterator[list[list[int]]]:
        """For each layer, the distinct experts of each step in ascending order."""
        starts = self.starts()
        for layer in range(len(self.facts.layers)):
            column = self.chosen[:, layer]
            yield [np.unique(column[begin:end]).tolist() for begin, end in pairwise(starts)]

    def require_model(self, name: str, fingerprint: str) -> None:
        """Raises NotComparable, naming both, unless the trace is of these weights."""
        if self.facts.fingerprint != fingerprint:
            raise NotComparable(
                f"The trace is of {self.facts.model} ({self.facts.fingerprint[:12]}), not of {name} "
                f"({fingerprint[:12]}).",
                cause="other weights choose other experts.",
                todo=f"trace {name} itself with `hlwq-eval cache trace`.",
            )

    def save(self, path: Path) -> None:
        """Write to a temporary name beside `path`, and give it its name once it is whole.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        width = pa.uint8() if self.facts.geometry.experts <= 256 else pa.uint16()
        columns: dict[str, Any] = {
            "request": pa.array(self.request, pa.uint32()),
            "position": pa.array(self.position, pa.uint32()),
            "step": pa.array(self.step, pa.uint32()),
            "prefill": pa.array(self.prefill),
        }
        for index, layer in enumerate(self.facts.layers):
            flat = pa.array(np.ascontiguousarray(self.chosen[:, index]).reshape(-1), width)
            columns[f"layer_{layer}"] = pa.FixedSizeListArray.from_arrays(flat, self.facts.geometry.top_k)
        metadata = {METADATA_KEY: self.facts.model_dump_json().encode()}
        table = pa.table(columns).replace_schema_metadata(metadata)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            pq.write_table(
                table, temporary, compression="zstd", row_group_size=ROW_GROUP, write_page_checksum=True
            )
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def load_trace(path: Path) -> Trace:
    """Read a trace and check all of it.

    Raises:
        UsageError: there is no such file, or it is no trace.
        StorageError: it is a trace, and damaged.
    """
    if not path.is_file():
        raise UsageError(
            f"There is no trace {path}.",
            todo="make one: hlwq-eval cache trace MODEL OUT, and give its trace.parquet.",
        )
    try:
        metadata = (pq.read_schema(path).metadata or {}).get(METADATA_KEY)
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(path, first_line(error)) from error
    if metadata is None:
        raise UsageError(
            f"{path} is a parquet file, but no expert trace.", todo="give a file of `hlwq-eval cache trace`."
        )
    try:
        facts = TraceFacts.model_validate(json.loads(metadata))
        table = pq.read_table(path, page_checksum_verification=True)
        layers = [table[f"layer_{layer}"].combine_chunks() for layer in facts.layers]
        chosen = [column.flatten().to_numpy().reshape(-1, facts.geometry.top_k) for column in layers]
        plain = {name: table[name].to_numpy() for name in ("request", "position", "step", "prefill")}
        return Trace(facts, **plain, chosen=np.stack(chosen, axis=1))
    except (pa.ArrowInvalid, OSError, KeyError, ValidationError, ValueError) as error:
        raise _unreadable(path, first_line(error)) from error


def _unreadable(path: Path, cause: str) -> StorageError:
    return StorageError(f"The trace {path} is damaged.", cause=cause, todo=TRACE_AGAIN)
