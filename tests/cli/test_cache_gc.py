"""`hlwq-eval cache gc` removes what is of no use, and nothing that is in use."""

import json
import shutil
from dataclasses import replace

import pytest
from experts.stores import IDENTITY, MadeUp, disk
from typer.testing import CliRunner

from evalsuite.cli import cache_gc  # noqa: F401 (registers itself)
from evalsuite.cli.app import app
from evalsuite.data.models import find_checkpoint


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HLWQ_EVAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(tmp_path, demo_folder):
    shutil.copytree(demo_folder, tmp_path / "model")
    return tmp_path / "model"


def file_of(checkpoint, folder, seed=0):
    identity = replace(
        IDENTITY,
        fingerprint=find_checkpoint(str(checkpoint)).fingerprint(),
        checkpoint=checkpoint.name,
        source=str(checkpoint),
    )
    return disk(MadeUp(seed=seed), folder, identity)


def gc(*options):
    result = CliRunner().invoke(app, ["cache", "gc", "--json", *options])
    assert result.exit_code == 0, result.output
    return {
        row["path"].rpartition("/")[2]: (row["why"], row["fate"])
        for row in json.loads(result.stdout)["files"]
    }


def test_nothing_to_do(folder):
    assert gc() == {}


def test_the_file_of_a_checkpoint_that_is_there_stays(folder, checkpoint):
    store = file_of(checkpoint, folder)
    store.close()
    assert gc() == {store.path.name: ("its checkpoint is there", "kept")}
    assert gc("--all", "--dry-run") == {store.path.name: ("asked for by --all", "would be removed")}
    assert store.path.exists()
    assert gc("--all") == {store.path.name: ("asked for by --all", "removed")}
    assert not store.path.exists()


def remove_model(checkpoint):
    shutil.rmtree(checkpoint)


def change_model(checkpoint):
    (checkpoint / "config.json").write_text((checkpoint / "config.json").read_text() + "\n")


@pytest.mark.parametrize(
    ("happens", "why"),
    [
        (remove_model, "its checkpoint is gone"),
        (change_model, "made from other weights than its checkpoint has"),
    ],
)
def test_the_file_of_a_checkpoint_that_is_gone_or_changed(folder, checkpoint, happens, why):
    store = file_of(checkpoint, folder)
    store.close()
    happens(checkpoint)
    assert gc("--dry-run") == {store.path.name: (why, "would be removed")}
    assert store.path.exists()
    assert gc() == {store.path.name: (why, "removed")}
    assert list(folder.iterdir()) == []


def test_what_is_in_use_stays(folder, checkpoint):
    store = file_of(checkpoint, folder)
    shutil.rmtree(checkpoint)
    assert gc("--all", "--dry-run") == {store.path.name: ("its checkpoint is gone", "in use, kept")}
    assert gc("--all") == {store.path.name: ("its checkpoint is gone", "in use, kept")}
    assert store.path.exists()
    store.close()
    assert gc()[store.path.name][1] == "removed"


def test_scraps_go(folder):
    folder.mkdir()
    stem = f"{'a' * 16}-{'b' * 8}-v1"
    (folder / f"{stem}.experts.partial").write_bytes(b"x" * 10)
    (folder / f"{stem}.experts").write_bytes(b"x" * 10)
    others = ["letter.txt", "somebody.experts", "somebody.experts.partial"]
    for name in others:
        (folder / name).write_text("not ours")
    assert gc() == {
        f"{stem}.experts.partial": ("half-written", "removed"),
        f"{stem}.experts": ("it is not an expert file", "removed"),
    }
    assert sorted(path.name for path in folder.iterdir()) == others
