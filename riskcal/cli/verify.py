"""`riskcal verify`: whether a policy's records give it and its certificate."""

import json
from pathlib import Path
from typing import Annotated

import typer

from riskcal.calibration.verifying import verify
from riskcal.cli.app import app
from riskcal.cli.log_options import ColumnsOption, KeepOption, RunsArgument, source
from riskcal.policy import ExitPolicy
from riskcal.records import Runs, renaming, retries


@app.command("verify")
def verify_command(
    policy: Annotated[Path, typer.Argument(help="The policy, as JSON.")],
    runs: RunsArgument,
    group: Annotated[
        str | None, typer.Option(help="The stratum that it was calibrated for, if any.")
    ] = None,
    columns: ColumnsOption = None,
    keep: KeepOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the outcome as one JSON object, and nothing else.")
    ] = False,
) -> None:
    """Calibrate RUNS again as POLICY's certificate says it was done, and compare the two.

    Exit status 1: they differ, and what differs is named.
    """
    stated = ExitPolicy.load(policy)
    asked = None if stated.certificate is None else stated.certificate.asked
    records = Runs.read(
        source(runs),
        candidate_columns=asked.candidate_columns if asked else (),
        costs=asked.costs if asked else (),
        columns=renaming.options(columns or ()),
        keep=retries.option(keep),
    )
    found = verify(stated, records if group is None else records.of_group(group))
    if as_json:
        told = {
            "agrees": found.agrees,
            "class": found.of_class,
            "differences": [
                {"name": one.name, "policy": str(one.stated), "records": str(one.found)}
                for one in found.differences
            ],
            "unrecorded": list(found.unrecorded),
            "records_digest": found.calibration.records_digest,
        }
        print(json.dumps(told))
    else:
        print(found.message)
    raise typer.Exit(0 if found.agrees else 1)
