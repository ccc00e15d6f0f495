"""Strata that are too small to be calibrated stand in the way of no other."""

import inspect
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import riskcal
from helpers import varied
from riskcal import RiskcalError, Runs, calibrate_groups


def grouped(n: int = 60, **columns: object) -> Runs:
    """Prompts of one stratum, and of another that has one prompt."""
    rows = [
        {"prompt": f"p{i}", "threshold": t, "dissimilarity": 0.0, "layers": 3.0 * t}
        for i in range(n)
        for t in (0.9, 0.5)
    ]
    table = pd.DataFrame(rows).assign(**columns)
    return Runs.from_frame(table.assign(group=np.where(table["prompt"] == "p0", "rare", "common")))


def test_a_small_stratum_stands_in_the_way_of_no_list_of_deltas() -> None:
    found = calibrate_groups(grouped(), delta=[0.2, 0.3])
    assert [one.certified for one in found["common"]] == [True, True]
    assert [(one.certified, one.delta) for one in found["rare"]] == [(False, 0.2), (False, 0.3)]
    assert found["rare"][0].procedure == found["common"][0].procedure == "simultaneous"
    assert found["rare"][0].policy().is_full_model


def test_a_small_stratum_spends_what_the_others_do() -> None:
    found = calibrate_groups(grouped(), delta=0.3, attempt=2, starts=2)
    assert found["rare"].epsilon_spent == found["common"].epsilon_spent
    assert found["rare"].starts == found["common"].starts == 2


OWN = {"runs", "delta", "epsilon", "options"}  # of calibrate_groups, or no single argument


@pytest.mark.parametrize(
    "argument", [p for p in inspect.signature(riskcal.calibrate).parameters if p not in OWN]
)
def test_what_calibrate_takes_by_default_a_small_stratum_takes_too(argument: str) -> None:
    default = inspect.signature(riskcal.calibrate).parameters[argument].default
    plain = calibrate_groups(grouped(), delta=0.3)
    said = calibrate_groups(grouped(), delta=0.3, **{argument: default})
    assert not said["rare"].certified
    for name, one in said.items():
        pd.testing.assert_frame_equal(one.table, plain[name].table)
        assert one.certificate == plain[name].certificate


@pytest.mark.parametrize("delta", [0.3, [0.2, 0.3]])
def test_a_small_stratum_is_refused_what_a_large_one_is(delta: float | list[float]) -> None:
    cut = replace(grouped(), stopped=riskcal.Stop(delta=0.3))
    options = {} if isinstance(delta, list) else {"procedure": "holm"}
    alone = cut.of_group("rare")
    with pytest.raises(RiskcalError, match="procedure: the recording stopped"):
        calibrate_groups(alone, delta=delta, **options)


def test_a_small_stratum_keeps_the_digest_of_what_was_preregistered() -> None:
    found = calibrate_groups(grouped(), delta=0.3, procedure="fixed_sequence", order=[1, 0])
    assert found["rare"].preregistered == found["common"].preregistered is not None


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"test": "nonsense"}, RiskcalError, "test: 'nonsense' is unknown"),
        ({"procedure": "nonsense"}, RiskcalError, "procedure: 'nonsense' is unknown"),
        ({"starts": 0}, RiskcalError, "starts: "),
        ({"attempt": 0}, RiskcalError, "attempt: "),
        ({"nonsense": 1}, TypeError, "nonsense"),
        ({"delta": []}, RiskcalError, "delta: the list is empty"),
    ],
)
def test_options_are_checked_where_all_strata_are_too_small(
    options: dict[str, object], error: type[Exception], words: str
) -> None:
    table = varied("variant", ["a"], n=2)
    runs = Runs.from_frame(table.assign(group=table["prompt"]))
    with pytest.raises(error, match=words):
        calibrate_groups(runs, **({"delta": 0.3} | options))


def test_sizes_of_clusters_are_warned_about_once_for_all_strata() -> None:
    cluster = np.repeat(np.arange(60), np.tile([1, 3, 2, 4], 15))
    runs = Runs.from_arrays(
        thresholds=[0.5],
        cluster=cluster,
        group=np.where(cluster % 2, "a", "b"),
        dissimilarity=np.zeros((len(cluster), 1)),
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = calibrate_groups(runs, delta=0.3)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert found["a"].weighting == "clusters"


@pytest.mark.parametrize(
    "verb",
    [lambda x: calibrate_groups(x, delta=0.1), lambda x: riskcal.run_trials(x, [0.1])],
    ids=["groups", "trials"],
)
def test_arrays_are_refused_where_only_runs_will_do(verb: object) -> None:
    with pytest.raises(RiskcalError, match=r"runs: give Runs.*Runs.from_arrays"):
        verb(np.zeros((60, 2)))


@pytest.mark.parametrize("given", ["proxy", "unlabelled"])
def test_neither_a_proxy_nor_unlabelled_requests_are_taken_for_strata(given: str) -> None:
    with pytest.raises(RiskcalError, match="unlabelled requests have no groups here"):
        calibrate_groups(grouped(), delta=0.3, **{given: np.zeros((60, 2))})


def test_one_sequence_is_what_a_procedure_without_starts_is_said_to_have() -> None:
    found = calibrate_groups(grouped(), delta=0.3, procedure="holm")
    assert [one.starts for one in found.values()] == [1, 1]
    assert found["common"].policy().certificate.starts == 1


def test_what_was_not_tested_has_the_p_value_one_and_the_largest_bound() -> None:
    assert (calibrate_groups(grouped(), delta=0.3)["rare"].table["pvalue"] == 1.0).all()
    lists = calibrate_groups(grouped(), delta=[0.2, 0.3])["rare"]
    assert all((one.table["bound"] == 1.0).all() for one in lists)


def test_a_stratum_is_named_only_where_all_prompts_are_of_it() -> None:
    runs = grouped()
    whole, alone = (riskcal.calibrate(one, delta=0.3) for one in (runs, runs.of_group("common")))
    assert "of group" not in whole.message
    assert whole.asked.group is None
    assert alone.message.endswith(" for prompts of group 'common'.")
    assert alone.asked.group == "common"


def test_two_prompts_of_a_stratum_are_a_test_and_one_is_none() -> None:
    runs = grouped()
    two = Runs.from_frame(
        runs.to_frame().assign(
            group=lambda table: np.where(table["prompt"].isin(["p0", "p1"]), "rare", "common")
        )
    )
    found = calibrate_groups(two, delta=0.3)["rare"]
    assert (found.table["pvalue"] < 1.0).all()
    assert "too few for a test" not in found.message
    assert "1 prompts are too few for a test" in calibrate_groups(runs, delta=0.3)["rare"].message


@pytest.mark.parametrize(("sizes", "warned"), [(([2] * 4, [3] * 4), 0), (([2] * 4, [1, 3] * 2), 1)])
def test_strata_are_warned_of_sizes_that_differ_within_one_of_them(
    sizes: tuple[list[int], list[int]], warned: int
) -> None:
    cluster = np.repeat(np.arange(8), np.r_[sizes])
    runs = Runs.from_arrays(
        thresholds=[0.5],
        cluster=cluster,
        group=np.where(cluster < 4, "a", "b"),
        dissimilarity=np.zeros((len(cluster), 1)),
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        calibrate_groups(runs, delta=0.3)
    assert len(seen) == warned


@pytest.mark.parametrize(
    "options", [{}, {"delta": [0.2, 0.3]}, {"procedure": "pareto"}, {"procedure": "pilot_order"}]
)
@pytest.mark.parametrize("n", [4, 60])
def test_the_policy_of_a_small_stratum_is_verified_as_any_other(
    options: dict[str, object], n: int
) -> None:
    runs = grouped(n)
    for name, found in calibrate_groups(runs, **({"delta": 0.3} | options)).items():
        for one in found if isinstance(found, list) else [found]:
            assert riskcal.verify(one.policy(), runs).agrees
            assert riskcal.verify(one.policy(), runs.of_group(name)).agrees
            other = riskcal.verify(one.policy(), grouped(n, dissimilarity=0.1))
            assert "records_digest" in {difference.name for difference in other.differences}
