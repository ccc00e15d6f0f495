"""Write the JSON schema of `riskcal.ExitPolicy` to policy.schema.json, beside this file; a test checks that it is current."""

import json
from pathlib import Path

import riskcal

SCHEMA = Path(__file__).with_name("policy.schema.json")


def current() -> str:
    """The schema of the installed code, as the file's text."""
    return json.dumps(riskcal.ExitPolicy.model_json_schema(mode="serialization"), indent=2) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(current(), encoding="utf-8")
