"""One folder a run: atomic, never overwritten, resumable while unfinished.

::

    RESULTS/<model>/<kind>-<UTC time>-<spec hash>.partial/   while running, or after it broke off
        identity.json    the spec, and the hashes and versions that the samples depend on
        windows.jsonl    a line a window, appended as they come
        hidden.npy       final hidden states of the scored positions (bfloat16 bits), if asked for
    RESULTS/<model>/<kind>-<UTC time>-<spec hash>/           once finished
        run.json         the Record
        windows.parquet  the same lines as a table
        tensors.parquet  of a quantization: a row a weight matrix
        tokens.parquet   of a speed cell: a row a generated token, with its time
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

import pandas as pd
from pydantic import ValidationError

from evalsuite.core.errors import ResumeMismatch, StorageError, UsageError, first_line
from evalsuite.core.record import READABLE_VERSIONS, Record
from evalsuite.store.folder import PARTIAL, RunFolder, storage_errors

TOKENS = "tokens.parquet"

ResumeMode = Literal["auto", "resume", "fresh"]


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunStore:
    """A results folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def begin(
        self, kind: str, model: str, digest: str, identity: dict[str, Any], mode: ResumeMode
    ) -> RunFolder:
        """A folder to write into: the unfinished one of the same spec, or a new one.

        Args:
            digest: hash of the spec.
            identity: what the samples depend on; must be equal for a run to be continued.

        Raises:
            ResumeMismatch: the unfinished run was made under other conditions, or there is none to resume.
            StorageError: the folder cannot be written.
        """
        parent, busy = self.root / model, None
        if mode != "fresh":
            for path in sorted(parent.glob(f"{kind}-*-{digest}{PARTIAL}"), reverse=True):
                found = _read_identity(path)
                if found is None:
                    continue
                _refuse_differences(path, found, identity)
                try:
                    return RunFolder(path, found)
                except BlockingIOError:
                    busy = path  # another process is writing it
        if mode == "resume":
            if busy is not None:
                raise ResumeMismatch(
                    f"The run {busy.name} is being written by another process.",
                    todo="wait for it, or leave out --resume to start another.",
                )
            self._explain_nothing_to_resume(parent, kind, identity)
        with storage_errors(parent):
            parent.mkdir(parents=True, exist_ok=True)
            stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
            path = _new_folder(parent, f"{kind}-{stamp}", digest)
            whole = identity | {"started": utc_now()}
            (path / "identity.json").write_text(json.dumps(whole, indent=1, allow_nan=False))
        return RunFolder(path, whole)

    def _explain_nothing_to_resume(self, parent: Path, kind: str, identity: dict[str, Any]) -> None:
        for path in sorted(parent.glob(f"{kind}-*{PARTIAL}"), reverse=True):
            if found := _read_identity(path):
                _refuse_differences(path, found, identity)
        raise ResumeMismatch(
            f"There is no unfinished {kind} run of this model under {parent.parent}.",
            todo="leave out --resume to start one.",
        )

    def finished(self, kind: str, model: str = "*", digest: str = "*") -> list[Path]:
        """Folders of finished runs, of one model or spec where these are given, newest first."""
        found = self.root.glob(f"{model}/{kind}-*-{digest}/run.json")
        return sorted(
            (p.parent for p in found if p.parent.suffix != PARTIAL), key=lambda p: p.name, reverse=True
        )

    def find(self, run: str) -> Path:
        """The folder of a finished run, given as a path, an id (model/kind-time-hash) or the last part of it.

        Raises:
            UsageError: there is none, or it is unfinished.
        """
        if path := self._folder(run):
            if path.suffix == PARTIAL:
                raise UsageError(f"The run {run} is unfinished.", todo="repeat its command to resume it.")
            return path
        raise UsageError(
            f"No run is called {run!r} here.", todo=f"give the folder of a run, or its id under {self.root}."
        )

    def _folder(self, run: str) -> Path | None:
        """The folder that `run` names, finished before unfinished."""
        models = sorted(self.root.iterdir()) if self.root.is_dir() else []
        places = [Path(run), self.root / run, *(model / run for model in models)]
        for path in places:
            if path.suffix != PARTIAL and (path / "run.json").is_file():
                return path
        for path in places:
            for unfinished in (path, Path(f"{path}{PARTIAL}")):
                if unfinished.suffix == PARTIAL and unfinished.is_dir():
                    return unfinished
        return None

    def is_run(self, name: str) -> bool:
        """Whether `name` is a run folder or the id of one, finished or not, rather than a model."""
        return self._folder(name) is not None


def load_record(path: Path) -> Record:
    """The record of a finished run.

    Raises:
        StorageError: it is damaged, or of a schema version that this version does not read.
    """
    try:
        data: Any = json.loads((path / "run.json").read_text())
    except ValueError as error:
        raise StorageError(
            f"{path / 'run.json'} is not valid JSON.",
            cause="it was cut short or edited.",
            todo="run it again, or restore the file from a copy.",
        ) from error
    if not isinstance(data, dict):
        raise StorageError(f"{path / 'run.json'} is not a record.", todo="restore the file from a copy.")
    version = cast("dict[str, Any]", data).get("schema_version")
    if version not in READABLE_VERSIONS:
        raise StorageError(
            f"{path} has record schema {version}; this version reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}.",
            todo="read it with the hlwq-eval version that wrote it, or update.",
        )
    try:
        return Record.model_validate(data)
    except ValidationError as error:
        raise StorageError(
            f"{path / 'run.json'} is not a record: {error.errors()[0]['msg']} "
            f"at {'.'.join(map(str, error.errors()[0]['loc']))}.",
            todo="restore the file from a copy.",
        ) from error


@dataclass(frozen=True)
class StoredRun:
    """A finished run: its record, and the folder that holds its samples."""

    path: Path
    record: Record


def load_runs(root: Path) -> tuple[list[StoredRun], list[str]]:
    """All finished runs in a results folder, kind by kind, newest first; and why others cannot be read."""
    runs: list[StoredRun] = []
    left_out: list[str] = []
    for path in RunStore(root).finished("*"):
        try:
            runs.append(StoredRun(path, load_record(path)))
        except StorageError as error:
            left_out.append(error.what)
    return runs, left_out


def load_records(root: Path) -> tuple[list[Record], list[str]]:
    """Records of all finished runs in a results folder; and of those that cannot be read, why."""
    runs, left_out = load_runs(root)
    return [run.record for run in runs], left_out


def load_windows(path: Path) -> pd.DataFrame:
    """The samples of a finished run, a row a window in text order.

    Raises:
        StorageError: they are missing or damaged.
    """
    try:
        return pd.read_parquet(path / "windows.parquet")
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise StorageError(
            f"{path / 'windows.parquet'} cannot be read.",
            cause=first_line(error),
            todo="restore the file from a copy, or run it again.",
        ) from error


def load_tokens(path: Path) -> pd.DataFrame:
    """Every token of a finished speed cell, with its time.

    Raises:
        StorageError: they are missing or damaged.
    """
    try:
        return pd.read_parquet(path / TOKENS)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{path / TOKENS} cannot be read.", cause=first_line(error), todo="measure the cell again."
        ) from error


def _new_folder(parent: Path, stem: str, digest: str) -> Path:
    for attempt in range(1, 1000):
        name = f"{stem}-{digest}" if attempt == 1 else f"{stem}.{attempt}-{digest}"
        if (parent / name).exists():
            continue
        try:
            (parent / (name + PARTIAL)).mkdir()
        except FileExistsError:
            continue
        return parent / (name + PARTIAL)
    raise StorageError(f"No free name for a run folder under {parent}.")


def _read_identity(path: Path) -> dict[str, Any] | None:
    """None where the process died before its first write was whole."""
    try:
        return json.loads((path / "identity.json").read_text())
    except (ValueError, FileNotFoundError):
        return None


def _refuse_differences(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    different = list(_differences(found, wanted))
    if different:
        raise ResumeMismatch(
            f"The unfinished run {path.name} was made under other conditions.",
            cause="; ".join(different) + ".",
            todo="restore those conditions to resume it, or start anew with --fresh.",
        )


def _differences(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in wanted.items():
        before = found.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            inner = cast("tuple[dict[str, Any], dict[str, Any]]", (before, value))
            yield from _differences(*inner, f"{prefix}{key}.")
        elif before != value:
            yield f"{prefix}{key} was {_short(before)}, is now {_short(value)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"
