"""More of the same kinds: columns that are fields of a policy, remarks that must be true, strata that are too small."""

import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest

import riskcal
from riskcal import RiskcalError, Runs, calibrate, calibrate_groups


def varied(name: str, values: list[object], n: int = 80) -> pd.DataFrame:
    """Candidates that differ in their thresholds and in one more column, of which the second value is cheaper."""
    return pd.DataFrame(
        [
            {
                "prompt": f"p{i}",
                "threshold": t,
                name: value,
                "dissimilarity": 0.0,
                "layers": 4.0 - j + t,
            }
            for i in range(n)
            for t in (0.9, 0.5)
            for j, value in enumerate(values)
        ]
    )


def grouped(n: int = 60, **columns: object) -> Runs:
    """Prompts of one stratum, and of another that has one prompt."""
    rows = [
        {"prompt": f"p{i}", "threshold": t, "dissimilarity": 0.0, "layers": 3.0 * t}
        for i in range(n)
        for t in (0.9, 0.5)
    ]
    table = pd.DataFrame(rows).assign(**columns)
    return Runs.from_frame(table.assign(group=np.where(table["prompt"] == "p0", "rare", "common")))


def costed(n: int = 60, **of_threshold: dict[float, float]) -> Runs:
    """All losses 0, and costs by threshold."""
    rows = [
        {"prompt": f"p{i}", "threshold": t, "dissimilarity": 0.0}
        | {name: of[t] for name, of in of_threshold.items()}
        for i in range(n)
        for t in (math.inf, 0.9, 0.5)
    ]
    return Runs.from_frame(pd.DataFrame(rows))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("cache", ["project", "copy"]),
        ("batching", ["diverge", "deepest"]),
        ("emits", ["exit", "last"]),
        ("max_new_tokens", [24, 48]),
        ("n_layers", [8]),
        ("dtype", ["float32", "bfloat16"]),
        ("weights", ["a", "b"]),
    ],
)
def test_a_column_that_is_a_field_of_policies_stands_in_that_field(
    name: str, values: list[object]
) -> None:
    found = calibrate(Runs.from_frame(varied(name, values), candidate_columns=[name]), delta=0.1)
    policy = found.policy()
    assert getattr(policy, name) == values[-1]
    assert policy.coordinates is None
    other = {"cache": "first", "batching": "regroup", "emits": "exit"}.get(
        name, 7 if values[-1] in (8, 48) else "z"
    )
    with pytest.raises(
        RiskcalError, match=rf"{name}: {other!r} is not the recorded {values[-1]!r}"
    ):
        found.policy(**{name: other})


def test_a_field_that_needs_another_says_so_and_is_held_once_that_is_given() -> None:
    found = calibrate(
        Runs.from_frame(varied("max_pending", [2, 4]), candidate_columns=["max_pending"]), delta=0.1
    )
    with pytest.raises(
        RiskcalError, match="max_pending: means nothing to cache None; name cache 'deferred'"
    ):
        found.policy()
    assert found.policy(cache="deferred").max_pending == 4


@pytest.mark.parametrize(
    "name", ["schedule", "pruning", "contrast", "sampling", "config", "certificate"]
)
def test_a_column_with_the_name_of_a_field_that_it_cannot_fill_is_refused_and_the_remedy_works(
    name: str,
) -> None:
    table = varied(name, ["a", "b"])
    found = calibrate(Runs.from_frame(table, candidate_columns=[name]), delta=0.1)
    with pytest.raises(
        RiskcalError, match=rf"{name}: 'b' cannot stand in the policy's field.*Rename the column"
    ):
        found.policy()
    renamed = Runs.from_frame(
        table.rename(columns={name: "variant"}), candidate_columns=["variant"]
    )
    assert calibrate(renamed, delta=0.1).policy().coordinates == {"variant": "b"}


def test_a_column_and_the_column_policy_may_not_contradict_each_other() -> None:
    table = varied("cache", ["project", "copy"])
    agrees = table.assign(policy=[json.dumps({"cache": value}) for value in table["cache"]])
    assert (
        calibrate(Runs.from_frame(agrees, candidate_columns=["cache"]), delta=0.1).policy().cache
        == "copy"
    )
    silent = calibrate(
        Runs.from_frame(table.assign(policy="{}"), candidate_columns=["cache"]), delta=0.1
    ).policy()
    assert (silent.cache, silent.batching) == ("copy", "diverge")
    contradicts = Runs.from_frame(
        table.assign(policy='{"cache": "first"}'), candidate_columns=["cache"]
    )
    with pytest.raises(
        RiskcalError, match="cache: 'copy' in its column, but 'first' in the column policy"
    ):
        calibrate(contradicts, delta=0.1).policy()


def test_the_full_model_does_not_take_the_settings_of_a_candidate_that_failed() -> None:
    table = varied("emits", ["exit", "last"]).assign(dissimilarity=0.9)
    policy = calibrate(Runs.from_frame(table, candidate_columns=["emits"]), delta=0.1).policy()
    assert policy.is_full_model
    assert policy.emits == "exit"


@pytest.mark.parametrize(("name", "value"), [("max_pending", 2), ("config", "a"), ("n_layers", 8)])
def test_the_full_model_is_not_refused_for_what_only_exits_need(name: str, value: object) -> None:
    table = varied(name, [value]).assign(dissimilarity=0.9)
    policy = calibrate(Runs.from_frame(table, candidate_columns=[name]), delta=0.1).policy()
    assert policy.is_full_model
    assert policy.n_layers == (8 if name == "n_layers" else None)


@pytest.mark.parametrize("cost", ["seconds", "flops"])
def test_settings_that_differ_in_a_cost_are_not_said_to_make_no_difference(cost: str) -> None:
    message = calibrate(costed(**{cost: {math.inf: 3.0, 0.9: 2.0, 0.5: 1.0}}), delta=0.1).message
    assert "no difference" not in message


def test_what_was_the_same_is_named_and_nothing_else() -> None:
    same = dict.fromkeys((math.inf, 0.9, 0.5), 8.0)
    message = calibrate(
        costed(layers=same, seconds={math.inf: 3.0, 0.9: 2.0, 0.5: 1.0}), delta=0.1
    ).message
    assert "the same losses and layers on each of the prompts" in message
    assert "costs" not in message
    bare = calibrate(costed(), delta=0.1).message
    assert "the same losses on each of the prompts" in bare
    assert "no cost was recorded that would tell" in bare
    assert "no difference" in bare


def test_more_flops_than_the_full_model_save_nothing() -> None:
    message = calibrate(costed(flops={math.inf: 1.0, 0.9: 3.0, 0.5: 2.0}), delta=0.1).message
    assert "It saves nothing: 2 FLOPs a prompt, where the full model takes 1." in message


@pytest.mark.parametrize("seed", range(6))
def test_the_full_model_is_compared_on_the_prompts_that_were_tested(seed: int) -> None:
    """Each prompt is faster with exits; that half of them which the pilot takes may be faster still."""
    seconds = np.exp(np.random.default_rng(seed).normal(0, 1.5, 200))
    rows = [
        {
            "prompt": f"{seed}-{i}",
            "threshold": t,
            "dissimilarity": 0.0,
            "seconds": s * (1.0 if t == math.inf else 0.98),
        }
        for i, s in enumerate(seconds)
        for t in (math.inf, 0.9, 0.5)
    ]
    found = calibrate(
        Runs.from_frame(pd.DataFrame(rows)), delta=0.1, procedure="pilot_order", pilot_fraction=0.5
    )
    assert found.chosen["seconds"] == pytest.approx(0.98 * found.full_costs["seconds"])
    assert "slower" not in found.message


def test_costs_over_requests_are_those_of_the_prompts_that_were_tested() -> None:
    cluster = np.repeat(np.arange(90), np.tile([1, 2, 6], 30))
    runs = Runs.from_arrays(
        thresholds=[math.inf, 0.9, 0.5],
        cluster=cluster,
        dissimilarity=np.zeros((len(cluster), 3)),
        layers=np.tile([8.0, 4.0, 3.0], (len(cluster), 1)),
    )
    found = calibrate(
        runs,
        delta=0.3,
        weighting="requests",
        max_cluster=6,
        procedure="pilot_order",
        pilot_fraction=0.3,
    )
    assert found.full_costs["layers"] == pytest.approx(8.0)
    np.testing.assert_allclose(np.sort(found.table["layers"]), [3.0, 4.0])


def test_numbers_of_the_sentence_are_not_rounded_to_others() -> None:
    table = varied("variant", ["a"], n=2000).replace(
        {"threshold": {0.9: 0.99999999, 0.5: 0.9999999}}
    )
    runs = Runs.from_frame(table)
    found = calibrate(runs, delta=0.10000049, epsilon=1e-8)
    assert "with probability at least 1 - 1e-08 over" in found.message
    assert "at threshold 0.9999999 the" in found.message
    assert "is at most 0.10000049 (" in found.message
    assert (
        "with probability at least 0.969603 over" in calibrate(runs, delta=0.1, attempt=1).message
    )  # .96960364...
    assert "with probability at least 0.95 over" in calibrate(runs, delta=0.1).message


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
