"""`riskcal recalibrate` repeats a recording and its calibration for other weights, and says what changed."""

import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from riskcal import Decaying, ExitPolicy, RiskcalError, Runs, calibrate
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


def certified(folder="old", template=None, size=1, shard=64, **options):
    """A policy of another recording, in policy.json."""
    policy = ExitPolicy(max_new_tokens=6, **(template or {}))
    load = parse_decoder("toy_decoder:OpenDecoder")
    settings = {"policy": policy, "batch_size": size, "shard_prompts": shard, "progress": False}
    record(PROMPTS, load, [0.9, 0.8, 0.3], folder, **settings)
    asked = {"delta": 0.6, "epsilon": 0.2, "test": "hoeffding_bentkus"} | options
    made = calibrate(Runs.read(folder), **asked).policy()
    made.save("policy.json")
    return made


def again(*options):
    return run(
        *("policy.json", "--prompts", "prompts.txt", *NEW),
        *("--decoder", "toy_decoder:OpenDecoder", *options),
    )


def assert_same_but_for_the_clock(*folders):
    pd.testing.assert_frame_equal(
        *(Runs.read(folder).to_frame().drop(columns="seconds") for folder in folders)
    )


def test_batches_in_which_rows_depend_are_as_large_as_they_were(old):
    made = certified("deep", {"batching": "deepest"}, size=5, shard=12)
    assert "give --records, the folder that it was calibrated on" in str(again().exception)
    other = again("--records", "deep", "--batch-size", 4)
    assert "calibrated on 'deepest' batches of 5; give 5" in str(other.exception)
    result = again("--records", "deep")
    assert result.exit_code == 0, result.exception
    new = ExitPolicy.load("new.json")
    assert (new.digest(), new.certificate.pvalue) == (made.digest(), made.certificate.pvalue)
    assert_same_but_for_the_clock("new", "deep")


def test_the_cost_that_chose_chooses_again_and_one_that_is_not_recorded_is_refused(old):
    made = certified("cheap", cost="tokens", procedure="holm")
    result = again("--records", "cheap")
    assert result.exit_code == 0, result.exception
    new = ExitPolicy.load("new.json")
    assert new.certificate.asked == made.certificate.asked
    assert new.threshold == made.threshold
    runs = Runs.read("cheap").to_frame()
    priced = Runs.from_frame(runs.assign(price=runs["layers"] * 2), costs=["price"])
    calibrate(priced, delta=0.6, epsilon=0.2, cost="price").policy().save("policy.json")
    assert "chosen by 'price', a cost that riskcal record does not measure" in str(
        again().exception
    )


def test_what_a_certificate_owes_to_a_proxy_is_not_repeated_without_it(old):
    runs = Runs.read("old")
    proxy = {"proxy": np.linspace(0, 1, 40), "unlabelled": np.linspace(0, 1, 50)}
    made = calibrate(runs, delta=0.6, epsilon=0.2, **proxy).policy()
    assert made.certificate.test == "betting_with_proxy"
    made.save("policy.json")
    assert "certified with a proxy, whose numbers it does not hold" in str(again().exception)


def test_records_of_another_certificate_are_refused(old):
    certified("others")
    refused = again("--records", "old")
    assert "old holds other records" in str(refused.exception)


def test_where_nothing_was_certified_the_recording_says_what_was_tested(old):
    schedule = Decaying(temperature=2.0, max_length=6)
    made = certified("none", {"schedule": schedule, "min_layer": 2}, delta=0.001, epsilon=0.01)
    assert made.is_full_model
    assert "is the full model, which does not say the schedule" in str(again().exception)
    result = again("--records", "none")
    assert result.exit_code == 1, result.exception
    assert_same_but_for_the_clock("new", "none")
