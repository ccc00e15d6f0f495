"""What a product needs of an output as losses: in [0, 1], fit to travel, and no failure of the model is laid to its exits."""

import json
import pickle
import sys

import numpy as np
import pytest
import toy_decoder
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from riskcal import RiskcalError, Runs
from riskcal_adapters import cli, record, validators
from riskcal_adapters.validators import Failure, JsonSchema, NewFailure, Regex

app = typer.Typer()
app.command("record")(cli.record)
app.command("other")(lambda: None)  # with a single command typer would drop its name
PERSON = {
    "type": "object",
    "properties": {"name": {"$ref": "#/$defs/text"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"text": {"type": "string", "minLength": 1}},
}


@given(st.dictionaries(st.sampled_from(["name", "age", "x"]), st.text(max_size=2) | st.integers()))
def test_a_schema_accepts_what_it_describes_and_nothing_else(document):
    fits = (
        isinstance(document.get("name"), str)
        and document["name"] != ""
        and (isinstance(document.get("age", 0), int) and document.get("age", 0) >= 0)
        and "x" not in document
    )
    text = json.dumps(document)
    valid = JsonSchema(PERSON)
    assert valid(text) == fits
    assert not valid(text[:-1])  # cut short
    assert not valid(f"Here it is: {text}")


@pytest.mark.parametrize("text", ["", "NaN", '{"name": "a", "age": Infinity}', "[" * 100_000])
def test_what_is_no_json_is_invalid(text):
    assert not JsonSchema(True)(text)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "text"}, r"^schema: \$\.type: 'text' is not valid"),
        ("{", "^schema: is not JSON"),
        ({"enum": {1}}, "^schema: is not JSON"),
    ],
)
def test_what_is_no_schema_is_refused(schema, message):
    with pytest.raises(RiskcalError, match=message):
        JsonSchema(schema)


def test_a_schema_never_leads_to_the_network():
    elsewhere = JsonSchema({"$ref": "http://127.0.0.1:9/schema.json"})
    with pytest.raises(
        RiskcalError, match=r"reference 'http://.*put what it refers to under \$defs"
    ):
        elsewhere("{}")
    assert not JsonSchema({"$ref": "https://json-schema.org/draft/2020-12/schema"})("3")


@given(st.floats(0, 1), st.floats(0, 1))
def test_only_what_the_early_output_newly_lacks_is_laid_to_it(early, full):
    grades = {"early": early, "full": full}
    loss, risk = NewFailure(grades.__getitem__), Failure(grades.__getitem__)
    assert loss("full", "full") == 0
    assert loss("early", "full") == max(0.0, full - early)
    assert risk("early") == 1 - early


@pytest.mark.parametrize("value", [None, "yes", 2, -0.5, float("nan")])
def test_a_check_of_ones_own_says_true_or_false_or_how_far(value):
    with pytest.raises(RiskcalError, match="neither True nor False nor a number from 0 to 1"):
        Failure(lambda output: value)("text")


def test_expressions_are_of_the_whole_output():
    assert [Regex(r"\d+")(text) for text in ("42", "42 ", "")] == [True, False, False]
    with pytest.raises(RiskcalError, match=r"^pattern: is no regular expression"):
        Regex("(")


def test_validators_travel_and_name_themselves():
    for validator in (JsonSchema(PERSON), Regex(r"\d")):
        loss = NewFailure(validator)
        assert pickle.loads(pickle.dumps(loss)) == loss
        assert repr(validator) in repr(loss)
    assert JsonSchema(json.dumps(PERSON)) == JsonSchema(PERSON)


def test_a_recording_of_validity_needs_no_references(tmp_path):
    valid = Regex("(?s).*w[2-4]")
    record(
        [f"prompt {i}" for i in range(40)],
        toy_decoder.load,
        [0.3],
        tmp_path / "out",
        dissimilarity=NewFailure(valid),
        risk=Failure(valid),
    )
    runs = Runs.read(tmp_path / "out")
    signed = runs.losses("risk")
    assert set(signed.ravel()) == {-1.0, 0.0, 1.0}  # exits break some outputs, and mend some
    assert (runs.losses("textual") == np.maximum(signed, 0)).all()


def test_the_command_takes_schemas_expressions_and_functions(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "schema.json").write_text(json.dumps(PERSON))
    (tmp_path / "own_checks.py").write_text("def short(output):\n    return len(output) < 9\n")
    monkeypatch.chdir(tmp_path)
    losses = ["json-schema:schema.json", r"regex:(w\d ?)+", "valid:own_checks:short"]
    for i, loss in enumerate(losses):
        arguments = ["record", "prompts.txt", "--decoder", "toy_decoder:load", "--out", f"out{i}"]
        done = CliRunner().invoke(
            app, [*arguments, "--thresholds", ".3,.6", "--loss", loss, "--risk"]
        )
        assert done.exit_code == 0, done.exception
        assert set(Runs.read(f"out{i}").to_frame()["risk"]) <= {0.0, 1.0}
    for loss, message in [
        ("json-schema:none.json", "--loss: none.json: cannot be read"),
        ("regex:(", "--loss: pattern: is no regular expression"),
        ("regex:", "--loss: 'regex:' is unknown"),
        ("valid:own_checks:tall", "--loss: module own_checks has no function 'tall'"),
        ("valid:own_checks", "--loss: 'own_checks' is not MODULE:FUNCTION"),
    ]:
        refused = CliRunner().invoke(app, [*arguments, "--loss", loss])
        assert message in str(refused.exception)


def test_without_jsonschema_schemas_say_what_to_install(monkeypatch):
    validators._compiled.cache_clear()
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ImportError, match=r"pip install 'riskcal-ltt\[validators\]'"):
        JsonSchema({"type": "null"})
