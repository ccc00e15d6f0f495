import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import riskcal
from riskcal import (
    Certificate,
    Constant,
    Contrast,
    Decaying,
    ExitPolicy,
    Pruning,
    RiskcalError,
    Runs,
    Sampling,
    _replacing,
    calibrate,
    load_example,
)

thresholds = (
    st.floats(0, 1)
    | st.floats(-100, 100)
    | st.sampled_from([0.0, 1.0, math.inf, 5e-324, 1e300, -1e300])
)
schedules = st.just(Constant()) | st.builds(
    Decaying,
    temperature=st.floats(0, 30),
    max_length=st.integers(1, 200),
    form=st.sampled_from(["paper", "t5x"]),
)
certificates = st.sampled_from([0.0, -1.0]).flatmap(lambda lower: _certificates(lower))


def _certificates(lower):
    return st.builds(
        Certificate,
        delta=st.floats(lower, 1, exclude_min=True, exclude_max=True),
        epsilon=st.floats(0.1, 0.5),
        epsilon_spent=st.floats(0.01, 0.1),
        attempt=st.none() | st.integers(1, 9),
        objective=st.sampled_from(["textual", "risk", "risk_clipped", "losses"]),
        lower=st.just(lower),
        upper=st.just(1.0),
        test=st.just("betting"),
        procedure=st.sampled_from(["fixed_sequence", "holm"]),
        starts=st.integers(1, 5),
        n=st.integers(2, 10**9),
        k=st.integers(1, 1000),
        pvalue=st.none() | st.floats(0, 0.01),
        records_digest=st.text("0123456789abcdef", min_size=32, max_size=32),
        versions=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
    )


@st.composite
def policies(draw):
    fields = {
        "measure": draw(st.sampled_from(["softmax", "state", "Zuversicht ü"])),
        "schedule": draw(schedules),
        "min_layer": draw(st.integers(1, 4)),
        "max_new_tokens": draw(st.none() | st.integers(1, 500)),
        "certificate": draw(st.none() | certificates),
    }
    if draw(st.booleans()):
        return ExitPolicy(threshold=draw(thresholds), **fields)
    return ExitPolicy(
        thresholds=draw(st.dictionaries(st.integers(1, 6), thresholds, max_size=4)), **fields
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "policy.json"


# Files


def test_a_policy_comes_back_from_its_file_as_it_was(tmp_path_factory):
    path = tmp_path_factory.mktemp("policies") / "policy.json"

    @given(policies())
    def check(policy):
        policy.save(path)
        back = ExitPolicy.load(path)
        assert back == policy
        assert (back.exit_thresholds(6, 5) == policy.exit_thresholds(6, 5)).all()

    check()


@given(policies())
def test_the_json_holds_no_infinity_and_no_nan(policy):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    fields = json.loads(policy.model_dump_json(), parse_constant=refuse)
    assert fields["schema_version"] == 1
    assert (fields["threshold"] == "full") == math.isinf(policy.threshold)


def test_the_full_model_is_full_in_json_and_inf_in_python(path):
    ExitPolicy.full_model().save(path)
    assert json.loads(path.read_text())["threshold"] == "full"
    for policy in (
        ExitPolicy.load(path),
        ExitPolicy(threshold=math.inf),
        ExitPolicy(threshold="full"),
        ExitPolicy(),
    ):
        assert policy.threshold == math.inf
        assert policy.is_full_model
        assert policy == ExitPolicy.full_model()


@pytest.mark.parametrize("value", [1.0, 1, 2.0, 1e300, np.float32(1.0), np.float64(1.0)], ids=repr)
def test_no_finite_threshold_is_the_full_model(value, path):
    policy = ExitPolicy(threshold=value)
    assert not policy.is_full_model
    policy.save(path)
    assert json.loads(path.read_text())["threshold"] == float(value)
    assert not ExitPolicy.load(path).is_full_model
    if float(value) == 1.0:
        assert (policy.exit_thresholds(4, 2)[:, :3] == 1.0).all()


def test_a_policy_per_head_is_the_full_model_only_if_no_head_can_exit():
    assert ExitPolicy(thresholds={}).is_full_model
    assert ExitPolicy(thresholds={2: math.inf, 3: "full"}).is_full_model
    assert not ExitPolicy(thresholds={2: math.inf, 3: 1.0}).is_full_model


def test_an_unwritable_place_is_refused_and_a_failed_write_leaves_the_old_policy(path, monkeypatch):
    old = ExitPolicy(threshold=0.7)
    old.save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_replacing.os, "replace", fail)
        with pytest.raises(RiskcalError, match=r"policy\.json: cannot be written \(No space left"):
            ExitPolicy(threshold=0.1).save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(RiskcalError, match="cannot be written"):
        old.save(path.parent / "nowhere" / "policy.json")
    with pytest.raises(RiskcalError, match="cannot be written"):
        old.save(path.parent)


def test_a_write_that_breaks_half_way_leaves_the_old_policy(path, monkeypatch):
    ExitPolicy(threshold=0.7).save(path)
    before = path.read_bytes()

    def half(self, text, **_):
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "write_text", half)
        with pytest.raises(KeyboardInterrupt):
            ExitPolicy(threshold=0.1).save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"threshhold": 0.5}, "threshhold: is not a field"),
        ({"schema_version": 2}, "schema_version: "),
        ({"schema_version": 0}, "schema_version: "),
        ({"schema_version": "1"}, "schema_version: "),
        ({"threshold": math.nan}, "threshold: "),
        ({"threshold": -math.inf}, "threshold: "),
        ({"threshold": "0.5"}, "threshold: "),
        ({"threshold": True}, "threshold: "),
        ({"threshold": None}, "threshold: "),
        ({"threshold": "Full model"}, "threshold: "),
        ({"thresholds": {"0": 0.5}}, "thresholds.0"),
        ({"thresholds": {"x": 0.5}}, "thresholds.x"),
        ({"thresholds": {"2": math.nan}}, "thresholds.2: "),
        ({"threshold": 0.5, "thresholds": {"2": 0.5}}, "ExitPolicy: "),
        ({"min_layer": 0}, "min_layer: "),
        ({"min_layer": 1.5}, "min_layer: "),
        ({"max_new_tokens": 0}, "max_new_tokens: "),
        ({"measure": ""}, "measure: "),
        ({"measure": 3}, "measure: "),
        ({"schedule": {"kind": "cosine"}}, "schedule"),
        (
            {
                "schedule": {
                    "kind": "decaying",
                    "temperature": 4,
                    "max_length": 8,
                    "form": "paper",
                    "x": 1,
                }
            },
            "schedule.decaying.x",
        ),
        (
            {"schedule": {"kind": "decaying", "temperature": -4, "max_length": 8, "form": "paper"}},
            "schedule.decaying",
        ),
        (
            {"schedule": {"kind": "decaying", "temperature": math.nan, "max_length": 8}},
            "schedule.decaying",
        ),
        (
            {"schedule": {"kind": "constant", "temperature": 4}},
            "schedule.constant.temperature: is not a field",
        ),
        ({"certificate": {"delta": 0.1}}, "certificate.epsilon"),
    ],
)
def test_a_field_that_is_unknown_or_means_nothing_is_refused_by_name_in_files_and_in_python(
    change, named, path
):
    fields = json.loads(ExitPolicy().model_dump_json()) | change
    with pytest.raises(RiskcalError) as refusal:
        ExitPolicy(**fields)
    assert str(refusal.value).startswith(named)
    assert "\n" not in str(refusal.value)
    path.write_text(json.dumps(fields))  # writes NaN as NaN
    with pytest.raises(RiskcalError) as refusal:
        ExitPolicy.load(path)
    assert str(refusal.value).startswith(f"{path}: {named}")


@pytest.mark.parametrize("field", ["delta", "epsilon", "epsilon_spent", "lower", "upper", "pvalue"])
@pytest.mark.parametrize("value", [math.nan, math.inf, "x"])
def test_a_certificate_holds_finite_numbers(field, value, path):
    certificate = dict.fromkeys(
        ("delta", "epsilon", "epsilon_spent", "lower", "upper", "pvalue"), 0.5
    )
    certificate |= {
        "attempt": None,
        "objective": "textual",
        "test": "betting",
        "procedure": "holm",
        "starts": 1,
    }
    certificate |= {"n": 2, "k": 1, "records_digest": "", "versions": {}, "lower": 0, "upper": 1}
    assert Certificate(**certificate).n == 2
    path.write_text(json.dumps({"certificate": certificate | {field: value}}))
    with pytest.raises(RiskcalError, match=rf"certificate\.{field}\b"):
        ExitPolicy.load(path)


@pytest.mark.parametrize(
    ("edited", "named"),
    [
        ({"epsilon_spent": 0.2}, "epsilon_spent 0.2 is above epsilon 0.05"),
        ({"epsilon": 1.0}, r"certificate\.epsilon:"),
        ({"epsilon_spent": 0.0}, r"certificate\.epsilon_spent:"),
        ({"pvalue": 0.9}, "pvalue 0.9 is above epsilon_spent 0.05"),
        ({"pvalue": -0.1}, r"certificate\.pvalue"),
        ({"attempt": 0}, r"certificate\.attempt"),
        ({"delta": 7.0}, "delta 7 is not between the losses' bounds 0 and 1"),
        ({"lower": 0.1}, "delta 0.1 is not between"),
    ],
)
def test_a_certificate_with_figures_that_no_calibration_writes_is_refused(edited, named, path):
    """Its sentence would promise what nobody showed."""
    losses = np.zeros((60, 1))
    calibrate(losses, thresholds=[0.5], delta=0.1).policy().save(path)
    assert ExitPolicy.load(path).certificate.pvalue <= 0.05
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"certificate": written["certificate"] | edited}))
    with pytest.raises(RiskcalError, match=named):
        ExitPolicy.load(path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[1]", "is not a policy"),
        (b"null", "is not a policy"),
        (b"\xff\xfe", "is not JSON"),
    ],
)
def test_what_is_not_a_policy_is_refused_with_the_files_name(content, named, path):
    path.write_bytes(content)
    with pytest.raises(RiskcalError) as refusal:
        ExitPolicy.load(path)
    assert str(refusal.value).startswith(f"{path}: {named}")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for place in (tmp_path / "none.json", tmp_path):
        with pytest.raises(RiskcalError, match="cannot be read"):
            ExitPolicy.load(place)


def test_a_policy_cannot_be_changed():
    policy = ExitPolicy(threshold=0.5)
    with pytest.raises(ValueError, match="frozen"):
        policy.threshold = 0.1


# What a decoder is told


def test_thresholds_per_head_leave_unlisted_layers_closed_and_the_last_always_open():
    table = ExitPolicy(thresholds={2: 0.75, 4: 0.5, 5: math.inf}).exit_thresholds(6, 3)
    assert table.dtype == np.float32
    assert table.tolist() == [[math.inf, 0.75, math.inf, 0.5, math.inf, -math.inf]] * 3


def test_no_exit_before_the_first_allowed_layer():
    assert ExitPolicy(threshold=0.5, min_layer=3).exit_thresholds(4, 1).tolist() == [
        [math.inf, math.inf, 0.5, -math.inf]
    ]
    heads = ExitPolicy(thresholds={1: 0.25, 3: 0.5}, min_layer=2).exit_thresholds(4, 1)
    assert heads.tolist() == [[math.inf, math.inf, 0.5, -math.inf]]
    assert ExitPolicy(threshold=0.5, min_layer=4).exit_thresholds(4, 1).tolist() == [
        [math.inf] * 3 + [-math.inf]
    ]


def test_the_schedule_acts_on_every_head_by_position():
    schedule = Decaying(4.0, 8, "paper")
    table = ExitPolicy(thresholds={1: 0.9, 2: 0.4}, schedule=schedule).exit_thresholds(3, 20)
    for layer, threshold in ((0, 0.9), (1, 0.4)):
        assert table[:, layer] == pytest.approx(
            schedule.local_threshold(threshold, np.arange(20)), rel=1e-6
        )
    full = ExitPolicy(schedule=schedule).exit_thresholds(3, 20)
    assert np.isposinf(full[:, :2]).all()


def test_a_single_layer_is_the_last():
    assert ExitPolicy(threshold=0.9).exit_thresholds(1, 2).tolist() == [[-math.inf]] * 2


@given(
    thresholds,
    schedules,
    st.integers(0, 60),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.data(),
)
def test_float32_confidences_decide_as_the_float64_threshold_would(
    threshold, schedule, position, confidence, data
):
    exact = float(schedule.local_threshold(threshold, position))
    given_ = ExitPolicy(threshold=threshold, schedule=schedule).exit_thresholds(2, position + 1)[
        position, 0
    ]
    with np.errstate(over="ignore"):
        near = np.float32(exact)
    confidences = [
        np.float32(confidence),
        near,
        np.nextafter(near, np.float32(2)),
        np.nextafter(near, np.float32(-2)),
    ]
    confidences += [np.float32(x) for x in (0.0, 1.0, -1.0)]
    for value in confidences:
        if np.isfinite(value):
            assert bool(value >= given_) == (float(value) >= exact)
    assert not np.float32(math.nan) >= given_


@pytest.mark.parametrize(
    ("policy", "arguments", "named"),
    [
        (ExitPolicy(min_layer=5), (4, 3), "min_layer: 5 exceeds the model's 4 layers"),
        (
            ExitPolicy(thresholds={2: 0.5, 7: 0.5}),
            (4, 3),
            "thresholds: layer 7 exceeds the model's 4 layers",
        ),
        (ExitPolicy(), (0, 3), "n_layers: 0"),
        (ExitPolicy(), (4.0, 3), "n_layers: 4.0"),
        (ExitPolicy(), (4, -1), "length: -1"),
        (ExitPolicy(), (4, 2.5), "length: 2.5"),
    ],
)
def test_a_policy_that_does_not_fit_the_model_is_refused(policy, arguments, named):
    with pytest.raises(RiskcalError) as refusal:
        policy.exit_thresholds(*arguments)
    assert str(refusal.value).startswith(named)


def test_the_json_schema_takes_what_save_writes_and_names_every_field():
    schema = ExitPolicy.model_json_schema()
    assert set(schema["properties"]) == set(ExitPolicy.model_fields)
    assert schema["additionalProperties"] is False
    assert {"const": "full"} in schema["properties"]["threshold"]["anyOf"]


def test_every_field_survives_a_file(tmp_path):
    policy = ExitPolicy(
        threshold=0.5,
        measure="jsd",
        min_layer=2,
        pruning=Pruning("fixed", 60, 10),
        contrast=Contrast(alpha=0.2, alpha_decay=1.0, plausible="kept"),
        cache="deferred",
        max_pending=4,
        emits="last",
        batching="deepest",
        sampling=Sampling(temperature=0.7, top_p=0.9, seed=3),
        max_new_tokens=12,
        n_layers=8,
        weights="0123",
    )
    policy.save(tmp_path / "policy.json")
    assert ExitPolicy.load(tmp_path / "policy.json") == policy


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_pending": 3}, "max_pending"),
        ({"contrast": {"plausible": "kept"}}, "contrast"),
        ({"contrast": {"alpha": 0.0}}, "alpha"),
        ({"batching": "regroup", "cache": "deferred"}, "batching"),
        ({"cache": "none"}, "cache"),
        ({"sampling": {"temperature": 0.0}}, "temperature"),
        ({"sampling": {"top_p": 1.5}}, "top_p"),
        ({"pruning": {"form": "fixed", "smallest": 0}}, "smallest"),
        ({"pruning": {"kind": "fixed"}}, "kind"),
    ],
)
def test_settings_that_make_no_sense_are_named(fields, named):
    with pytest.raises(RiskcalError, match=named):
        ExitPolicy(threshold=0.5, **fields)


def test_another_depth_is_refused_by_name():
    with pytest.raises(
        RiskcalError, match="n_layers: the policy was made for 8 layers, the model has 12"
    ):
        ExitPolicy(threshold=0.5, n_layers=8).exit_thresholds(12, 4)


def test_the_static_policy_exits_at_its_layer_whatever_the_measure():
    table = ExitPolicy.static(3, measure="entropy").exit_thresholds(5, 2)
    assert np.isposinf(table[:, [0, 1, 3]]).all()
    assert (table[:, 2] < -1e30).all()


def test_records_carry_the_fields_that_have_no_column():
    policy = ExitPolicy(
        threshold=0.5,
        measure="max",
        pruning=Pruning("fixed", 60, 10),
        max_new_tokens=24,
        weights="ab",
    )
    policy = policy.named()
    table = pd.DataFrame(
        [
            {
                "prompt": i,
                "threshold": t,
                "measure": "max",
                "policy": policy.other_fields(),
                "dissimilarity": 0.0,
            }
            for i in range(100)
            for t in (0.5, 0.7)
        ]
    )
    calibrated = calibrate(Runs.from_frame(table), delta=0.1).policy()
    assert calibrated.model_copy(update={"certificate": None}) == policy
    with pytest.raises(RiskcalError, match="max_new_tokens: 30 is not the recorded 24"):
        calibrate(Runs.from_frame(table), delta=0.1).policy(max_new_tokens=30)
    with pytest.raises(RiskcalError, match="policy: the records hold 'nonsense'"):
        calibrate(Runs.from_frame(table.assign(policy="nonsense")), delta=0.1).policy()


@pytest.mark.parametrize(
    "field", ["threshold", "thresholds", "measure", "min_layer", "certificate", "schedule"]
)
def test_records_cannot_smuggle_in_what_was_not_tested(field):
    value = {"threshold": 0.01, "thresholds": {"1": 0.0}, "measure": "max", "min_layer": 1}.get(
        field
    )
    smuggled = json.dumps(
        {
            field: value
            if value is not None
            else {"kind": "constant"}
            if field == "schedule"
            else None
        }
    )
    table = pd.DataFrame(
        [
            {"prompt": i, "threshold": t, "policy": smuggled, "dissimilarity": 0.0}
            for i in range(100)
            for t in (0.5, 0.7)
        ]
    )
    said = f"policy: the records' column holds '{field}'"
    if field == "thresholds":  # which a column policy may hold, of one threshold each
        said = "thresholds: the column policy holds the same where threshold is 0.5 and where it is 0.7"
    with pytest.raises(RiskcalError, match=said):
        calibrate(Runs.from_frame(table), delta=0.1).policy()


def test_a_certificate_holds_for_the_settings_it_was_issued_for(tmp_path):
    policy = calibrate(load_example("g2p"), delta=0.1).policy(measure="softmax")
    path = tmp_path / "policy.json"
    policy.save(path)
    assert ExitPolicy.load(path) == policy
    changed = json.loads(path.read_text()) | {"threshold": 0.01}
    path.write_text(json.dumps(changed))
    with pytest.raises(RiskcalError, match="certificate: was issued for other settings than these"):
        ExitPolicy.load(path)
    path.write_text(json.dumps(changed | {"certificate": None}))
    assert ExitPolicy.load(path).threshold == 0.01


@given(policies())
def test_the_digest_of_a_policy_is_that_of_what_changes_tokens(policy):
    again = ExitPolicy(**json.loads(policy.model_dump_json()))
    assert (
        again.digest()
        == policy.digest()
        == policy.model_copy(update={"certificate": None}).digest()
    )
    assert policy.model_copy(update={"min_layer": policy.min_layer + 1}).digest() != policy.digest()
    named = policy.model_copy(update={"batching": "diverge"})
    assert named.model_copy(update={"batching": "regroup"}).digest() == named.digest()
    assert policy.model_copy(update={"batching": "deepest"}).digest() != policy.digest()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"schedule": Decaying(2.0, 40, "t5x"), "min_layer": 3, "cache": "copy"},
        {"pruning": Pruning("fixed"), "sampling": Sampling(seed=4), "dtype": "bfloat16"},
        {"coordinates": {"threshold_2": 0.25, "variant": "b", "fast": True}},
        {"weights": "0f", "config": {"eos_token_id": [1, 2]}, "batching": "regroup"},
    ],
)
def test_a_policys_columns_make_the_same_policy_again(settings):
    policies = [
        ExitPolicy(
            threshold=t,
            **({"measure": "top", "cache": "project", "batching": "diverge"} | settings),
        )
        for t in (0.9, 0.4)
    ]
    table = pd.DataFrame([policy.to_columns() for policy in policies])
    for policy, (_, row) in zip(policies, table.iterrows(), strict=True):
        again = ExitPolicy.from_columns(table, row)
        assert again == policy
        assert again.digest() == policy.digest()


def test_thresholds_of_several_layers_do_not_fit_into_a_column():
    with pytest.raises(RiskcalError, match="thresholds: a column holds one threshold"):
        ExitPolicy(thresholds={2: 0.5}).to_columns()


def test_a_measure_that_nobody_named_has_no_column():
    """A column of nulls is refused, and the word None is no measure."""
    columns = ExitPolicy(threshold=0.5).to_columns()
    assert "measure" not in columns
    table = pd.DataFrame([columns | {"measure": None}])
    assert ExitPolicy.from_columns(table, table.iloc[0]).measure is None
    full = ExitPolicy.full_model().to_columns()
    rows = [
        {"prompt": f"p{i}", **settings, "dissimilarity": 0.0}
        for i in range(40)
        for settings in (columns, full)
    ]
    found = calibrate(Runs.from_frame(pd.DataFrame(rows)), delta=0.1).policy()
    assert (found.threshold, found.measure) == (0.5, None)
    assert calibrate(Runs.from_frame(pd.DataFrame(rows)), delta=0.1).policy(measure="max").named()


@pytest.mark.parametrize(
    ("objective", "delta"), [("textual", 3.0), ("textual", 0.0), ("risk", -1.0), ("risk", 1.0)]
)
def test_a_recording_that_no_test_could_stop_is_refused(objective, delta):
    with pytest.raises(
        RiskcalError, match=f"^delta: {delta:g} is not strictly between the losses'"
    ):
        riskcal.Stop(delta=delta, objective=objective)
    assert riskcal.Stop(delta=-0.1, objective="risk").delta == -0.1
