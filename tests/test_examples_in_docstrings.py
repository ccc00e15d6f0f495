"""Every public name of the core has an example, in the form of numpydoc, and it gives what stands there."""

import functools

import matplotlib
import pytest

import riskcal
from helpers import api_names, run_examples

#: Names that need none, and why.
WITHOUT: dict[str, str] = {}

load_example = functools.cache(riskcal.load_example)


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch):
    from matplotlib import pyplot

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(riskcal, "load_example", load_example)  # read once for all
    yield
    pyplot.close("all")


@pytest.mark.parametrize("name", api_names("riskcal"))
def test_the_example_runs(name):
    if name.endswith(".MetricsCollector"):
        pytest.importorskip("prometheus_client")
    assert run_examples(name) or name in WITHOUT


def test_what_needs_no_example_is_still_public():
    assert set(WITHOUT) <= set(api_names("riskcal"))


def test_a_wrong_example_and_none_are_noticed(monkeypatch):
    with monkeypatch.context() as changed:
        changed.setattr(riskcal.RiskcalError, "__doc__", "Examples\n--------\n>>> 1 + 1\n3\n")
        with pytest.raises(AssertionError, match="Expected:"):
            run_examples("riskcal.RiskcalError")
    monkeypatch.setattr(riskcal.RiskcalError, "__doc__", "None.")
    assert run_examples("riskcal.RiskcalError") == 0
