"""`hlwq-eval`: one thin file per command; every error is caught here and nowhere else."""

import sys
from typing import Annotated, NoReturn

import typer

import evalsuite
from evalsuite.core.errors import EvalError

INTERRUPTED = 130

app = typer.Typer(
    name="hlwq-eval",
    help="Measure quantized language models honestly, and check the tables others publish.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # at 80 columns its panels cut the names of options
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        print(f"hlwq-eval {evalsuite.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Commands share this entry."""


def main() -> None:
    """Run the command line and turn errors into one message and an exit code (0, 1, 2 or 130)."""
    from evalsuite.cli import (  # noqa: F401 (they register themselves)
        cache,
        cache_gc,
        card,
        check,
        compare,
        doctor,
        footprint,
        ppl,
        quantize,
        report,
        run,
        speed,
    )

    root.__doc__ = app.info.help
    try:
        app(prog_name="hlwq-eval")
    except EvalError as error:
        print(f"\nhlwq-eval: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer has turned the Ctrl-C into an exit code
            _interrupted()
        raise


def _interrupted() -> NoReturn:
    print("\nInterrupted. What is finished is kept; the same command resumes there.", file=sys.stderr)
    sys.exit(INTERRUPTED)
