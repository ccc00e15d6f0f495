"""The command line. Exit status: 0 done, 1 nothing certified, 2 bad input, 3 alarm."""

import io
import sys
import warnings
from importlib import metadata
from typing import Any

from riskcal._validate import RiskcalError
from riskcal.cli import calibrate, check, demo, monitor, report, trials, verify
from riskcal.cli.app import app as app

#: Imported for the commands that they add to `app`.
COMMANDS = (calibrate, check, trials, report, demo, monitor, verify)


def main() -> None:
    """Entry point: bad input ends with one line on stderr and status 2, a warning is a line there, whatever the command."""
    for command in metadata.entry_points(group="riskcal.commands"):
        app.command(command.name)(command.load())
    # a log may name what is no text: an alarm is told all the same
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = _remark
        try:
            app()
        except RiskcalError as error:
            _say(error)
            sys.exit(2)


def _remark(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """A warning in one line: the place in riskcal's source, which Python adds, is of no use to who called a command."""
    _say(message)


def _say(what: object) -> None:
    print(f"riskcal: {' '.join(str(what).split())}", file=sys.stderr)
