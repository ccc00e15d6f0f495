"""`riskcal calibrate` from the shell: what it writes, prints and refuses."""

import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import riskcal
from riskcal import ExitPolicy, RiskcalError, Runs, cli


def run(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)


@pytest.fixture
def log(tmp_path):
    """Two thresholds of a cascade, whose second coordinate matters to cost alone."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": f"p{i}",
            "threshold": t,
            "threshold_2": t2,
            "dissimilarity": float(rng.random() < 0.04),
            "layers": 4 * t + t2,
        }
        for i in range(300)
        for t in (0.9, 0.5)
        for t2 in (0.8, 0.4)
    ]
    path = tmp_path / "runs.jsonl"
    pd.DataFrame(rows).to_json(path, orient="records", lines=True)
    return path


def test_the_version_is_printed():
    assert run("--version").stdout.strip() == f"riskcal {riskcal.__version__}"
    assert run("-h").exit_code == 0


def test_coordinates_reach_the_policy(log, tmp_path):
    out = tmp_path / "policy.json"
    found = run("calibrate", log, "--delta", 0.1, "--coordinate", "threshold_2", "--out", out)
    assert found.exit_code == 0
    policy = ExitPolicy.load(out)
    assert policy.threshold == 0.5
    assert policy.coordinates == {"threshold_2": 0.4}


def test_the_outcome_as_json_is_json_and_nothing_else(log):
    found = run("calibrate", log, "--delta", 0.1, "--coordinate", "threshold_2", "--json")
    told = json.loads(found.stdout)
    assert told["certified"]
    assert told["chosen"]["threshold_2"] == 0.4
    assert len(told["table"]) == 4
    nothing = run("calibrate", log, "--delta", 0.001, "--coordinate", "threshold_2", "--json")
    told = json.loads(nothing.stdout)
    assert (nothing.exit_code, told["threshold"], told["chosen"]) == (1, "full", None)


def test_a_budget_is_asked_for_in_the_shell(log):
    given = ("calibrate", log, "--delta", 0.1, "--coordinate", "threshold_2")
    found = run(*given, "--budget", "layers=3:8")
    assert "cost in layers is at most 3" in " ".join(found.stdout.split())
    assert run(*given, "--budget", "layers=2:8").exit_code == 1
    with pytest.raises(RiskcalError, match="--budget: 'layers' is neither NAME=MEAN"):
        run(*given, "--budget", "layers")
    with pytest.raises(RiskcalError, match="budget: give 'layers' with the largest"):
        run(*given, "--budget", "layers=3")


def test_the_picture_is_drawn_or_refused(tmp_path):
    runs = tmp_path / "runs.parquet"
    riskcal.load_example("g2p").write(runs)
    plot = tmp_path / "risk.svg"
    assert run("calibrate", runs, "--delta", 0.1, "--plot", plot).exit_code == 0
    assert plot.read_text().startswith("<?xml")
    with pytest.raises(RiskcalError, match=r"--plot: .*gif ends in none of"):
        run("calibrate", runs, "--delta", 0.1, "--plot", tmp_path / "risk.gif")


def test_what_a_decoder_asks_of_a_policy_is_said_on_the_shell_as_its_refusal_advises(tmp_path):
    Runs.from_arrays(thresholds=[0.9, 0.5], dissimilarity=np.zeros((200, 2))).write(
        tmp_path / "runs.parquet"
    )
    command = ["calibrate", str(tmp_path / "runs.parquet"), "--delta", ".1"]
    out = ["--out", str(tmp_path / "policy.json")]
    assert run(*command, *out).exit_code == 0
    with pytest.raises(RiskcalError, match="the certified policy does not name it") as refusal:
        ExitPolicy.load(tmp_path / "policy.json").named()
    advised = str(refusal.value).partition("riskcal calibrate ")[2].partition(")")[0].split()
    assert run(*command, *out, *advised).exit_code == 0
    named = ExitPolicy.load(tmp_path / "policy.json").named()
    assert (named.measure, named.cache, named.batching) == ("softmax", "project", "diverge")


def test_without_out_no_policy_is_made_and_none_refused(tmp_path):
    rows = [
        {"prompt": f"p{i}", "threshold": t, "config": name, "dissimilarity": 0.0, "layers": t}
        for i in range(200)
        for t in (0.9, 0.5)
        for name in ("a", "b")
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "runs.parquet")
    command = [str(tmp_path / "runs.parquet"), "--coordinate", "config"]
    assert run("check", *command).exit_code == 0
    assert run("calibrate", *command, "--delta", ".2", "--json").exit_code == 0


def test_a_direction_that_the_table_contradicts_is_refused_as_check_says(tmp_path):
    """Read as strict, the loosest of a table's thresholds would be certified for the safest."""
    path = tmp_path / "runs.csv"
    losses = np.random.default_rng(0).random((300, 2)) < (0.02, 0.03)
    pd.DataFrame(
        {
            "prompt": np.repeat([f"p{i}" for i in range(300)], 2),
            "threshold": [0.5, 0.9] * 300,
            "dissimilarity": losses.ravel().astype(float),
            "lower_is_stricter": False,
        }
    ).to_csv(path, index=False)
    said = run("check", path, "--lower-is-stricter")
    assert said.exit_code == 2
    with pytest.raises(RiskcalError, match="the column says that high thresholds are strict"):
        run("calibrate", path, "--delta", 0.1, "--lower-is-stricter")
    assert run("check", path).exit_code == run("calibrate", path, "--delta", 0.1).exit_code == 0


@pytest.mark.parametrize("command", ["calibrate", "trials"])
@pytest.mark.parametrize("nowhere", ["--out", "--plot"])
def test_of_two_files_none_is_written_where_one_cannot_be(tmp_path, command, nowhere):
    runs, asked = tmp_path / "runs.parquet", ["--delta", 0.1]
    riskcal.load_example("g2p").take(np.arange(200)).write(runs)
    asked += ["--n-trials", 2] if command == "trials" else []
    places = {"--out": tmp_path / "it.json", "--plot": tmp_path / "it.png"}
    if command == "trials":
        places["--out"] = tmp_path / "it.csv"
    places[nowhere] = tmp_path / "no folder" / places[nowhere].name
    with pytest.raises(RiskcalError, match="cannot be written"):
        run(command, runs, *asked, *(part for pair in places.items() for part in pair))
    assert list(tmp_path.iterdir()) == [runs]


@pytest.mark.parametrize("folder", ["it.json", "it.png"])
def test_neither_policy_nor_picture_is_written_where_one_would_replace_a_folder(
    tmp_path, log, folder
):
    (tmp_path / folder).mkdir()
    asked = ("--delta", 0.1, "--out", tmp_path / "it.json", "--plot", tmp_path / "it.png")
    with pytest.raises(RiskcalError, match=f"{folder}: cannot be written"):
        run("calibrate", log, "--coordinate", "threshold_2", "--cost", "layers", *asked)
    assert [path.name for path in tmp_path.glob("it.*")] == [folder]
