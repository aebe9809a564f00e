"""The tables inside README.md, written from the records in ``results/`` between two markers.

``python -m evalsuite.report.readme`` renews them; a test fails while they differ from the records.
"""

import re
import sys
from pathlib import Path

from evalsuite.core.record import PerplexityResult, Record
from evalsuite.report.claimed_speed import claimed_speed_table, one_sequence
from evalsuite.report.claims import load_claims
from evalsuite.report.perplexity import runs_table
from evalsuite.report.speed import Row, speed_order, speed_table
from evalsuite.store.runs import RunStore, load_record, load_runs

MARKED = re.compile(r"(<!-- table: (perplexity|speed|claims) of ([^>]+?) -->\n).*?(<!-- end -->)", re.S)
CARD_WINDOWS = 1155


def whole_runs(results: Path, models: list[str]) -> list[Record]:
    """Finished perplexity runs of these models over the whole text or the card's 1,155 windows.

    Of several runs of one spec on one kind of device, the newest stands for all.
    """
    newest: dict[tuple[str, str], Record] = {}
    for model in models:
        for path in RunStore(results).finished("ppl", model):
            record = load_record(path)
            if (
                isinstance(record.results, PerplexityResult)
                and record.model is not None
                and record.results.windows >= min(CARD_WINDOWS, record.results.windows_available)
            ):
                newest.setdefault((record.spec_hash, record.model.device_name), record)
    return list(newest.values())


def speed_cells(results: Path, models: list[str]) -> list[Row]:
    """Finished cells of these models' sweeps; of several of one spec on one kind of device, the newest."""
    newest: dict[tuple[str, str], Row] = {}
    for model in models:
        for path in RunStore(results).finished("speed", model):
            row = Row(load_record(path))
            if row.record.status == "ok":
                newest.setdefault((row.record.spec_hash, row.device), row)
    return sorted(newest.values(), key=speed_order)


def render(text: str, results: Path, project: Path) -> str:
    """The README with its tables renewed; it names claims files by their path in the project."""

    def renewed(mark: re.Match[str]) -> str:
        models = mark[3].split(", ")
        if mark[2] == "claims":
            table = claimed_speed_table(
                load_claims(project / mark[3]), one_sequence(load_runs(results)[0])
            ).to_markdown()
        elif mark[2] == "perplexity":
            table = runs_table(whole_runs(results, models)).to_markdown()
        else:
            table = speed_table(speed_cells(results, models)).to_markdown()
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
