"""What a checkpoint on the hub would take, from its listing: nothing is downloaded."""

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

from evalsuite.core.errors import ModelError, first_line
from evalsuite.core.value import Value
from evalsuite.data.models import hub_patterns


class HubFiles(Value):
    """Files of a checkpoint, in bytes: all of them, and those that are not in the cache."""

    total_bytes: int
    missing_bytes: int


def list_files(model: str) -> HubFiles:
    """Sizes of the files that loading this hub id would read.

    Raises:
        ModelError: the hub does not answer, or does not show this model.
    """
    try:
        files = huggingface_hub.snapshot_download(  # pyright: ignore[reportUnknownMemberType]
            model, allow_patterns=hub_patterns(weights=True), dry_run=True
        )
    except (OSError, ValueError, HTTPError) as error:
        raise ModelError(
            f"The hub does not say how large {model} is.",
            cause=first_line(error),
            todo="check the network, or give a folder with its config.json as its geometry.",
        ) from error
    return HubFiles(
        total_bytes=sum(file.file_size or 0 for file in files),
        missing_bytes=sum(file.file_size or 0 for file in files if file.will_download),
    )


def cache_folder() -> str:
    """Where downloads come to lie."""
    return constants.HF_HUB_CACHE
