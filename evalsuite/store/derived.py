"""Files that follow from others and can be made again: replaced, but never half written."""

import os
from pathlib import Path

from evalsuite.store.folder import storage_errors

AGAIN = "make room or choose another folder, and run the same command again."


def write_derived(path: Path, text: str) -> Path:
    """Write UTF-8 text under a temporary name, and give it its own once it is whole.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path, AGAIN):
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path
