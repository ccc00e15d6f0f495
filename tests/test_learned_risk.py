"""A learned risk: maps that are the best falling ones, thresholds that stand for them, prompts that are never used twice."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import riskcal
from helpers import allowed
from riskcal import ExitPolicy, RiskcalError, Runs, Traces, calibrate
from riskcal.heads import LearnedRisk, RiskMap, learn_risk
from riskcal.serving import PolicyBook


def named(n):
    return np.array([f"request-{i}" for i in range(n)])


def traces_of(confidence, agrees, prompt=None):
    confidence = np.asarray(confidence)
    ids = named(len(confidence)) if prompt is None else prompt
    position = np.arange(len(confidence))
    return Traces.from_arrays(prompt=ids, position=position, confidence=confidence, agrees=agrees)


def world(seed, n=400, exits=3):
    """Requests of one decision, wrong with probability (1 - confidence) / 2 at each exit."""
    rng = np.random.default_rng(seed)
    confidence = rng.random((n, exits)).astype(np.float32)
    agrees = rng.random((n, exits)) >= (1 - confidence) / 2
    agrees[:, -1] = True
    return traces_of(confidence, agrees, [f"{seed}-{i}" for i in range(n)])


@pytest.fixture(scope="module")
def g2p():
    return riskcal.load_example("g2p-traces")


@pytest.fixture(scope="module")
def of_g2p(g2p):
    return learn_risk(g2p, measure="softmax")


def falling(means, weights):
    """The antitonic fit by its min-max formula."""
    k = len(means)

    def mean(a, b):
        return np.average(means[a : b + 1], weights=weights[a : b + 1])

    return [min(max(mean(a, b) for b in range(i, k)) for a in range(i + 1)) for i in range(k)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.1, 0.3, 0.5, 0.9, math.nan]), st.booleans()),
        min_size=8,
        max_size=40,
    )
)
def test_each_map_is_the_best_falling_one_with_one_more_error_at_the_top(tokens):
    confidence, agrees = np.array([c for c, _ in tokens]), np.array([a for _, a in tokens])
    ids = named(len(tokens))
    fitted = riskcal.records.fitted_on(ids, 0.5)
    if fitted.sum() < 2 or (~fitted).sum() < 2:
        return
    risk = learn_risk(
        traces_of(np.c_[confidence, np.ones(len(ids))], np.c_[agrees, np.ones(len(ids), bool)]),
        fit_fraction=0.5,
    )
    known = fitted & ~np.isnan(confidence)
    values = np.unique(confidence[known])
    if not values.size:
        assert risk.maps == (RiskMap(confidence=(), risk=()),)
        return
    errors = np.array([(~agrees[known])[confidence[known] == v].sum() for v in values], float)
    tokens_at = np.array([(confidence[known] == v).sum() for v in values], float)
    errors[-1], tokens_at[-1] = errors[-1] + 1, tokens_at[-1] + 1
    expected = falling(errors / tokens_at, tokens_at)
    assert risk.risk(values[:, None])[:, 0] == pytest.approx(expected)
    assert risk.risk([[values[0] - 0.01], [math.nan]])[0, 0] == 1.0
    assert math.isnan(risk.risk([math.nan])[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.floats(0.01, 0.6))
def test_a_token_leaves_exactly_where_its_risk_is_at_most_max_risk(seed, max_risk):
    traces = world(seed, n=60)
    risk = learn_risk(traces, fit_fraction=0.5)
    thresholds = risk.thresholds(max_risk)
    steps = np.array([*risk.maps[0].confidence, *risk.maps[1].confidence])
    grid = np.unique(
        np.r_[traces.confidence.ravel(), steps, np.nextafter(steps, 0), np.nan, -1.0, 2.0]
    )
    by_risk = risk.risk(np.c_[grid, grid]) <= max_risk
    assert np.array_equal(by_risk, np.c_[grid, grid] >= thresholds)
    assert (risk.thresholds(min(1.5 * max_risk, 0.99)) <= thresholds).all()
    if np.isinf(thresholds).all():
        with pytest.raises(RiskcalError, match="lets no token leave"):
            risk.policy(max_risk)
        return
    needed = risk.policy(max_risk).exit_thresholds(3, 1)[0]  # as decoders compare them, in float32
    seen = traces.confidence
    assert np.array_equal(risk.risk(seen) <= max_risk, seen[:, :2] >= needed[:2])


def test_only_the_share_that_is_set_aside_is_looked_at_and_it_is_refused_in_calibration(tmp_path):
    traces = world(0)
    risk = learn_risk(traces)
    aside = risk.fitted_on(traces.prompt)
    assert risk.fit_n == aside.sum()
    assert 0.2 < aside.mean() < 0.4
    other = traces.confidence.copy()
    other[~aside] = 0.5
    assert learn_risk(traces_of(other, traces.agrees, traces.prompt)) == risk

    runs = risk.replay(traces, [0.05, 0.1, 0.2], exact=True)
    assert not risk.fitted_on(runs.prompts).any()
    assert runs.n == (~aside).sum()
    assert calibrate(runs, delta=0.3).certified
    vectors = [risk.thresholds(r) for r in (0.05, 0.1, 0.2)]
    everyone = riskcal.replay_traces(traces, vectors, exact=True)
    table = everyone.to_frame().drop(columns=["thresholds"])
    by_number = {float(3 - j): risk.policy(r).to_columns() for j, r in enumerate((0.05, 0.1, 0.2))}
    for name in ("thresholds", "learned"):
        table[name] = [by_number[t][name] if t in by_number else None for t in table["threshold"]]
    table["threshold"] = [
        by_number[t]["threshold"] if t in by_number else "full" for t in table["threshold"]
    ]
    table.to_json(tmp_path / "all.jsonl", orient="records", lines=True)
    read = Runs.read(tmp_path / "all.jsonl")
    inside = read.prompts[risk.fitted_on(read.prompts)]
    named = rf"^prompt: {inside[0]!r} belongs to the share of 0.3 .*\({len(inside)} such.*LearnedRisk.rest"
    with pytest.raises(RiskcalError, match=named):
        calibrate(read, delta=0.3)
    with pytest.raises(RiskcalError, match="belongs to the share"):
        riskcal.run_trials(read, deltas=[0.3], n_trials=2)
    kept = table[~risk.fitted_on(table["prompt"])]
    assert Runs.from_frame(kept).digest() == runs.digest()
    with pytest.raises(RiskcalError, match="cluster: a learned risk"):
        calibrate(Runs.from_frame(kept.assign(cluster=kept["prompt"])), delta=0.3)


def test_a_certified_policy_says_which_risk_it_runs_and_a_hand_cannot_change_it(
    tmp_path, g2p, of_g2p
):
    runs = of_g2p.replay(g2p, np.arange(0.02, 0.41, 0.02), exact=True)
    calibration = calibrate(runs, delta=0.05)
    policy = calibration.policy(cache="project", batching="diverge")
    assert calibration.table["certified"].tolist() == sorted(
        calibration.table["certified"], reverse=True
    )
    assert f"at max_risk {policy.learned.max_risk:g} the expected" in calibration.message
    assert policy == of_g2p.policy(
        policy.learned.max_risk, cache="project", batching="diverge"
    ).certified(policy.certificate)
    assert riskcal.verify(policy, runs).agrees
    policy.save(tmp_path / "policy.json")
    assert ExitPolicy.load(tmp_path / "policy.json") == policy
    assert calibration.procedure == "fixed_sequence"
    assert calibration.coordinates == ["threshold"]
    assert "{" not in repr(calibration) + calibration._repr_html_()
    assert riskcal.run_trials(runs, deltas=[0.1], n_trials=3)["certified"].all()
    told = json.loads((tmp_path / "policy.json").read_text())
    told["learned"]["max_risk"] = 0.3
    (tmp_path / "policy.json").write_text(json.dumps(told))
    with pytest.raises(RiskcalError, match="issued for other settings"):
        ExitPolicy.load(tmp_path / "policy.json")
    with pytest.raises(RiskcalError, match="learned: says what thresholds stand for"):
        ExitPolicy(threshold=0.5, learned=policy.learned)
    runs.write(tmp_path / "runs.parquet")
    again = calibrate(Runs.read(tmp_path / "runs.parquet"), delta=0.05, procedure="pareto")
    assert again.policy().learned is not None


def test_tasks_have_risks_of_their_own_and_a_book_routes_them(g2p):
    longer = np.array([len(word) > 8 for word in g2p.prompt])
    risks, policies = {}, {}
    for task, rows in {"long": longer, "short": ~longer}.items():
        traces = traces_of(g2p.confidence[rows], g2p.agrees[rows], g2p.prompt[rows])
        risks[task] = learn_risk(traces, measure="softmax", fit_fraction=0.4)
        runs = risks[task].replay(traces, np.arange(0.02, 0.3, 0.02), exact=True)
        found = calibrate(runs, delta=0.1, epsilon=0.025)
        policies[task] = found.policy()
    book = PolicyBook(policies)
    assert risks["long"] != risks["short"]
    assert {task: book.route(task).policy.learned.risk for task in risks} == {
        t: r.digest() for t, r in risks.items()
    }
    assert book.route("other").policy.is_full_model


def test_a_risk_goes_through_its_file_and_a_map_that_rises_is_refused(tmp_path, of_g2p):
    of_g2p.save(tmp_path / "risk.json")
    again = LearnedRisk.load(tmp_path / "risk.json")
    assert again == of_g2p
    assert again.digest() == of_g2p.digest()
    told = json.loads((tmp_path / "risk.json").read_text())
    told["maps"][0]["risk"][0] = 0.0
    (tmp_path / "risk.json").write_text(json.dumps(told))
    with pytest.raises(RiskcalError, match=r"risk.json: .*descend"):
        LearnedRisk.load(tmp_path / "risk.json")
    (tmp_path / "risk.json").write_text("[1]")
    with pytest.raises(RiskcalError, match="is not a learned risk; it must hold one JSON object"):
        LearnedRisk.load(tmp_path / "risk.json")
    with pytest.raises(RiskcalError, match="cannot be read"):
        LearnedRisk.load(tmp_path / "none.json")


def test_heads_after_some_layers_have_the_thresholds_of_these_layers():
    risk = learn_risk(world(1), layers=[4, 8], measure="max")
    policy = risk.policy(0.2, n_layers=12)
    assert set(policy.thresholds) <= {4, 8}
    assert policy.measure == "max"
    assert json.loads(policy.to_columns()["thresholds"]).keys() == {
        str(k) for k in policy.thresholds
    }


def test_losses_and_costs_of_traces_are_taken_too():
    rng = np.random.default_rng(0)
    confidence = rng.random((300, 3))
    loss = np.clip(1 - confidence, 0, 1) * [1, 0.5, 0]
    traces = Traces.from_arrays(
        prompt=named(300),
        position=np.zeros(300, int),
        confidence=confidence,
        loss=loss,
        cost={"price": [1.0, 3.0, 9.0]},
    )
    risk = learn_risk(traces)
    assert risk.risk([[0.9, 0.9]])[0] == pytest.approx([0.1, 0.05], abs=0.05)
    runs = risk.replay(traces, [0.1, 0.4], exact=True)
    assert runs.costs == ["layers", "tokens", "price"]
    assert set(np.unique(runs.values["price"])) <= {1.0, 3.0, 9.0}


@pytest.mark.parametrize(
    ("traces", "message"),
    [
        (traces_of(np.ones((9, 1)), np.ones((9, 1), bool)), "same exits, two at least"),
        (
            traces_of(np.ones((9, 3)), np.ones((9, 3), bool), np.arange(9)),
            "only number the prompts",
        ),
        (traces_of(np.ones((3, 3)), np.ones((3, 3), bool), ["a", "b", "c"]), "needs at least two"),
        (traces_of(np.full((40, 3), np.inf), np.ones((40, 3), bool)), "confidence: inf"),
    ],
    ids=["one exit", "numbers", "too few", "infinite"],
)
def test_what_no_risk_can_be_learned_of_is_refused(traces, message):
    with pytest.raises(RiskcalError, match=message):
        learn_risk(traces)


def test_arguments_of_a_risk_are_refused_by_name(of_g2p):
    with pytest.raises(RiskcalError, match=r"max_risk: 0.0001 lets no token leave at any exit"):
        of_g2p.policy(0.0001)
    with pytest.raises(RiskcalError, match="lets no token leave"):
        of_g2p.replay(riskcal.load_example("g2p-traces"), [0.0001], exact=True)
    with pytest.raises(RiskcalError, match="traces: have 3 exits"):
        of_g2p.replay(world(0), [0.1])
    with pytest.raises(RiskcalError, match="the last axis must be the 7 exits"):
        of_g2p.risk([0.5])
    with pytest.raises(RiskcalError, match=r"max_risk: 1.5"):
        of_g2p.thresholds(1.5)


def test_false_certificates_stay_within_epsilon_whatever_was_learned():
    # one early exit, wrong with probability (1 - c) / 2 at a confidence c: above a threshold t the loss is (1 - t)^2 / 4
    delta, epsilon, draws, wrong, certified = 0.05, 0.1, 200, 0, 0
    for seed in range(draws):
        traces = world(seed, n=200, exits=2)
        risk = learn_risk(traces)
        runs = risk.replay(traces, np.arange(0.02, 0.5, 0.04), exact=True)
        found = calibrate(runs, delta=delta, epsilon=epsilon)
        if found.certified:
            certified += 1
            threshold = found.policy().thresholds[1]
            wrong += (1 - max(threshold, 0.0)) ** 2 / 4 > delta
    assert certified > 0.3 * draws
    assert wrong / draws <= allowed(epsilon, draws)


def test_a_few_candidates_of_a_learned_risk_are_told_by_their_number_and_without_the_maps():
    traces = world(1, n=200)
    runs = learn_risk(traces).replay(traces, [0.1, 0.2], exact=True)
    found = calibrate(runs, delta=0.5)
    assert "at max_risk 0.2 the expected" in found.message
    assert {"learned", "thresholds"} <= set(found.table)
    for shown in (repr(found), found._repr_html_()):
        assert "{" not in shown
        assert "learned" not in shown


def test_of_several_learned_risks_the_largest_share_that_was_fitted_on_is_refused():
    traces = world(1, n=200)
    risk = learn_risk(traces, fit_fraction=0.3)
    table = risk.replay(traces, [0.1, 0.2], exact=True).to_frame()
    other = table["learned"].str.replace('"fit_fraction":0.3', '"fit_fraction":0.6')
    table["learned"] = other.where(table["threshold"] == 0.8, table["learned"])
    with pytest.raises(RiskcalError, match=r"belongs to the share of 0.6 that the risk was fitted"):
        calibrate(Runs.from_frame(table), delta=0.5)
