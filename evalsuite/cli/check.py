"""`hlwq-eval check`: the claims of a published card against records, arithmetic and one another."""

from pathlib import Path
from typing import Annotated

import typer

from evalsuite.cli.app import app
from evalsuite.cli.show import Screen
from evalsuite.core.errors import UsageError

FAIL_ON = "impossible,contradicted,fails"
EXAMPLE = "experiments/claims/qwopus_35b_a3b.toml"


@app.command(short_help="Which numbers of a model card hold, and which do not.")
def check(
    claims: Annotated[Path | None, typer.Argument(help="A claims file (TOML).")] = None,
    results: Annotated[Path, typer.Option(help="Folder with records.")] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
    fail_on: Annotated[
        str, typer.Option(help="Verdicts that make the exit code 1, with commas between them; or none.")
    ] = FAIL_ON,
    init: Annotated[
        Path | None, typer.Option(help="Draft a claims file from this Markdown card, for you to complete.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where --init writes.")] = Path("claims.toml"),
) -> None:
    """Which numbers of a model card hold, fail, contradict one another or cannot be. Needs no GPU."""
    screen = Screen(as_json)
    if init is not None:
        _draft(screen, init, claims, out)
        return
    if claims is None:
        raise UsageError(
            "No claims file was named.",
            todo=f"give one, such as {EXAMPLE}, or draft one with --init CARD.md.",
        )
    fatal = _verdicts(fail_on)
    if fatal & set(check_claims(screen, claims, results)):
        raise typer.Exit(1)


def check_claims(screen: Screen, claims: Path, results: Path) -> list[str]:
    """Judge a claims file by the records of a folder, and show it; the verdict of each claim."""
    from evalsuite.report.claim_tables import claim_tables, document, summary
    from evalsuite.report.claim_verdicts import judge
    from evalsuite.report.claims import load_claims
    from evalsuite.store.runs import load_records

    file = load_claims(claims)
    records, skipped = load_records(results)
    judged = judge(file, records)
    for table in claim_tables(file, judged):
        screen.table(table)
    screen.out.print(summary(judged), markup=False)
    for reason in skipped:
        screen.warn(f"left out: {reason}")
    if not records:
        screen.note(
            f"No records in {results}: nothing was measured, so nothing is compared with a measurement."
        )
    screen.document(document(file, judged, skipped))
    return [item.verdict for item in judged]


def _verdicts(text: str) -> set[str]:
    from evalsuite.report.claim_verdicts import VERDICTS

    if text == "none":
        return set()
    wanted = {word.strip() for word in text.split(",")}
    if unknown := wanted - set(VERDICTS):
        raise UsageError(
            f"--fail-on knows no verdict {sorted(unknown)[0]!r}.",
            todo=f"choose from {', '.join(VERDICTS)}, with commas between them, or none.",
        )
    return wanted


def _draft(screen: Screen, card: Path, claims: Path | None, out: Path) -> None:
    from evalsuite.report.claim_draft import draft

    if claims is not None:
        raise UsageError("--init drafts a claims file, and checks none.", todo="give one of the two.")
    if out.exists():
        raise UsageError(f"{out} exists.", todo="name another file with --out; a draft overwrites nothing.")
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{card} cannot be read as text.", cause=str(error)) from error
    found = draft(text, card.name)
    try:
        out.write_text(found.text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{out} cannot be written.", cause=str(error.strerror)) from error
    screen.note(
        f"{found.claims} claims drafted in {out}, {found.left} lines left as comments. Complete them, then: "
        f"hlwq-eval check {out}"
    )
    screen.document({"path": str(out), "claims": found.claims, "comments": found.left})
