"""`riskcal recalibrate` repeats a recording and its calibration for other weights, and says what changed."""

import pytest
import typer
from typer.testing import CliRunner

from riskcal import ExitPolicy, RiskcalError, Runs, calibrate
from riskcal.serving import Tokens
from riskcal_adapters import cli, record
from riskcal_adapters.cli.decoders import parse_decoder

app = typer.Typer()
app.command("recalibrate")(cli.recalibrate)
app.command("other")(lambda: None)  # with a single command typer would drop its name
NEW = ("--new-records", "new", "--out", "new.json")
PROMPTS = [f"prompt {i}" for i in range(40)]


def run(*arguments):
    return CliRunner().invoke(app, ["recalibrate", *map(str, arguments)])


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A policy certified on the first weights, its records and its prompts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    template = ExitPolicy(measure="margin", max_new_tokens=6)
    record(PROMPTS, parse_decoder("toy_decoder:load"), [0.9, 0.8, 0.3], "old", policy=template)
    runs = Runs.read("old")
    made = calibrate(runs, delta=0.4, epsilon=0.2, test="hoeffding_bentkus").policy()
    made.save("policy.json")
    return made


def test_the_same_model_gives_the_same_policy(old):
    result = run(
        *("policy.json", "--prompts", "prompts.txt", *NEW),
        *("--decoder", "toy_decoder:load", "--records", "old"),
    )
    assert result.exit_code == 0, result.exception
    new = ExitPolicy.load("new.json")
    assert new.digest() == old.digest()
    assert new.certificate.pvalue == old.certificate.pvalue
    assert f"threshold: {old.threshold} -> {old.threshold}" in result.output
    assert "weights" not in result.output


def test_other_weights_are_recorded_and_calibrated_alike_and_told(old):
    result = run(
        *("policy.json", "--prompts", "prompts.txt", *NEW),
        *("--decoder", "toy_decoder:OpenDecoder", "--records", "old"),
        *("--sampling-temperature", 0.7),
    )
    assert result.exit_code == 0, result.exception
    new, runs = ExitPolicy.load("new.json"), Runs.read("new")
    assert runs.thresholds.tolist() == [0.9, 0.8, 0.3]
    assert (new.weights, new.max_new_tokens, new.measure) == ("toy", 6, "margin")
    for name in ("delta", "epsilon", "objective", "test", "procedure", "attempt"):
        assert getattr(new.certificate, name) == getattr(old.certificate, name)
    assert new.sampling.temperature == 0.7
    assert "weights: None -> toy" in result.output
    assert "sampling: None -> {'temperature': 0.7" in result.output
    assert "layers a token: " in result.output


def test_what_cannot_be_repeated_is_refused(old):
    def refusal(*options):
        result = run("policy.json", "--prompts", "prompts.txt", *NEW, *options)
        assert isinstance(result.exception, RiskcalError), result.output
        return str(result.exception)

    own = ("--decoder", "toy_decoder:load")
    assert "was recorded with riskcal_adapters.texts.token_distance" in refusal(
        *own, "--records", "old", "--loss", "regex:a"
    )
    assert "give one of --decoder NAME and --model FOLDER" in refusal()
    ExitPolicy(threshold=0.5, forbidden=[Tokens([3])]).save("policy.json")
    assert "policy.json: is not certified" in refusal(*own)
