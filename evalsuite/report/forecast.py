"""What a sweep will take, before anything loads."""

from collections.abc import Sequence

from evalsuite.core.forecast import Forecast
from evalsuite.core.units import si_bytes
from evalsuite.report.speed import rate_text
from evalsuite.report.tables import NOT_MEASURED, Cell, Column, Table


def forecast_table(rows: Sequence[tuple[str, Forecast]]) -> Table[tuple[str, Forecast]]:
    """What each cell will take; nothing was loaded."""
    cached = any(f.all_misses_tokens_per_s is not None for _, f in rows)
    columns = [
        Column[tuple[str, Forecast]]("cell", lambda r: r[0]),
        Column[tuple[str, Forecast]]("engine", lambda r: r[1].engine),
        Column[tuple[str, Forecast]]("weights", lambda r: _bytes(r[1].weights_bytes)),
        Column[tuple[str, Forecast]]("requests", lambda r: _bytes(r[1].request_bytes)),
        Column[tuple[str, Forecast]]("device", lambda r: _bytes(r[1].device_bytes)),
        Column[tuple[str, Forecast]]("fits", lambda r: _fits(r[1])),
        Column[tuple[str, Forecast]]("bound", lambda r: _rate_cell(r[1].tokens_per_s), "tok/s"),
    ]
    if cached:
        columns.append(
            Column[tuple[str, Forecast]](
                "bound, all misses", lambda r: _rate_cell(r[1].all_misses_tokens_per_s), "tok/s"
            )
        )
    absent = dict.fromkeys(f.absent for _, f in rows if f.absent)
    return Table(
        f"{len(rows)} cells, none of them run",
        columns,
        rows,
        " ".join(
            (
                "Derived from config.json and measured bandwidths, for one sequence. Requests are keys, "
                "values and states at their ends; vLLM reserves more, all of its share of the GPU.",
                *absent,
            )
        ),
    )


def _bytes(count: int | None) -> Cell:
    return NOT_MEASURED if count is None else Cell(si_bytes(count))


def _rate_cell(rate: float | None) -> Cell:
    return NOT_MEASURED if rate is None else Cell(rate_text(rate))


def _fits(row: Forecast) -> Cell:
    return NOT_MEASURED if row.fits is None else Cell("yes" if row.fits else "no")
