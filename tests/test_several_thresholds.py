"""Candidates of several thresholds: of a cascade's stages, a vector along the exits, "confident enough" and "give up"."""

import json
import math
import re

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import allowed
from riskcal import (
    Decaying,
    ExitPolicy,
    RiskcalError,
    Runs,
    Traces,
    calibrate,
    load_example,
    replay_arrays,
    replay_traces,
)

values = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, math.nan])
uppers = st.sampled_from([0.45, 0.65, 0.85, math.inf])
lowers = st.sampled_from([-0.5, 0.05, 0.2])


def leaves(row, upper, lower, flip, min_layer=1):
    """The rule in words, for one row and candidate."""
    sign = -1 if flip else 1
    for exit_ in range(min_layer, len(row)):
        value, enough, hopeless = sign * row[exit_ - 1], upper[exit_ - 1], lower[exit_ - 1]
        if (enough < math.inf and value >= sign * enough) or value <= sign * hopeless:
            return exit_
    return len(row)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(values, min_size=1, max_size=4), min_size=2, max_size=8),
    st.lists(st.lists(uppers, min_size=3, max_size=3), min_size=1, max_size=4),
    lowers,
    st.booleans(),
    st.booleans(),
)
def test_a_replay_of_vectors_is_a_plain_loop(rows, vectors, low, give_up, flip):
    rows = [*rows, [0.4] * 4]  # so that there are three exits before the last
    vectors = [v for i, v in enumerate(vectors) if min(v) < math.inf and v not in vectors[:i]]
    if not vectors:
        return
    upper = np.array(vectors)
    lower = np.full(upper.shape, 1.5 if flip else low)
    loss = [np.linspace(1, 0, len(row)) for row in rows]
    more = {"give_up": lower} if give_up else {}
    never = np.full(3, math.inf if flip else -math.inf)
    _, exits = replay_arrays(rows, loss, upper, lower_is_stricter=flip, **more)
    expected = [
        [leaves(row, u, w if give_up else never, flip) for u, w in zip(upper, lower, strict=True)]
        for row in rows
    ]
    assert exits.tolist() == expected
    traces = Traces.from_arrays(
        prompt=np.arange(len(rows)), position=np.zeros(len(rows), int), confidence=rows, loss=loss
    )
    runs = replay_traces(traces, upper, exact=True, lower_is_stricter=flip, **more)
    named = runs.candidates["threshold"].astype(int).to_list()
    order = [len(upper) - number for number in named]  # k is the first, 1 the last
    assert runs.values["layers"].tolist() == np.array(expected)[runs.prompts][:, order].tolist()
    again = Runs.from_frame(runs.to_frame(), candidate_columns=["give_up"] if give_up else [])
    assert again.digest() == runs.digest()


def test_a_vector_of_equal_thresholds_is_one_threshold():
    rng = np.random.default_rng(0)
    confidence, loss = rng.random((200, 4)), rng.random((200, 4))
    one = replay_arrays(confidence, loss, [0.9, 0.5], min_layer=2)
    for width in (3, 4):  # with or without the last exit, which takes whatever is left
        same = replay_arrays(
            confidence, loss, np.repeat([[0.9], [0.5]], width, axis=1), min_layer=2
        )
        assert np.array_equal(one[1], same[1])
        assert np.array_equal(one[0], same[0])


def cascade(n: int = 300) -> pd.DataFrame:
    """Only where the second stage is strict is the cascade right."""
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        [
            {
                "prompt": f"p{i}",
                "threshold": a,
                "threshold_2": b,
                "dissimilarity": float(rng.random() < (0.4 if b < 0.5 else 0.01)),
                "price": a + b,
            }
            for i in range(n)
            for a in (0.9, 0.5)
            for b in (0.8, 0.2)
        ]
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"procedure": "pareto"}, {"procedure": "fixed_sequence", "order": [1, 3, 0, 2]}],
    ids=["holm", "pareto", "a preregistered order"],
)
def test_a_threshold_per_stage_goes_from_records_into_the_policy(tmp_path, options):
    path = tmp_path / "cascade.jsonl"
    cascade().to_json(path, orient="records", lines=True)
    runs = Runs.read(path, candidate_columns=["threshold_2"], costs=["price"])
    calibration = calibrate(runs, delta=0.1, cost="price", **options)
    calibration.policy().save(tmp_path / "policy.json")
    policy = ExitPolicy.load(tmp_path / "policy.json")
    assert (policy.threshold, policy.coordinates) == (0.5, {"threshold_2": 0.8})
    assert policy.certificate.procedure == options.get("procedure", "holm")
    assert (policy.certificate.preregistered is not None) == ("order" in options)
    with pytest.raises(RiskcalError, match="measure: the certified policy does not name it"):
        policy.named()


VECTORS = {3.0: [0.9, 0.8], 2.0: [0.7, None], 1.0: ["full", 0.5]}
WRITTEN = {
    "lists": lambda v: v,
    "objects": lambda v: {str(i): t for i, t in enumerate(v, 1) if isinstance(t, float)},
    "text": json.dumps,
    "an array with Arrow's null": lambda v: np.array(
        [math.nan if t is None else math.inf if t == "full" else t for t in v]
    ),
}


def path_of_vectors(write, *, n=120) -> pd.DataFrame:
    rows = [
        {
            "prompt": f"p{i}",
            "threshold": t,
            "thresholds": write(v),
            "dissimilarity": 0.4 * (t < 2),
            "layers": t,
        }
        for i in range(n)
        for t, v in VECTORS.items()
    ]
    rows += [
        {
            "prompt": f"p{i}",
            "threshold": "full",
            "thresholds": "full",
            "dissimilarity": 0.0,
            "layers": 4.0,
        }
        for i in range(n)
    ]
    return pd.DataFrame(rows)


def test_a_null_in_a_vector_is_one_in_every_format(tmp_path):
    frame = path_of_vectors(lambda v: [math.inf if t == "full" else t for t in v], n=3)
    frame = frame[frame["threshold"] != "full"].astype({"threshold": float})
    frame.to_json(tmp_path / "runs.jsonl", orient="records", lines=True)
    table = pa.Table.from_pandas(frame)
    pq.write_table(table, tmp_path / "runs.parquet")
    found = {Runs.from_frame(table).digest(), Runs.from_frame(pl.DataFrame(table)).digest()}
    assert found == {Runs.read(tmp_path / f"runs.{end}").digest() for end in ("jsonl", "parquet")}


def test_a_stage_that_is_never_taken_is_filled_in_as_told(tmp_path):
    frame = cascade(40).assign(threshold_2=lambda f: f["threshold_2"].mask(f["threshold_2"] > 0.5))
    full = frame.drop_duplicates("prompt").assign(threshold=math.inf, dissimilarity=0.0)
    frame = pd.concat([frame, full.assign(threshold_2=math.nan)], ignore_index=True)
    named = {"candidate_columns": ["threshold_2"], "costs": ["price"]}
    with pytest.raises(RiskcalError, match=r"threshold_2: missing at row 0 .*Fill it in \('full'"):
        Runs.from_frame(frame, **named)
    lacking = frame["threshold_2"].isna() & (frame["threshold"] < math.inf)
    frame["threshold_2"] = frame["threshold_2"].astype(object).mask(lacking, "full")
    frame.to_csv(tmp_path / "runs.csv", index=False)
    for runs in (Runs.from_frame(frame, **named), Runs.read(tmp_path / "runs.csv", **named)):
        assert runs.candidates["threshold_2"].tolist() == [0.2, math.inf] * 2


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
def test_vectors_of_records_fill_the_field_of_the_policy(written):
    runs = Runs.from_frame(path_of_vectors(written))
    assert runs.k == 3
    assert runs.candidates["thresholds"].map(json.loads).to_list() == [
        {"1": 0.9, "2": 0.8},
        {"1": 0.7},
        {"2": 0.5},
    ]
    calibration = calibrate(runs, delta=0.1)
    policy = calibration.policy()
    assert policy.thresholds == {1: 0.7}
    assert policy.threshold == math.inf
    assert policy.coordinates is None
    nothing = calibrate(runs, delta=0.001, epsilon=1e-9).policy()
    assert nothing.is_full_model


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_files_keep_vectors(tmp_path, ending):
    runs = Runs.from_frame(path_of_vectors(WRITTEN["lists"]))
    runs.write(tmp_path / f"runs.{ending}")
    assert Runs.read(tmp_path / f"runs.{ending}").digest() == runs.digest()


@pytest.mark.parametrize(
    ("cell", "named"),
    [
        (0.9, "thresholds: 0.9 at row 0 is neither a list"),
        ("often", "thresholds: 'often' at row 0 is neither a list"),
        ([0.9, math.nan], "thresholds: layer 2 at row 0: is NaN"),
        ([True, 0.2], r"thresholds: \[True, 0.2\] at row 0; give a number for each layer"),
        ({"0": 0.2}, "give a number for each layer, from 1"),
        ([10**400], "thresholds: layer 1 at row 0: 1000"),
        ([0.9, "sure"], "thresholds: layer 2 at row 0: 'sure' is not a number"),
        ([-math.inf], "layer 1 at row 0: -inf is no threshold"),
        ("[" * 10**5, "is neither a list"),
        ({"9" * 5000: 0.9}, "give a number for each layer"),
        ([None, "full"], "at row 0 exits nowhere; that is the full model, threshold 'full'"),
    ],
)
def test_vectors_that_cannot_be_are_refused(cell, named):
    frame = pd.DataFrame(
        {"prompt": [1, 2], "threshold": 1.0, "thresholds": [cell, cell], "dissimilarity": 0.0}
    )
    with pytest.raises(RiskcalError, match=named):
        Runs.from_frame(frame)


def requests(n: int, seed: int = 0) -> Traces:
    """A first stage that is right where its score is far from one half, and a second that always is."""
    rng = np.random.default_rng(seed)
    score = rng.random(n)
    wrong = rng.random(n) < np.where(abs(score - 0.5) < 0.3, 0.6, 0.02)
    return Traces.from_arrays(
        prompt=[f"r{i}" for i in range(n)],
        position=np.zeros(n, int),
        confidence=np.c_[score, np.ones(n)],
        agrees=np.c_[~wrong, np.ones(n, bool)],
        cost={"price": [1.0, 11.0]},
    )


def test_a_pair_of_thresholds_is_certified_and_stands_in_the_policy():
    pairs = {"thresholds": [0.95, 0.85, 0.6], "give_up": [0.05, 0.15, 0.4]}
    runs = replay_traces(requests(600), exact=True, **pairs)
    assert runs.candidates["give_up"].tolist() == [0.05, 0.15, 0.4]
    calibration = calibrate(runs, delta=0.1, cost="price")
    policy = calibration.policy()
    assert (policy.threshold, policy.coordinates) == (0.85, {"give_up": 0.15})
    assert calibration.chosen["price"] == pytest.approx(1 + 10 * 0.7, abs=0.5)
    # one threshold, two ways to give up
    same_upper = replay_traces(requests(600), [0.9, 0.9], exact=True, give_up=[0.1, 0.2])
    assert same_upper.k == 2
    assert (same_upper.values["layers"][:, 0] >= same_upper.values["layers"][:, 1]).all()


def test_vectors_of_a_replay_are_what_the_policy_says():
    runs = replay_traces(requests(300), [[0.97], [0.9]], exact=True)
    assert runs.candidates["thresholds"].tolist() == ['{"1": 0.97}', '{"1": 0.9}']
    assert calibrate(runs, delta=0.1).policy().thresholds == {1: 0.9}


def test_a_message_names_the_vector_and_not_the_number_that_stands_for_it():
    cascade = load_example("cascade")
    runs = replay_traces(cascade, [[0.9, 0.8], [0.7, 0.6]], exact=True)
    message = calibrate(runs, delta=0.1).message
    assert re.search(r"prompts, at thresholds \{\"1\": 0\.\d, \"2\": 0\.\d\} the expected", message)


def test_false_certificates_of_pairs_are_rare():
    """Both pairs have a true loss of exactly delta: at most epsilon plus three standard errors of 200 draws."""
    rng, draws, n, delta, epsilon = np.random.default_rng(0), 200, 100, 0.2, 0.1
    score = rng.random(draws * n)
    # where both pairs leave; the second leaves beyond, where it is never wrong
    far = abs(score - 0.5) >= 0.2
    wrong = far & (rng.random(draws * n) < delta / 0.6)
    traces = Traces.from_arrays(
        prompt=rng.permutation(draws * n) + 10**6,
        position=np.zeros(draws * n, int),
        confidence=np.c_[score, np.zeros(draws * n)],
        loss=np.c_[wrong, np.zeros(draws * n)],
    )
    runs = replay_traces(traces, [0.7, 0.6], exact=True, give_up=[0.3, 0.4])
    false = sum(
        calibrate(runs.take(np.arange(first, first + n)), delta=delta, epsilon=epsilon).certified
        for first in range(0, draws * n, n)
    )
    assert 0 < false / draws <= allowed(epsilon, draws)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"thresholds": [0.9, 0.5], "give_up": [0.1]}, "give_up: 1 candidates, but thresholds 2"),
        (
            {"thresholds": [0.9], "give_up": [0.9]},
            "give_up: 0.9 of candidate 0 is not below its threshold 0.9",
        ),
        (
            {"thresholds": [0.1], "give_up": [0.1], "lower_is_stricter": True},
            "is not above its threshold",
        ),
        ({"thresholds": [0.9], "give_up": [-math.inf]}, "give_up: -inf at index"),
        (
            {"thresholds": [0.9, 0.9], "give_up": [0.1, 0.1]},
            "thresholds: candidate 1 is given more than once",
        ),
        (
            {"thresholds": [[0.9, 0.8], [0.9, 0.8]]},
            "thresholds: candidate 1 is given more than once",
        ),
        ({"thresholds": [[0.9] * 5]}, r"thresholds: has shape \(1, 5\); give \(k,\), or \(k, 2\)"),
        ({"thresholds": [[math.inf, math.inf]]}, "thresholds: candidate 0 exits nowhere"),
        ({"thresholds": [math.inf], "give_up": [0.1]}, "thresholds: inf at index"),
        ({"thresholds": [[math.nan, 0.5]]}, "thresholds: nan at index"),
        (
            {"thresholds": [[0.9, 0.5]], "schedule": Decaying(), "position": [0, 1]},
            "schedule: decay is for",
        ),
    ],
)
def test_what_is_no_candidate_is_refused(arguments, named):
    with pytest.raises(RiskcalError, match=named):
        replay_arrays(np.full((2, 3), 0.45), np.zeros((2, 3)), **arguments)
