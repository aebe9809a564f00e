"""Run folders: appended to, torn, resumed, refused, finished, found."""

import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from evalsuite.core.errors import EvalError, ResumeMismatch, StorageError, UsageError
from evalsuite.core.record import Record
from evalsuite.store.folder import PARTIAL, RunFolder, storage_errors
from evalsuite.store.runs import RunStore, load_record, load_windows

GOLDEN = Path(__file__).parents[1] / "golden" / "record.json"
DIGEST = "0123456789ab"
WIDTH = 6
SCORED = 5
BATCHES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9,))
IDENTITY: dict[str, Any] = {
    "spec": {
        "kind": "ppl", "model": "demo", "engine": "auto", "corpus": "builtin",
        "protocol": {"name": "card-1155", "join": "blank-line", "context": 1536, "stride": 256},
        "limit": None, "tokenizer": None, "dtype": "auto", "device": "auto",
    },
    "weights": "ab" * 32, "text": "cd" * 32, "tokenizer": "ef" * 32,
    "scored_tokens": 10 * SCORED, "dtype": "torch.bfloat16", "device": "cpu", "torch": "2.13.0",
}  # fmt: skip


OPEN: list[RunFolder] = []


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    yield RunStore(tmp_path / "results")
    while OPEN:  # as the end of a process would
        with suppress(OSError):
            OPEN.pop().close()


def row(index: int) -> dict[str, Any]:
    """In the order and with the kinds of value that scoring writes."""
    return {
        "window": index, "start": 256 * index, "first_scored": 256 * index + 8, "stop": 256 * index + 13,
        "scored": SCORED, "bytes": 21 + index, "words": 4, "nats": math.exp(index) / 3, "batch": 3,
    }  # fmt: skip


def states(index: int) -> np.ndarray:
    return np.arange(SCORED * WIDTH, dtype=np.uint16).reshape(SCORED, WIDTH) + np.uint16(1000 * index + 1)


def begin(store: RunStore, mode: Any = "auto", **changes: Any) -> RunFolder:
    folder = store.begin("ppl", "demo", DIGEST, IDENTITY | changes, mode)
    OPEN.append(folder)
    return folder


def append(folder: RunFolder, batch: tuple[int, ...], hidden: bool = True) -> None:
    folder.append([row(i) for i in batch], [states(i) for i in batch] if hidden else ())


def go_on(folder: RunFolder, hidden: bool = True) -> None:
    """Append the batches that are missing, as a resumed run does."""
    for batch in BATCHES:
        if batch[-1] >= len(folder.rows):
            assert batch[0] == len(folder.rows), "a resumed run starts at a batch of the first"
            append(folder, batch, hidden)


def a_record(folder: RunFolder, **changes: Any) -> Record:
    data = json.loads(GOLDEN.read_text()) | {"run_id": folder.run_id, "started": folder.started}
    return Record.model_validate(data | changes)


def samples(folder: RunFolder) -> tuple[bytes, bytes]:
    return (folder.path / "windows.jsonl").read_bytes(), (folder.path / "hidden.npy").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing disturbed, and the sizes after each batch."""
    folder = begin(RunStore(tmp_path_factory.mktemp("results")))
    sizes = []
    for batch in BATCHES:
        append(folder, batch)
        sizes.append([len(part) for part in samples(folder)])
    lines, hidden = samples(folder)
    final = folder.finish(a_record(folder))
    return {
        "lines": lines,
        "hidden": hidden,
        "parquet": (final / "windows.parquet").read_bytes(),
        "sizes": sizes,
    }  # type: ignore[dict-item]


class TestOneRun:
    def test_from_begin_to_load(self, store: RunStore):
        folder = begin(store)
        assert folder.path.parent == store.root / "demo"
        assert folder.path.name.startswith("ppl-")
        assert folder.path.name.endswith(f"-{DIGEST}{PARTIAL}")
        go_on(folder)
        record = a_record(folder)
        final = folder.finish(record)
        assert final == folder.path.with_name(folder.path.name.removesuffix(PARTIAL))
        assert not folder.path.exists()
        assert folder.run_id == f"demo/{final.name}"
        assert sorted(p.name for p in final.iterdir()) == ["hidden.npy", "run.json", "windows.parquet"]
        assert load_record(final) == record
        frame = load_windows(final)
        wanted = pd.DataFrame([row(i) for i in range(10)])
        pd.testing.assert_frame_equal(frame[list(wanted)], wanted)
        assert set(frame) == set(wanted)

    def test_the_record_is_json_without_nan(self, store: RunStore):
        def refuse(constant: str) -> float:
            raise AssertionError(constant)

        folder = begin(store)
        final = folder.finish(a_record(folder))
        data = json.loads((final / "run.json").read_text(), parse_constant=refuse)
        assert data["schema_version"] == 1
        assert not (final / "windows.parquet").exists()  # nothing was scored

    def test_nan_is_refused_and_the_samples_stay(self, store: RunStore):
        folder = begin(store)
        append(folder, (0,))
        record = a_record(folder)
        bad = record.model_copy(update={"results": record.results.model_copy(update={"nats": math.nan})})  # type: ignore[union-attr]
        with pytest.raises((ValueError, EvalError)):
            folder.finish(bad)
        folder.close()
        assert len(begin(store).rows) == 1

    def test_lines_are_whole_on_return(self, store: RunStore):
        folder = begin(store)
        for number, batch in enumerate(BATCHES, 1):
            append(folder, batch, hidden=False)
            lines = [json.loads(x) for x in (folder.path / "windows.jsonl").read_text().splitlines()]
            assert [x["window"] for x in lines] == list(range(sum(map(len, BATCHES[:number]))))
            ends = [x["window"] for x in lines if x["ends_batch"]]
            assert ends == [b[-1] for b in BATCHES[:number]]

    def test_lines_are_synced_to_the_disk(self, store: RunStore, monkeypatch: pytest.MonkeyPatch):
        synced: list[str] = []
        real = os.fsync

        def fsync(fd: int) -> None:
            synced.append(Path(f"/proc/self/fd/{fd}").resolve().name if Path("/proc").exists() else "?")
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        append(begin(store), BATCHES[0])
        assert "windows.jsonl" in synced
        # the lines promise that the states are there: these go first
        assert synced.index("hidden.npy") < synced.index("windows.jsonl")

    def test_hidden_states_read_as_a_numpy_array(self, store: RunStore):
        folder = begin(store)
        go_on(folder)
        final = folder.finish(a_record(folder))
        array = np.load(final / "hidden.npy", mmap_mode="r", allow_pickle=False)
        assert (array.shape, array.dtype) == ((50, WIDTH), np.uint16)
        assert np.array_equal(array, np.concatenate([states(i) for i in range(10)]))


class TestNeverOverwritten:
    def test_runs_of_one_second_get_folders_of_their_own(self, store: RunStore):
        folders = [begin(store, "fresh") for _ in range(4)]
        finals = [folder.finish(a_record(folder)) for folder in folders]
        assert len(set(finals)) == 4
        assert len({load_record(final).run_id for final in finals}) == 4

    def test_a_finished_run_is_not_taken_up_again(self, store: RunStore):
        folder = begin(store)
        append(folder, (0,))
        final = folder.finish(a_record(folder))
        before = {p.name: p.read_bytes() for p in final.iterdir()}
        again = begin(store)
        assert len(again.rows) == 0
        append(again, (0,))
        assert again.finish(a_record(again)) != final
        assert {p.name: p.read_bytes() for p in final.iterdir()} == before

    def test_fresh_leaves_the_unfinished_one_alone(self, store: RunStore):
        first = begin(store)
        append(first, BATCHES[0])
        first.close()
        other = begin(store, "fresh")
        assert other.path != first.path
        assert len(other.rows) == 0
        assert (first.path / "windows.jsonl").read_text().count("\n") == 3


class TestResume:
    @pytest.mark.parametrize("batches", range(len(BATCHES) + 1))
    def test_after_any_batch_the_end_is_the_same_byte_for_byte(
        self, store: RunStore, uninterrupted: dict[str, bytes], batches: int
    ):
        first = begin(store)
        for batch in BATCHES[:batches]:
            append(first, batch)
        first.close()
        second = begin(store, "resume")
        assert second.path == first.path
        assert second.started == first.started
        assert [r["window"] for r in second.rows] == list(range(sum(map(len, BATCHES[:batches]))))
        go_on(second)
        assert samples(second) == (uninterrupted["lines"], uninterrupted["hidden"])

    @pytest.mark.parametrize("batches", [1, 3])
    def test_the_table_of_a_resumed_run_is_the_same_byte_for_byte(
        self, store: RunStore, uninterrupted: dict[str, bytes], batches: int
    ):
        first = begin(store)
        for batch in BATCHES[:batches]:
            append(first, batch)
        first.close()
        second = begin(store)
        go_on(second)
        final = second.finish(a_record(second))
        wanted = pd.DataFrame([row(i) for i in range(10)])
        pd.testing.assert_frame_equal(load_windows(final)[list(wanted)], wanted)
        assert (final / "windows.parquet").read_bytes() == uninterrupted["parquet"]

    def test_torn_at_any_byte_the_end_is_the_same(self, store: RunStore, uninterrupted: dict[str, Any]):
        """Killed while writing: hidden states first, then lines, each cut anywhere."""
        lines, hidden, sizes = (uninterrupted[key] for key in ("lines", "hidden", "sizes"))
        for done in (0, 1, 2):
            kept_lines, kept_hidden = sizes[done]
            next_lines, next_hidden = sizes[done + 1]
            cuts = [(kept_lines, h) for h in (kept_hidden, kept_hidden + 1, next_hidden - 1, next_hidden)]
            cuts += [(n, next_hidden) for n in range(kept_lines, next_lines + 1, 29)]
            for line_cut, hidden_cut in cuts:
                folder = begin(store, "fresh")
                folder.close()
                (folder.path / "windows.jsonl").write_bytes(lines[:line_cut])
                (folder.path / "hidden.npy").write_bytes(hidden[:hidden_cut])
                resumed = begin(store, "resume")
                assert resumed.path == folder.path
                whole = done + 1 if line_cut < next_lines else done + 2
                assert len(resumed.rows) == sum(map(len, BATCHES[:whole]))
                go_on(resumed)
                assert samples(resumed) == (lines, hidden), (line_cut, hidden_cut)
                resumed.finish(a_record(resumed))

    def test_a_batch_without_its_end_is_scored_again(self, store: RunStore, uninterrupted: dict[str, bytes]):
        folder = begin(store)
        folder.close()
        whole = uninterrupted["lines"].splitlines(keepends=True)
        (folder.path / "windows.jsonl").write_bytes(b"".join(whole[:5]))
        resumed = begin(store)
        assert [r["window"] for r in resumed.rows] == [0, 1, 2]
        assert (resumed.path / "windows.jsonl").read_bytes() == b"".join(whole[:3])

    @pytest.mark.parametrize("tail", [b"{", b'{"window": 3', b"\x00" * 40, b'{"window":3}'])
    def test_a_torn_last_line_is_dropped(self, store: RunStore, uninterrupted: dict[str, bytes], tail: bytes):
        folder = begin(store)
        folder.close()
        kept = b"".join(uninterrupted["lines"].splitlines(keepends=True)[:3])
        (folder.path / "windows.jsonl").write_bytes(kept + tail)
        assert len(begin(store).rows) == 3
        assert (folder.path / "windows.jsonl").read_bytes() == kept

    @pytest.mark.parametrize(
        "damage", [b"\x00\x00", b"{]", b"17", b"[]", b'{"nats": 1.0}', b'"window"'], ids=str
    )
    def test_a_damaged_line_in_the_middle_is_refused(
        self, store: RunStore, uninterrupted: dict[str, bytes], damage: bytes
    ):
        folder = begin(store)
        folder.close()
        whole = uninterrupted["lines"].splitlines(keepends=True)
        (folder.path / "windows.jsonl").write_bytes(whole[0] + damage + b"\n" + b"".join(whole[2:6]))
        with pytest.raises(StorageError) as caught:
            begin(store)
        assert "Line 2" in caught.value.what
        assert "--fresh" in caught.value.todo

    def test_a_missing_line_is_refused(self, store: RunStore, uninterrupted: dict[str, bytes]):
        folder = begin(store)
        folder.close()
        whole = uninterrupted["lines"].splitlines(keepends=True)
        (folder.path / "windows.jsonl").write_bytes(b"".join(whole[:2] + whole[3:]))
        with pytest.raises(StorageError, match="skips from window 1 to 3"):
            begin(store)

    @pytest.mark.parametrize("kept", [0, 64, 200])
    def test_hidden_states_that_are_shorter_than_the_lines_say_are_refused(self, store: RunStore, kept: int):
        """After a power cut, or by hand: a hole of zeros would enter the divergence unseen."""
        folder = begin(store)
        append(folder, BATCHES[0])
        append(folder, BATCHES[1])
        folder.close()
        os.truncate(folder.path / "hidden.npy", kept)
        with pytest.raises(StorageError, match=r"hidden\.npy"):
            append(begin(store), BATCHES[2])

    def test_hidden_states_that_are_gone_are_refused(self, store: RunStore):
        folder = begin(store)
        append(folder, BATCHES[0])
        folder.close()
        (folder.path / "hidden.npy").unlink()
        with pytest.raises(StorageError, match=r"hidden\.npy"):
            append(begin(store), BATCHES[1])

    @pytest.mark.parametrize("content", ["", "{", '{"spec": '])
    def test_a_folder_without_a_whole_identity_is_left_alone(self, store: RunStore, content: str):
        folder = begin(store)
        folder.close()
        (folder.path / "identity.json").write_text(content)
        other = begin(store)
        assert other.path != folder.path

    def test_the_newest_is_resumed(self, store: RunStore):
        parent = store.root / "demo"
        for day in (1, 3, 2):
            place = parent / f"ppl-2026010{day}T000000Z-{DIGEST}{PARTIAL}"
            place.mkdir(parents=True)
            (place / "identity.json").write_text(json.dumps(IDENTITY | {"started": f"day {day}"}))
        assert begin(store).started == "day 3"


class TestRefusal:
    @pytest.mark.parametrize(
        ("key", "value", "named"),
        [
            ("weights", "00" * 32, "weights"),
            ("text", "00" * 32, "text"),
            ("tokenizer", "00" * 32, "tokenizer"),
            ("dtype", "torch.float32", "torch.float32"),
            ("device", "cuda", "cuda"),
            ("torch", "2.14.0", "2.14.0"),
        ],
    )
    def test_other_conditions_are_named(self, store: RunStore, key: str, value: str, named: str):
        begin(store).close()
        with pytest.raises(ResumeMismatch) as caught:
            begin(store, **{key: value})
        assert f"{key} was {IDENTITY[key]}" in caught.value.cause
        assert named in caught.value.cause
        assert caught.value.cause.count(" was ") == 1  # nothing else
        assert "--fresh" in caught.value.todo
        assert caught.value.exit_code == 2

    def test_the_refused_run_is_left_as_it_was(self, store: RunStore):
        folder = begin(store)
        append(folder, BATCHES[0])
        folder.close()
        before = {p.name: p.read_bytes() for p in folder.path.iterdir()}
        with pytest.raises(ResumeMismatch):
            begin(store, dtype="torch.float32")
        assert {p.name: p.read_bytes() for p in folder.path.iterdir()} == before
        assert len(list(folder.path.parent.iterdir())) == 1

    @pytest.mark.parametrize(
        ("change", "was", "now"),
        [
            ({"dtype": "float32"}, "auto", "float32"),
            ({"limit": 8}, "null", "8"),
            ({"corpus": "wikitext-2"}, "builtin", "wikitext-2"),
            ({"protocol": IDENTITY["spec"]["protocol"] | {"context": 2048}}, "1536", "2048"),
        ],
        ids=["dtype", "limit", "corpus", "protocol.context"],
    )
    def test_insisting_on_a_resume_under_another_spec_names_the_field(
        self, store: RunStore, change: dict[str, Any], was: str, now: str
    ):
        begin(store).close()
        spec = IDENTITY["spec"] | change
        with pytest.raises(ResumeMismatch) as caught:
            store.begin("ppl", "demo", "ffffffffffff", IDENTITY | {"spec": spec}, "resume")
        field = next(iter(change))
        assert field in caught.value.cause
        assert was in caught.value.cause
        assert now in caught.value.cause

    def test_insisting_with_nothing_there(self, store: RunStore):
        with pytest.raises(ResumeMismatch) as caught:
            begin(store, "resume")
        assert "no unfinished ppl run" in caught.value.what
        assert "leave out --resume" in caught.value.todo
        assert not store.root.exists()

    def test_insisting_when_it_is_finished(self, store: RunStore):
        folder = begin(store)
        folder.finish(a_record(folder))
        with pytest.raises(ResumeMismatch, match="no unfinished ppl run"):
            begin(store, "resume")

    def test_another_spec_without_insisting_starts_anew(self, store: RunStore):
        first = begin(store)
        first.close()
        other = store.begin("ppl", "demo", "ffffffffffff", IDENTITY | {"spec": {}}, "auto")
        other.close()
        assert other.path != first.path


HOLD = """
import json, sys
from pathlib import Path
from evalsuite.store.runs import RunStore
folder = RunStore(Path(sys.argv[1])).begin("ppl", "demo", sys.argv[2], json.loads(sys.argv[3]), "auto")
print(folder.path, flush=True)
for line in sys.stdin:
    rows = json.loads(line)
    folder.append(rows)
    print(len(folder.rows), flush=True)
"""


class Other:
    """Another process that writes a run."""

    def __init__(self, root: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(root), DIGEST, json.dumps(IDENTITY)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.path = Path(self.say().strip())

    def say(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def append(self, batch: tuple[int, ...], wait: bool = True) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([row(i) for i in batch]) + "\n")
        self.process.stdin.flush()
        if wait:
            assert int(self.say()) == batch[-1] + 1

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=20)


class TestTwoProcesses:
    def test_a_running_run_is_not_touched_and_a_killed_one_is_resumed(
        self, store: RunStore, uninterrupted: dict[str, bytes]
    ):
        other = Other(store.root)
        try:
            other.append(BATCHES[0])
            mine = begin(store)
            assert mine.path != other.path
            assert len(mine.rows) == 0
            other.append(BATCHES[1])
            with pytest.raises(ResumeMismatch) as caught:
                begin(store, "resume")  # both are being written
            assert "no unfinished" not in caught.value.what
            other.append(BATCHES[2], wait=False)  # killed anywhere in it
        finally:
            other.kill()
        mine.finish(a_record(mine))
        resumed = begin(store, "resume")
        assert resumed.path == other.path
        assert len(resumed.rows) in (6, 9)
        go_on(resumed, hidden=False)
        assert (resumed.path / "windows.jsonl").read_bytes() == uninterrupted["lines"]


class TestStorageTrouble:
    def test_a_full_disk_keeps_the_lines_before(self, store: RunStore, monkeypatch: pytest.MonkeyPatch):
        folder = begin(store)
        append(folder, BATCHES[0], hidden=False)

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StorageError) as caught:
                append(folder, BATCHES[1], hidden=False)
        assert "the disk is full" in caught.value.cause
        assert "make room" in caught.value.todo
        assert str(folder.path) in caught.value.what
        assert caught.value.exit_code == 1
        folder.close()
        assert len(begin(store).rows) in (3, 6)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
    @pytest.mark.parametrize("file", ["windows.jsonl", "hidden.npy"])
    def test_a_file_system_that_takes_nothing_more(self, store: RunStore, file: str):
        """The kernel's own ENOSPC. Closing must not raise it once more in place of the message."""
        folder = begin(store)
        (folder.path / file).symlink_to("/dev/full")
        with pytest.raises(StorageError, match="Nothing more can be written") as caught:
            append(folder, BATCHES[0])
        assert caught.value.cause == "the disk is full"
        folder.close()
        (folder.path / file).unlink()
        assert len(begin(store).rows) == 0

    def test_a_damaged_folder_is_let_go(self, store: RunStore):
        """The lock goes with the error, not with the garbage collector."""
        folder = begin(store)
        folder.close()
        (folder.path / "windows.jsonl").write_text("damaged\n")
        with pytest.raises(StorageError) as first:
            begin(store)
        with pytest.raises(StorageError) as second:  # not "another process is writing it", hence a new folder
            begin(store)
        assert first.value.what == second.value.what

    @pytest.mark.parametrize(
        ("number", "cause"),
        [
            (errno.ENOSPC, "the disk is full"),
            (errno.EDQUOT, "quota"),
            (errno.EROFS, "read-only"),
            (errno.EACCES, "permission denied"),
        ],
    )
    def test_what_the_system_says_in_words(self, tmp_path: Path, number: int, cause: str):
        with pytest.raises(StorageError) as caught, storage_errors(tmp_path):
            raise OSError(number, os.strerror(number))
        assert cause in caught.value.cause
        assert isinstance(caught.value.__cause__, OSError)

    def test_other_errors_pass_through(self, tmp_path: Path):
        with pytest.raises(KeyError), storage_errors(tmp_path):
            raise KeyError("x")

    def test_a_folder_that_may_not_be_written(self, store: RunStore, monkeypatch: pytest.MonkeyPatch):
        def refuse(self: Path, *_: Any, **__: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(StorageError, match="Nothing more can be written") as caught:
            begin(store)
        assert caught.value.cause == "permission denied"

    def test_an_unfinished_run_that_may_not_be_written(
        self, store: RunStore, monkeypatch: pytest.MonkeyPatch
    ):
        """Somebody else's: its lock cannot be opened."""
        begin(store).close()
        real = Path.open

        def refuse(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            if mode != "r" and self.name == "lock":
                raise PermissionError(errno.EACCES, "Permission denied", str(self))
            return real(self, mode, *args, **options)

        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(StorageError, match="Nothing more can be written"):
            begin(store)

    def test_a_file_where_the_folder_should_be(self, tmp_path: Path):
        (tmp_path / "results").write_text("a file")
        with pytest.raises(EvalError) as caught:
            begin(RunStore(tmp_path / "results"))
        assert str(tmp_path / "results") in caught.value.what


class PowerCut(BaseException):
    """The process is gone; nothing of it runs any more."""


class TestKilledWhileFinishing:
    """finish() changes names in several steps. Whichever was the last, no window may be lost."""

    def finish_until(self, folder: RunFolder, step: int, monkeypatch: pytest.MonkeyPatch) -> bool:
        """Whether it came to the end; else the process died before its `step`-th change of a name."""
        steps = iter(range(1000))

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                if next(steps) == step:
                    raise PowerCut
                return real(*args, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "unlink", "remove", "rmdir"):
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                folder.finish(a_record(folder))
            except PowerCut:
                return False
        return True

    def test_nothing_is_lost_at_any_step(self, store: RunStore, monkeypatch: pytest.MonkeyPatch):
        lost: list[str] = []
        for step in range(1000):
            root = RunStore(store.root / str(step))
            folder = begin(root)
            go_on(folder)
            ended = self.finish_until(folder, step, monkeypatch)
            folder.close()
            final = folder.path.with_name(folder.path.name.removesuffix(PARTIAL))
            if final.is_dir():
                assert load_record(final).run_id == folder.run_id
                assert len(load_windows(final)) == 10
                assert root.find(final.name) == final
            else:
                left = sorted(p.name for p in folder.path.iterdir())
                resumed = begin(root)
                if resumed.path != folder.path or len(resumed.rows) != 10:
                    lost.append(f"step {step}, with {', '.join(left)} left")
                resumed.close()
            if ended:
                break
        assert step >= 2, "finish changes no names: this test no longer sees its steps"
        assert not lost

    def test_a_failed_rename_leaves_the_folder_whole(self, store: RunStore, monkeypatch: pytest.MonkeyPatch):
        """As the docstring of finish() promises for a full disk."""
        folder = begin(store)
        go_on(folder)
        real = os.rename

        def full(source: Any, target: Any, **options: Any) -> None:
            if Path(source).is_dir():
                raise OSError(errno.ENOSPC, "No space left on device")
            real(source, target, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", full)
            with pytest.raises(StorageError):
                folder.finish(a_record(folder))
        folder.close()
        resumed = begin(store)
        assert resumed.path == folder.path
        assert len(resumed.rows) == 10
        assert len(load_windows(resumed.finish(a_record(resumed)))) == 10

    def test_a_full_disk_at_the_table_leaves_the_folder_whole(
        self, store: RunStore, monkeypatch: pytest.MonkeyPatch
    ):
        folder = begin(store)
        go_on(folder)

        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(pd.DataFrame, "to_parquet", full)
            with pytest.raises(StorageError):
                folder.finish(a_record(folder))
        folder.close()
        resumed = begin(store)
        assert len(resumed.rows) == 10

    def test_another_process_cannot_take_the_folder_before_it_has_its_name(
        self, store: RunStore, monkeypatch: pytest.MonkeyPatch
    ):
        """The lock is held until the rename is done; a rival looks before every change of a name."""
        folder = begin(store)
        go_on(folder)
        taken: list[Path] = []

        def watched(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                rival = begin(store)
                taken.append(rival.path)
                rival.close()
                return real(*args, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "unlink", "remove"):
                patch.setattr(os, name, watched(getattr(os, name)))
            folder.finish(a_record(folder))
        assert taken
        assert folder.path not in taken


class TestFind:
    @pytest.fixture
    def final(self, store: RunStore) -> Path:
        folder = begin(store)
        append(folder, (0,))
        return folder.finish(a_record(folder))

    def test_by_path_id_and_last_part(self, store: RunStore, final: Path, monkeypatch: pytest.MonkeyPatch):
        assert store.find(str(final)) == final
        assert store.find(str(final) + "/") == final
        assert store.find(f"demo/{final.name}") == final
        assert store.find(final.name) == final
        monkeypatch.chdir(final)
        assert store.find(".").resolve() == final

    def test_what_is_none(self, store: RunStore, final: Path):
        with pytest.raises(UsageError, match="No run is called 'ppl-2020'") as caught:
            store.find("ppl-2020")
        assert str(store.root) in caught.value.todo

    def test_an_unfinished_one(self, store: RunStore):
        folder = begin(store)
        folder.write_record(a_record(folder, status="interrupted"))
        for name in (
            str(folder.path),
            folder.run_id,
            folder.path.name,
            folder.path.name.removesuffix(PARTIAL),
        ):
            with pytest.raises(UsageError, match="unfinished") as caught:
                store.find(name)
            assert "resume" in caught.value.todo

    def test_whether_a_name_is_a_run(self, store: RunStore, final: Path):
        unfinished = begin(store)
        assert store.is_run(final.name)
        assert store.is_run(unfinished.run_id)
        for model in ("demo", "smollm2", "Qwen/Qwen3.5-0.8B"):
            assert not store.is_run(model)

    @pytest.mark.parametrize(
        "model", ["my-unfinished-model", "someone/unfinished", "../missing", "no.partial"]
    )
    def test_whether_an_odd_name_is_a_run(self, store: RunStore, model: str):
        assert not store.is_run(model)

    @pytest.mark.parametrize("name", [".", "/", ""])
    def test_a_folder_that_is_no_run(
        self, store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ):
        """``--baseline .`` names the model in the working directory."""
        monkeypatch.chdir(tmp_path)
        assert not store.is_run(name)
        with pytest.raises(UsageError):
            store.find(name)


class TestLoad:
    @pytest.fixture
    def final(self, store: RunStore) -> Path:
        folder = begin(store)
        append(folder, (0,))
        return folder.finish(a_record(folder))

    @pytest.mark.parametrize("version", [0, 3, 99, None, "1"])
    def test_another_schema_is_refused_by_number(self, final: Path, version: Any):
        data = json.loads((final / "run.json").read_text()) | {"schema_version": version}
        (final / "run.json").write_text(json.dumps(data))
        with pytest.raises(StorageError) as caught:
            load_record(final)
        assert f"record schema {version}; this version reads 1 and 2" in caught.value.what
        assert "update" in caught.value.todo

    @pytest.mark.parametrize("damage", [b"", b'{"schema_version": 1,', b"\xff\xfe", b"\x00\x00\x00"], ids=str)
    def test_a_file_cut_short_is_named(self, final: Path, damage: bytes):
        (final / "run.json").write_bytes(damage)
        with pytest.raises(StorageError, match=r"run\.json is not valid JSON") as caught:
            load_record(final)
        assert "cut short" in caught.value.cause

    @pytest.mark.parametrize("text", ["[]", "null", "17", '"run"'])
    def test_json_that_is_no_object(self, final: Path, text: str):
        (final / "run.json").write_text(text)
        with pytest.raises(StorageError, match=r"run\.json"):
            load_record(final)

    def test_a_missing_field_is_named_with_its_place(self, final: Path):
        data = json.loads((final / "run.json").read_text())
        del data["machine"]["cpu_cores"]
        (final / "run.json").write_text(json.dumps(data))
        with pytest.raises(StorageError, match=r"Field required at machine\.cpu_cores") as caught:
            load_record(final)
        assert "copy" in caught.value.todo

    def test_a_field_too_many_is_named(self, final: Path):
        data = json.loads((final / "run.json").read_text()) | {"comment": "mine"}
        (final / "run.json").write_text(json.dumps(data))
        with pytest.raises(StorageError, match="at comment"):
            load_record(final)

    @pytest.mark.parametrize(
        "damage", [b"", b"PAR1 and nothing more", None], ids=["empty", "damaged", "missing"]
    )
    def test_damaged_samples_are_an_error_with_their_name(self, final: Path, damage: bytes | None):
        path = final / "windows.parquet"
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(StorageError, match=r"windows\.parquet"):
            load_windows(final)
