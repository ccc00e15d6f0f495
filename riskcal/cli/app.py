"""The program that the commands belong to."""

from typing import Annotated

import typer

app = typer.Typer(
    name="riskcal",
    help="Calibrate early exit: the cheapest threshold whose expected loss is certified.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import riskcal

        print(f"riskcal {riskcal.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
