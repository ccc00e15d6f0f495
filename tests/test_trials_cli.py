"""`riskcal trials`: the table that `run_trials` gives, printed, written and drawn."""

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import riskcal
from riskcal import RiskcalError, Runs, cli, plots


def trials(*arguments):
    return CliRunner().invoke(cli.app, ["trials", *map(str, arguments)])


@pytest.fixture(scope="module")
def runs():
    rng = np.random.default_rng(0)
    losses = (rng.random((300, 1)) < np.array([0.0, 0.01, 0.04, 0.3])).astype(float)
    layers = np.array([8.0, 6.0, 4.0, 2.0]) - np.array([0.0, 1.0, 1.0, 1.0]) * rng.random((300, 1))
    return Runs.from_arrays(thresholds=[np.inf, 0.9, 0.7, 0.5], dissimilarity=losses, layers=layers)


@pytest.fixture(scope="module")
def recorded(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "runs.parquet"
    runs.write(path)
    return path


def test_trials_prints_the_summary_and_writes_what_run_trials_gives(
    tmp_path, runs, recorded, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    out, plot = tmp_path / "trials.csv", tmp_path / "trials.png"
    result = trials(
        recorded, "--delta", 0.1, "--delta", 0.02, "--n-trials", 10, "--out", out, "--plot", plot
    )
    assert result.exit_code == 0, result.exception
    expected = riskcal.run_trials(runs, [0.1, 0.02], n_trials=10)
    pd.testing.assert_frame_equal(pd.read_csv(out), expected, check_dtype=False)
    assert plot.read_bytes().startswith(b"\x89PNG")
    for _, row in riskcal.trials.summary(expected).iterrows():
        printed = next(line for line in result.output.splitlines() if f" {row['delta']:g} " in line)
        assert f"{row['certified']:.0%}" in printed
        assert f"{row['layers_mean']:.3g} +- {row['layers_sd']:.2g}" in printed
        assert f"{row['saving_mean']:.3g}" in printed
    assert f"Trials written to {out}" in result.output


def test_trials_passes_its_options_on(tmp_path, runs, recorded):
    out = tmp_path / "trials.parquet"
    options = {
        "n_trials": 6,
        "calibration_fraction": 0.5,
        "seed": 3,
        "epsilon": 0.2,
        "test": "hoeffding",
    }
    flags = [
        word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)
    ]
    result = trials(recorded, "--delta", 0.1, "--procedure", "holm", *flags, "--out", out)
    assert result.exit_code == 0, result.exception
    expected = riskcal.run_trials(runs, [0.1], procedure="holm", **options)
    pd.testing.assert_frame_equal(pd.read_parquet(out), expected)
    assert not expected.equals(riskcal.run_trials(runs, [0.1], **options | {"seed": 4}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--delta", 2], "delta: 2 is not strictly between"),
        (["--delta", 0.1, "--calibration-fraction", 1.5], "calibration_fraction: 1.5"),
        (["--delta", 0.1, "--plot", "a.gif"], "--plot: a.gif ends in none of"),
        (["--delta", 0.1, "--out", "a.xlsx"], "a.xlsx: unknown ending"),
    ],
)
def test_bad_arguments_are_refused(recorded, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = trials(recorded, *arguments)
    assert isinstance(result.exception, RiskcalError)
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_runs_without_layers_have_no_picture(tmp_path):
    path = tmp_path / "runs.csv"
    losses = np.random.default_rng(1).random((40, 1)) * [0.1, 0.5]
    Runs.from_arrays(thresholds=[0.9, 0.5], dissimilarity=losses).write(path)
    assert trials(path, "--delta", 0.3, "--n-trials", 3).exit_code == 0
    result = trials(path, "--delta", 0.3, "--n-trials", 3, "--plot", tmp_path / "a.svg")
    assert "--plot: the runs have no column layers" in str(result.exception)


def test_the_picture_shows_every_trial_and_the_means(runs):
    table = riskcal.run_trials(runs, [0.02, 0.1], n_trials=5)
    from matplotlib.figure import Figure

    axes = plots.trials_curve(table, ax=Figure().subplots())
    (bars,) = axes.containers
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), table["layers"])
    np.testing.assert_allclose(
        bars.lines[0].get_ydata().astype(float), table.groupby("delta")["layers"].mean()
    )
