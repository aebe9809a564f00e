"""The tables inside README.md, written from the records in ``results/`` between two markers.

``python -m evalsuite.report.readme`` renews them; a test fails while they differ from the records.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from evalsuite.core.errors import StorageError
from evalsuite.core.record import PerplexityResult, Record
from evalsuite.report.choose import devices_of, newest
from evalsuite.report.claimed_speed import claimed_speed_table, one_sequence
from evalsuite.report.claims import load_claims
from evalsuite.report.perplexity import runs_table
from evalsuite.report.speed import speed_table
from evalsuite.report.speed_cell import Row, speed_order
from evalsuite.store.runs import StoredRun, load_runs

MARKED = re.compile(r"(<!-- table: (perplexity|speed|gpus|claims) of ([^>]+?) -->\n).*?(<!-- end -->)", re.S)
CARD_WINDOWS = 1155


def whole_runs(runs: Sequence[StoredRun], models: Sequence[str]) -> list[Record]:
    """Finished perplexity runs of these models over the whole text or the card's 1,155 windows."""
    return [
        record
        for record in _of(runs, "ppl", models)
        if isinstance(record.results, PerplexityResult)
        and record.results.windows >= min(CARD_WINDOWS, record.results.windows_available)
    ]


def speed_cells(runs: Sequence[StoredRun], models: Sequence[str]) -> list[Row]:
    """Finished cells of these models' sweeps."""
    cells = [Row(record) for record in _of(runs, "speed", models) if record.status == "ok"]
    return sorted(cells, key=speed_order)


def _several(record: Record) -> bool:
    """Whether more than one GPU was at work, on this cell or on others beside it."""
    return devices_of(record) > 1 or record.beside > 0


def _of(runs: Sequence[StoredRun], kind: str, models: Sequence[str]) -> list[Record]:
    """Records of this kind, model by model; the newest of those of one spec on one kind of device."""
    records = [run.record for run in newest(runs) if run.record.kind == kind]
    return [record for model in models for record in records if record.run_id.startswith(f"{model}/")]


def render(text: str, results: Path, project: Path) -> str:
    """The README with its tables renewed; it names claims files by their path in the project.

    Raises:
        StorageError: a record cannot be read.
    """
    runs, unreadable = load_runs(results)
    if unreadable:
        raise StorageError("; ".join(unreadable))

    def renewed(mark: re.Match[str]) -> str:
        models = mark[3].split(", ")
        if mark[2] == "claims":
            table = claimed_speed_table(load_claims(project / mark[3]), one_sequence(runs)).to_markdown()
        elif mark[2] == "perplexity":
            table = runs_table(whole_runs(runs, models)).to_markdown()
        else:
            several = mark[2] == "gpus"
            cells = [run for run in runs if run.record.kind == "speed" and _several(run.record) == several]
            table = speed_table(speed_cells(cells, models)).to_markdown()
        return f"{mark[1]}{table}\n{mark[4]}"

    return MARKED.sub(renewed, text)


def main() -> None:
    """Renew README.md in the current folder from ``results/``."""
    readme = Path("README.md")
    text = readme.read_text()
    if MARKED.search(text) is None:
        sys.exit("README.md has no table markers.")
    readme.write_text(render(text, Path("results"), Path()))


if __name__ == "__main__":
    main()
