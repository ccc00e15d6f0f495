"""The command line. Exit status: 0 done, 1 nothing certified, 2 bad input, 3 alarm."""

import sys
from importlib import metadata

from riskcal._validate import RiskcalError
from riskcal.cli import calibrate, check, demo, monitor, report, trials, verify
from riskcal.cli.app import app as app

#: Imported for the commands that they add to `app`.
COMMANDS = (calibrate, check, trials, report, demo, monitor, verify)


def main() -> None:
    """Entry point: bad input ends with one line on stderr and status 2, whatever the command."""
    for command in metadata.entry_points(group="riskcal.commands"):
        app.command(command.name)(command.load())
    try:
        app()
    except RiskcalError as error:
        print(f"riskcal: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
