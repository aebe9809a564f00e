"""`hlwq-eval cache`: what concerns the expert cache beside measuring with it."""

import typer

from evalsuite.cli.app import app

cache_app = typer.Typer(no_args_is_help=True, help="The expert cache: its files on the disk.")
app.add_typer(cache_app, name="cache")
