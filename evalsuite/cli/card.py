"""`hlwq-eval card`: a model card from records."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evalsuite.cli.app import app
from evalsuite.cli.show import Screen
from evalsuite.core.errors import UsageError

if TYPE_CHECKING:
    from evalsuite.report.card import CardRequest


@app.command(short_help="Write a MODEL_CARD.md out of the records.")
def card(
    model: Annotated[
        str | None, typer.Argument(help="Its name in the records, where they are of several models.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The card; its pictures go into figures/ beside it.")] = Path(
        "MODEL_CARD.md"
    ),
    results: Annotated[
        list[Path] | None, typer.Option(help="Folder with records; may be given several times.")
    ] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="For the front matter, as the hub spells it.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id for the front matter; else the baseline's, if it has one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """A MODEL_CARD.md with a model-index, tables, the commands that make each again, and what is missing.

    Needs no GPU. Only what was measured enters the front matter.
    """
    from evalsuite.report.card import CardRequest

    request = CardRequest(tuple(results or [Path("results")]), model, license_, base_model)
    write_card(Screen(as_json), request, out)


def write_card(screen: Screen, request: "CardRequest", out: Path) -> None:
    """Write a card, and its pictures into ``figures`` beside it."""
    from evalsuite.report.card import make_card
    from evalsuite.store.derived import AGAIN, write_derived
    from evalsuite.store.folder import storage_errors

    if out.is_dir():
        raise UsageError(f"{out} is a folder.", todo="name the file, such as --out MODEL_CARD.md.")
    screen.note("reading records and drawing pictures …")
    made = make_card(request, out.parent / "figures", "figures")
    with storage_errors(out, AGAIN):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_derived(out, made.text)
    screen.note(f"card of {made.model} from {len(made.report.runs)} runs: {out}")
    screen.document({"path": str(out), "model": made.model, "runs": [r.run_id for r in made.report.records]})
