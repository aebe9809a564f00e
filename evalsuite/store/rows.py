"""Lines of ``windows.jsonl`` in memory: columns of numbers of eight bytes each."""

from array import array
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

Number = int | float


class Rows:
    """Rows with the same keys; a column is of whole numbers or of floats, as its first value is.

    Raises:
        ValueError: a row has other keys than the first one.
        TypeError: a value is not of its column's kind.
    """

    def __init__(self) -> None:
        self._columns: dict[str, array[int] | array[float]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> dict[str, Number]:
        return {name: column[place] for name, column in self._columns.items()}

    def __iter__(self) -> Iterator[dict[str, Number]]:
        return (self[place] for place in range(self._count))

    def extend(self, rows: Sequence[Mapping[str, Number]]) -> None:
        if not self._count and rows:
            self._columns = {
                name: array("d" if isinstance(value, float) else "q") for name, value in rows[0].items()
            }
        for row in rows:
            if row.keys() != self._columns.keys():
                raise ValueError(f"a row has {sorted(row)}, and the first one {sorted(self._columns)}")
            for name, column in self._columns.items():
                column.append(row[name])  # pyright: ignore[reportArgumentType]
        self._count += len(rows)

    def column(self, name: str) -> Sequence[Number]:
        """All values of a column; none where there are no rows."""
        return self._columns.get(name, array("q"))

    def frame(self) -> pd.DataFrame:
        """A copy as a table."""
        return pd.DataFrame({name: list(column) for name, column in self._columns.items()})
