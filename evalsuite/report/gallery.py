"""Where a report's pictures are drawn: a folder, each under a name of its own."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evalsuite.core.errors import StorageError
from evalsuite.store.derived import AGAIN
from evalsuite.store.folder import storage_errors


@dataclass(frozen=True)
class Picture:
    """A picture as PNG and as SVG.

    Attributes:
        name: file name without suffix.
        alt: what it shows, for who cannot see it.
        caption: how strong its conclusion is; it stands in the picture too.
    """

    name: str
    alt: str
    caption: str
    png: Path
    svg: Path


@dataclass
class Gallery:
    """Draws into a folder, or draws nothing where there is none.

    Attributes:
        warnings: pictures that could not be drawn, and why.
    """

    folder: Path | None
    warnings: list[str] = field(default_factory=list[str])
    _names: set[str] = field(default_factory=set[str])

    def draw(
        self, name: str, alt: str, caption: str, draw: Callable[[str, Path], Sequence[Path]]
    ) -> tuple[Picture, ...]:
        """The picture as a tuple of one; an empty one without a folder.

        Args:
            draw: given the caption and a path without suffix, writes and gives back the PNG and the SVG.
        """
        if self.folder is None:
            return ()
        stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        count = 1
        while (unique := stem if count == 1 else f"{stem}-{count}") in self._names:
            count += 1
        self._names.add(unique)
        with storage_errors(self.folder, AGAIN):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                png, svg = draw(caption, self.folder / unique)
            except StorageError as error:  # of the samples, which the tables do without
                self.warnings.append(f"no picture {unique}: {error.what}")
                return ()
        return (Picture(unique, alt, caption, png, svg),)
