"""A policy is verified from its records: the same calibration again, from what the certificate says was asked for."""

import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import riskcal
from riskcal import Decaying, ExitPolicy, RiskcalError, Runs, cli
from riskcal.calibration import verifying
from riskcal.fwer import Fallback

GRID = (0.9, 0.7, 0.5, 0.3)


def table(n: int = 300, seed: int = 0) -> pd.DataFrame:
    """Losses that rise as the threshold falls, with risks, two costs, clusters and groups."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        hard = rng.random()
        for t in ("full", *GRID):
            loss = 0.0 if t == "full" else min(1.0, hard * (1 - t) ** 2)
            rows.append(
                {
                    "prompt": f"p{i}",
                    "cluster": f"c{i // 2}",
                    "group": "ab"[i % 2],
                    "threshold": t,
                    "dissimilarity": loss,
                    "risk": 0.2 + 0.5 * loss,
                    "layers": 6.0 if t == "full" else 1 + 5 * t,
                    "price": 2.0 if t == "full" else float(t),
                }
            )
    return pd.DataFrame(rows)


FRAME = table()
PLAIN = FRAME.drop(columns=["cluster", "group", "price"])
RUNS = Runs.from_frame(PLAIN)
PRICED = Runs.from_frame(FRAME.drop(columns=["cluster", "group"]), costs=["price"])
CLUSTERED = Runs.from_frame(FRAME.drop(columns=["group", "price"]))


@pytest.mark.parametrize(
    ("runs", "options"),
    [
        (RUNS, {}),
        (RUNS, {"epsilon": 0.1, "attempt": 2, "test": "hoeffding_bentkus", "starts": 2}),
        (RUNS, {"objective": "risk", "procedure": "holm"}),
        (RUNS, {"delta": {"textual": 0.1, "risk": 0.05}}),
        (RUNS, {"objective": "selective"}),
        (RUNS, {"procedure": Fallback(weights=[0.1, 0.2, 0.3, 0.4], order=[3, 1, 0, 2])}),
        (RUNS, {"procedure": "pareto", "pilot_fraction": 0.3}),
        (RUNS, {"delta": [0.05, 0.1, 0.2]}),
        (RUNS, {"delta": 0.0001}),
        (PRICED, {"cost": "price", "budget": {"layers": 5, "price": (1.5, 2.0)}}),
        (CLUSTERED, {"weighting": "clusters"}),
        (CLUSTERED, {"weighting": "requests", "max_cluster": 4}),
    ],
)
def test_what_was_asked_for_is_in_the_certificate(runs, options, tmp_path):
    found = riskcal.calibrate(runs, **({"delta": 0.1} | options))
    for one in found if isinstance(found, list) else [found]:
        one.policy(cache="project").save(tmp_path / "policy.json")
        verified = riskcal.verify(ExitPolicy.load(tmp_path / "policy.json"), runs)
        assert verified.differences == ()
        assert verified.agrees
        assert verified.unrecorded == ("cache",)


def test_rows_in_another_order_agree_and_other_rows_do_not():
    policy = riskcal.calibrate(RUNS, delta=0.1).policy()
    assert riskcal.verify(policy, Runs.from_frame(PLAIN.sample(frac=1, random_state=1))).agrees
    changed = PLAIN.assign(layers=PLAIN["layers"].where(PLAIN.index != 7, 5.5))
    verified = riskcal.verify(policy, Runs.from_frame(changed))
    assert [one.name for one in verified.differences] == ["records_digest"]  # of a cost alone
    harder = PLAIN.assign(dissimilarity=(3 * PLAIN["dissimilarity"]).clip(upper=1.0))
    verified = riskcal.verify(policy, Runs.from_frame(harder))
    assert {"records_digest", "pvalue", "threshold"} == {one.name for one in verified.differences}
    assert not verified.agrees


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("delta", 0.05),
        ("epsilon", 0.01),
        ("epsilon_spent", 0.04),
        ("n", 299),
        ("pvalue", 1e-9),
        ("pvalue", None),
        ("records_digest", "0" * 32),
        ("lower", -1.0),
    ],
)
def test_a_certificate_that_says_something_else_is_named(field, value):
    policy = riskcal.calibrate(RUNS, delta=0.1).policy()
    forged = policy.certificate.model_copy(update={field: value})
    verified = riskcal.verify(policy.model_copy(update={"certificate": forged}), RUNS)
    assert not verified.agrees
    # these are what was asked: what follows from them differs
    if field not in ("delta", "epsilon"):
        (one,) = [one for one in verified.differences if one.name == field]
        assert one.stated == value
        assert repr(value) in str(one)


def test_a_policy_of_another_threshold_is_named():
    policy = riskcal.calibrate(RUNS, delta=0.1).policy()
    stricter = ExitPolicy(threshold=0.9).certified(policy.certificate)
    verified = riskcal.verify(stricter, RUNS)
    assert [(d.name, d.stated, d.found) for d in verified.differences] == [
        ("threshold", 0.9, policy.threshold)
    ]
    assert "threshold" in verified.message


def test_arrays_are_verified_with_what_they_were_calibrated_with():
    losses = RUNS.losses() * 8
    policy = riskcal.calibrate(losses, thresholds=RUNS.thresholds, delta=0.8, upper=8.0).policy()
    assert riskcal.verify(policy, losses, thresholds=RUNS.thresholds).agrees
    assert not riskcal.verify(policy, losses[1:], thresholds=RUNS.thresholds).agrees


def test_a_proxy_is_given_again() -> None:
    rng = np.random.default_rng(0)
    guess = RUNS.losses() * 0.9
    others = guess[rng.integers(0, len(guess), 500)]
    helped = {"proxy": guess, "unlabelled": others}
    policy = riskcal.calibrate(
        RUNS.losses(), thresholds=RUNS.thresholds, prompts=RUNS.prompts, delta=0.1, **helped
    ).policy()
    given = {"thresholds": RUNS.thresholds, "prompts": RUNS.prompts}
    assert riskcal.verify(policy, RUNS.losses(), **given, **helped).agrees
    without = riskcal.verify(policy, RUNS.losses(), **given)
    assert "test" in [one.name for one in without.differences]


def test_a_certificate_from_before_it_said_what_was_asked_can_be_completed():
    def old(policy: ExitPolicy) -> ExitPolicy:
        fields = policy.certificate.model_copy(update={"asked": None})
        return policy.model_copy(update={"certificate": fields})

    for delta in (0.1, {"textual": 0.1, "risk": 0.05}):
        assert riskcal.verify(old(riskcal.calibrate(RUNS, delta=delta).policy()), RUNS).agrees
    for more in ({"starts": 2}, {"procedure": "holm"}):
        assert riskcal.verify(old(riskcal.calibrate(RUNS, delta=0.1, **more).policy()), RUNS).agrees
    options = {"procedure": "fallback", "order": [3, 1, 0, 2]}
    ordered = old(riskcal.calibrate(RUNS, delta=0.1, **options).policy())
    assert "preregistered" in [d.name for d in riskcal.verify(ordered, RUNS).differences]
    assert riskcal.verify(ordered, RUNS, order=[3, 1, 0, 2]).agrees


def test_what_cannot_be_verified_is_refused():
    policy = riskcal.calibrate(RUNS, delta=0.1).policy()
    with pytest.raises(RiskcalError, match="certificate: the policy has none"):
        riskcal.verify(ExitPolicy(threshold=0.5), RUNS)
    with pytest.raises(RiskcalError, match="delta: the certificate says what it was"):
        riskcal.verify(policy, RUNS, delta=0.2)
    asking = riskcal.AdaptiveCalibration(np.arange(50), thresholds=GRID, delta=0.1)
    for _ in range(2):
        asking.update(asking.next_prompt(), np.zeros(len(GRID)))
    adaptive = asking.policy()
    with pytest.raises(RiskcalError, match="certificate: its test is 'adaptive betting"):
        riskcal.verify(adaptive, RUNS)


def run(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)


def test_the_shell_reads_the_records_as_they_were_read(tmp_path):
    log, out = tmp_path / "runs.jsonl", tmp_path / "policy.json"
    rows = FRAME.rename(columns={"prompt": "id"}).assign(variant="x")
    rows.to_json(log, orient="records", lines=True)
    said = ["--columns", "prompt=id"]
    asked = ["--coordinate", "variant", "--cost", "price", "--weighting", "clusters"]
    assert run("calibrate", log, "--delta", 0.1, *asked, *said, "--out", out).exit_code == 0
    agrees = run("verify", out, log, *said)
    assert agrees.exit_code == 0
    assert "agree" in agrees.stdout
    told = json.loads(run("verify", out, log, *said, "--json").stdout)
    assert told["agrees"]
    assert told["differences"] == []
    rows.iloc[5:].to_json(log, orient="records", lines=True)  # the first prompt is gone
    differs = run("verify", out, log, *said)
    assert differs.exit_code == 1
    assert "records_digest" in differs.stdout
    with pytest.raises(RiskcalError, match="no such file"):
        run("verify", out, tmp_path / "none.parquet")


def test_a_stratum_is_verified_by_its_name(tmp_path):
    log, out = tmp_path / "runs.csv", tmp_path / "policy.json"
    runs = Runs.from_frame(FRAME.drop(columns=["cluster", "price"]))
    runs.write(log)
    riskcal.calibrate_groups(runs, delta=0.1)["b"].policy().save(out)
    assert run("verify", out, log, "--group", "b").exit_code == 0
    assert run("verify", out, log, "--group", "a").exit_code == 1


CLASSED = Runs.from_frame(table(1200).drop(columns=["cluster"]), costs=["price"])


@pytest.mark.parametrize(
    "options",
    [
        {"cost": "layers"},
        {"cost": "price", "epsilon": 0.1, "test": "hoeffding_bentkus", "pilot_fraction": 0.3},
        {"cost": "layers", "joint": 0.07, "objective": "textual"},
        {"cost": "layers", "budgets": 1e-6},  # nothing is certified
    ],
)
def test_policies_by_class_are_verified_from_the_records_of_all_classes(options, tmp_path):
    asked = {"budgets": {"a": 0.05, "b": 0.2}} | options
    found = riskcal.calibrate_classes(CLASSED, **asked)
    assert found.certified == ("joint" in asked or asked["budgets"] != 1e-6)
    for name, policy in found.policies(cache="project").items():
        policy.save(tmp_path / f"{name}.json")
        stated = ExitPolicy.load(tmp_path / f"{name}.json")
        verified = riskcal.verify(stated, CLASSED)
        assert verified.differences == ()
        assert verified.unrecorded == ("cache",)
        assert verified.message.startswith("They agree: records ")
        assert f" give this policy of class {name!r}.\n" in verified.message
        fewer = riskcal.verify(stated, CLASSED.take(np.arange(30, 1200)))
        assert {"n", "records_digest"} <= {one.name for one in fewer.differences}
        assert fewer.message.startswith(
            f"They differ in {len(fewer.differences)} of class {name!r}:"
        )


def test_a_policy_by_class_is_verified_in_its_direction_however_the_records_are_read(tmp_path):
    log, out = tmp_path / "runs.parquet", tmp_path / "policy.json"
    Runs.from_frame(table(1200).drop(columns=["cluster", "price"])).write(log)
    found = riskcal.calibrate_classes(
        Runs.read(log, lower_is_stricter=True), budgets=0.3, cost="layers"
    )
    assert found.certified
    found.policies()["a"].save(out)
    assert riskcal.verify(ExitPolicy.load(out), Runs.read(log)).agrees
    assert run("verify", out, log).exit_code == 0


def test_a_policy_of_one_class_that_is_given_to_another_is_named():
    found = riskcal.calibrate_classes(CLASSED, budgets={"a": 0.02, "b": 0.2}, cost="layers")
    cautious, bold = found.policies().values()
    assert bold.threshold < cautious.threshold
    swapped = bold.model_copy(update={"certificate": cautious.certificate})
    names = [one.name for one in riskcal.verify(swapped, CLASSED).differences]
    assert "threshold" in names


def test_what_is_wrong_with_a_verification_by_class_is_said_with_its_remedy():
    found = riskcal.calibrate_classes(CLASSED, budgets=0.1, cost="layers")
    policy = found.policies()["a"]
    with pytest.raises(
        RiskcalError, match=r"runs: none are of class 'b'.*give the runs of all classes"
    ):
        riskcal.verify(policy, CLASSED.of_group("a"))
    with pytest.raises(RiskcalError, match="runs: none are of class 'a'"):
        riskcal.verify(policy, RUNS)
    with pytest.raises(RiskcalError, match="budgets: the certificate says what it was"):
        riskcal.verify(policy, CLASSED, budgets=0.1)
    with pytest.raises(RiskcalError, match="attempt: is nothing that calibrate_classes takes"):
        riskcal.verify(policy, CLASSED, attempt=2)
    silent = policy.certificate.model_copy(update={"asked": None})
    with pytest.raises(RiskcalError, match=r"before certificates said.*calibrate_classes again"):
        riskcal.verify(policy.model_copy(update={"certificate": silent}), CLASSED)


def test_the_shell_verifies_a_policy_by_class(tmp_path):
    log, out = tmp_path / "runs.csv", tmp_path / "policy.json"
    CLASSED.write(log)
    found = riskcal.calibrate_classes(CLASSED, budgets=0.1, cost="layers")
    found.policies()["b"].save(out)
    assert run("verify", out, log).exit_code == 0
    with pytest.raises(RiskcalError, match="give the runs of all classes"):
        run("verify", out, log, "--group", "b")


def test_a_number_and_a_mapping_are_not_the_same():
    assert not verifying._same({"textual": 0.1}, 0.1)
    assert not verifying._same(0.1, {"textual": 0.1})
    assert not verifying._same({"a": 1.0}, {"a": 1.0, "b": 2.0})
    assert verifying._same({"a": 1.0}, {"a": 1.0 + 1e-12})


def test_a_policy_of_one_stratum_names_it_and_is_verified_on_the_whole_log(tmp_path):
    """Its sentence is about the prompts of its group: a population of its own."""
    runs = Runs.from_frame(FRAME.drop(columns=["cluster", "price"]))
    path = tmp_path / "policy.json"
    found = riskcal.calibrate_groups(runs, delta=0.1)["b"]
    found.policy().save(path)
    policy = ExitPolicy.load(path)
    assert policy.certificate.asked.group == "b"
    assert " is at most 0.1 for prompts of group 'b'." in str(policy)
    assert found.message.endswith(" for prompts of group 'b'.")
    for some in (runs, runs.of_group("b")):
        assert riskcal.verify(policy, some).agrees
    names = {one.name for one in riskcal.verify(policy, runs.of_group("a")).differences}
    assert {"asked.group", "records_digest"} <= names
    before = policy.certificate.asked.model_copy(update={"group": None})
    old = policy.model_copy(
        update={"certificate": policy.certificate.model_copy(update={"asked": before})}
    )
    assert "group" not in str(old)
    assert riskcal.verify(old, runs.of_group("b")).agrees
    failed = riskcal.calibrate_groups(runs, delta=0.0001)["a"]
    said = "Nothing was certified at delta 0.0001 for prompts of group 'a': "
    assert failed.message.startswith(said)
    assert str(failed.policy()).startswith(said)
    assert "group" not in riskcal.calibrate(runs, delta=0.1).message


def test_a_policy_by_class_says_which_class_it_was_certified_for():
    found = riskcal.calibrate_classes(CLASSED, budgets=0.3, cost="layers")
    for name, policy in found.policies().items():
        assert f" for prompts of class {name!r}" in str(policy)


def test_versions_that_differ_are_named_and_no_others():
    policy = riskcal.calibrate(RUNS, delta=0.1).policy()
    made = policy.certificate.versions
    then = policy.certificate.model_copy(update={"versions": made | {"numpy": "1.0"}, "n": 299})
    verified = riskcal.verify(policy.model_copy(update={"certificate": then}), RUNS)
    assert verified.versions == {"numpy": ("1.0", made["numpy"])}
    assert f"(numpy was 1.0 then, and is {made['numpy']} here.)" in verified.message


def test_what_a_schedule_leaves_open_and_the_direction_are_in_the_records():
    """The temperature that they hold is that of a schedule whose length the policy says."""
    decaying = Runs.from_frame(PLAIN.assign(temperature=4.0))
    policy = riskcal.calibrate(decaying, delta=0.1).policy(schedule=Decaying(4.0, max_length=20))
    verified = riskcal.verify(policy, decaying)
    assert verified.agrees
    assert verified.unrecorded == ()
    turned = riskcal.calibrate(RUNS, delta=0.9, lower_is_stricter=True)
    assert turned.certified
    verified = riskcal.verify(turned.policy(), RUNS)
    assert verified.agrees
    assert verified.unrecorded == ()


def test_a_certificate_by_class_that_does_not_say_which_is_refused():
    policy = riskcal.calibrate_classes(CLASSED, budgets=0.1, cost="layers").policies()["a"]
    asked = policy.certificate.asked.model_copy(update={"of_class": None})
    silent = policy.certificate.model_copy(update={"asked": asked})
    with pytest.raises(RiskcalError, match="before certificates said which class and budgets"):
        riskcal.verify(policy.model_copy(update={"certificate": silent}), CLASSED)
