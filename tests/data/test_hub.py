"""Sizes from the hub's listing; nothing is downloaded."""

from types import SimpleNamespace

import huggingface_hub
import pytest

from evalsuite.core.errors import ModelError
from evalsuite.data.hub import list_files


def test_what_is_in_the_cache_is_not_downloaded_again(monkeypatch):
    def snapshot_download(model, allow_patterns, dry_run):
        assert (model, dry_run, "*.safetensors" in allow_patterns) == ("owner/name", True, True)
        return [
            SimpleNamespace(file_size=10, will_download=True),
            SimpleNamespace(file_size=5, will_download=False),
            SimpleNamespace(file_size=None, will_download=True),
        ]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = list_files("owner/name")
    assert (found.total_bytes, found.missing_bytes) == (15, 10)


def test_a_hub_that_does_not_answer(monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match="does not say how large owner/name is"):
        list_files("owner/name")
