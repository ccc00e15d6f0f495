"""What results look like: tables without what all rows share, pictures of each result, one style."""

import math
import re
from functools import partial

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import same_color
from matplotlib.figure import Figure

import riskcal
from riskcal import ExitPolicy, RiskcalError, _showing, plots


@pytest.fixture(scope="module")
def calibration():
    return riskcal.calibrate(riskcal.load_example("g2p"), delta=0.1)


@pytest.fixture(scope="module")
def heads():
    traces = riskcal.load_example("stress")
    return riskcal.heads.certified(
        traces.confidence[:, :-1],
        traces.agrees[:, :-1],
        prompts=traces.prompt,
        max_tokens=1,
        agreement=0.95,
    )


def axes(width: float = 7.0):
    return Figure(figsize=(width, 3), layout="constrained").subplots()


def words(ax) -> str:
    return " ".join(text.get_text() for text in ax.get_legend().get_texts())


# -- tables ----------------------------------------------------------------------------------------------------------------


def test_a_table_has_no_column_that_says_the_same_in_every_row_and_marks_the_chosen_one(
    calibration,
):
    shown = repr(calibration)
    header = next(line for line in shown.splitlines() if line.startswith("threshold"))
    assert "measure" not in header
    assert "policy" not in header
    assert "layers/token" in header
    assert "In every row: min_layer 1, measure softmax, max_new_tokens 24, n_layers 8" in shown
    [marked] = [line for line in shown.splitlines() if "chosen" in line]
    assert marked.split()[0] == "0.45"
    assert len(header) < 80  # a terminal's width
    page = calibration._repr_html_()
    assert page.count("font-weight: bold") == 1
    assert calibration.table.shape == (21, 11)  # what is hidden is in the table all the same


@given(
    st.lists(
        st.tuples(st.sampled_from([1.0, 2.0]), st.text(max_size=8), st.integers(0, 3)), max_size=80
    ),
    st.integers(0, 79),
)
def test_any_table_is_shown_whole_or_says_what_it_left_out(rows, chosen):
    table = pd.DataFrame(rows, columns=["threshold", "name", "n"])
    chosen = chosen if chosen < len(table) else None
    page = _showing.html(table, settings=["name", "n"], chosen=chosen)
    seen = page.count("<tr") - 1
    left_out = re.search(r"(\d+) of (\d+) rows are not shown", page)
    assert seen + (int(left_out[1]) if left_out else 0) == len(table)
    assert page.count("font-weight: bold") == (chosen is not None)
    for name in ("name", "n"):
        same = len(table) > 0 and table[name].nunique() == 1
        assert (f"<th>{name}</th>" in page) != same


def test_one_candidate_has_its_loss_in_sight(calibration):
    """Of one row every column is constant; a policy in JSON would push the loss off the page."""
    runs = riskcal.load_example("g2p").to_frame().query("threshold in [0.5, inf]")
    shown = repr(riskcal.calibrate(riskcal.Runs.from_frame(runs), delta=0.1))
    header = next(line for line in shown.splitlines() if "loss" in line and "threshold" in line)
    assert header.split()[:3] == ["threshold", "loss", "pvalue"]
    assert "In this row: min_layer 1, measure softmax, max_new_tokens 24" in shown


def test_markup_in_records_is_text():
    table = pd.DataFrame({"threshold": [0.5, 0.6], "name": ["<b>", "<script>"]})
    assert "<script>" not in _showing.html(table)
    assert "&lt;script&gt;" in _showing.html(table)


@pytest.mark.parametrize("name", ["g2p", "g2p-traces"])
def test_records_show_means_in_a_notebook(name):
    records = riskcal.load_example(name)
    page = records._repr_html_()
    assert repr(records) in page
    means = (
        records.losses("textual").mean(0)
        if isinstance(records, riskcal.Runs)
        else records.agrees.mean(0)
    )
    for mean in means:
        assert f"<td>{mean:.4g}</td>" in page


def test_exits_of_ragged_traces_are_means_over_those_that_reach_them():
    traces = riskcal.Traces.from_arrays(
        prompt=[0, 1, 2],
        position=[0, 0, 0],
        confidence=[[0.2, 0.9], [0.4, 0.5, 0.9], [0.6]],
        loss=[[1.0, 0.0], [0.5, 0.5, 0.0], [0.0]],
    )
    page = traces._repr_html_()
    for row in ((1, 3, 0.4, 0.5), (2, 2, 0.7, 0.25), (3, 1, 0.9, 0)):
        assert "".join(f"<td>{value:g}</td>" for value in row) in page
    traces.plot(axes())


def test_a_policy_shows_its_settings_and_what_is_certified_of_it(calibration):
    page = calibration.policy()._repr_html_()
    assert "Certified: with probability at least 0.95" in page
    assert "<td>threshold</td><td>0.45</td>" in page
    assert "written by hand" in ExitPolicy(threshold=0.5)._repr_html_()
    nothing = riskcal.calibrate(np.ones((30, 1)), thresholds=[0.5], delta=0.1)
    assert "Nothing was certified" in nothing.policy()._repr_html_()


def test_a_policys_settings_are_words_and_numbers():
    policy = ExitPolicy(
        thresholds={1: 0.75, 3: math.inf}, schedule=riskcal.Decaying(), lower_is_stricter=True
    )
    for shown in (str(policy), policy._repr_html_()):
        assert "1: 0.75, 3: full" in shown
        assert "decaying, temperature: 4, " in shown
        assert not re.search(r"[{\[]|True", shown), shown


def test_settings_within_a_setting_are_counted_in_what_every_row_has():
    table = pd.DataFrame(
        {"n": [1, 2], "policy": ['{"config": {"a": {"b": 1}}, "n_layers": 8}'] * 2}
    )
    shown = _showing.text(table, settings=["policy"])
    assert "config of 1 settings, n_layers 8" in shown


def test_a_policy_in_a_terminal_says_what_is_set_and_nothing_else(calibration):
    policy = calibration.policy()
    first, *settings = str(policy).splitlines()
    assert first.startswith("Certified: with probability at least 0.95")
    assert ["threshold", "0.45"] in [line.split() for line in settings]
    assert not any("pruning" in line for line in settings)
    assert max(map(len, settings)) < 80
    assert repr(ExitPolicy(threshold=0.5, cache="project")) == (
        "ExitPolicy(threshold=0.5, cache='project')"
    )
    assert "pilot_digest" not in repr(policy.certificate)
    assert "delta=0.1" in repr(policy.certificate)


def test_tables_become_latex(calibration):
    text = calibration.to_frame()[["threshold", "loss", "certified"]].to_latex(index=False)
    assert r"\begin{tabular}" in text
    assert "0.450000" in text


# -- pictures ---------------------------------------------------------------------------------------------------------------


def test_the_band_goes_up_to_the_bound_that_decides(calibration):
    ax = axes()
    calibration.plot(ax)
    [band] = [c for c in ax.collections if c.get_label() == "upper confidence bound"]
    table = calibration.table.set_index("threshold")
    for threshold, certified in table["certified"].items():
        vertices = [
            float(y)
            for x, y in band.get_paths()[0].vertices
            if math.isclose(float(x), threshold, abs_tol=1e-12)
        ]
        assert (max(vertices) <= 0.1) == certified
        assert min(vertices) == pytest.approx(table["loss"][threshold])


def test_of_losses_of_two_values_without_ids_the_band_is_no_lower_than_their_count_allows():
    """7 of 40: betting alone would reject .3, which the exact test of the count does not, at .055."""
    losses = np.repeat([1.0, 0.0], [7, 33])[:, None]
    numbered = riskcal.calibrate(losses, thresholds=[0.5], delta=0.3)
    ax = axes()
    numbered.plot(ax)
    [band] = [c for c in ax.collections if c.get_label() == "upper confidence bound"]
    exact = riskcal.bounds.clopper_pearson(losses)
    assert not numbered.certified
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(exact)
    assert exact > 0.3


def test_one_further_coordinate_has_a_curve_for_each_value_and_two_are_refused():
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": i, "threshold": t, "temperature": tau, "variant": v, "layers": 8 * t}
        for i in range(60)
        for t in (0.5, 0.7, 0.9)
        for tau in (1.0, 4.0)
        for v in ("a", "b")
    ]
    frame = pd.DataFrame(rows)
    frame["dissimilarity"] = rng.random(len(frame)) * (1 - frame["threshold"]) * 0.3
    one = riskcal.Runs.from_frame(frame[frame["variant"] == "a"].drop(columns="variant"))
    ax = axes()
    found = riskcal.calibrate(one, delta=0.2)
    found.plot(ax)
    assert "temperature 1" in words(ax)
    assert "temperature 4" in words(ax)
    assert words(ax).count("chosen") == 1
    assert words(ax).count("not certified") == (not found.table["certified"].all())
    [marked] = [line for line in ax.get_lines() if len(line.get_xdata()) == 1]
    assert marked.get_ydata()[0] == found.chosen["loss"]
    found.plot(axes(), cost="layers")
    one.plot(ax=axes())
    two = riskcal.Runs.from_frame(frame, candidate_columns=["variant"])
    with pytest.raises(RiskcalError, match=r"plot: candidates differ in .*variant"):
        two.plot()
    with pytest.raises(RiskcalError, match=r"plot: candidates differ in .*variant"):
        riskcal.calibrate(two, delta=0.2).plot()


@pytest.fixture(scope="module")
def cascade():
    """Candidates of two thresholds each, which are numbered from the strictest pair down."""
    grid = (0.9, 0.7, 0.5)
    runs = riskcal.replay_traces(
        riskcal.load_example("cascade"), [[a, b] for a in grid for b in grid], exact=True
    )
    return riskcal.calibrate(runs, delta=0.1, cost="price")


def test_vectors_are_on_no_curve_over_the_numbers_that_name_them(cascade, tmp_path):
    """A curve over them would say that candidate 9 is more cautious than candidate 8."""
    with pytest.raises(
        RiskcalError, match=r"plot: candidates differ in threshold, thresholds.*cost= draws"
    ):
        cascade.plot(axes())
    with pytest.raises(RiskcalError, match="plot: candidates differ in threshold, thresholds"):
        riskcal.replay_traces(
            riskcal.load_example("cascade"), [[0.9, 0.7], [0.5, 0.5]], exact=True
        ).plot("risk", axes())
    ax = axes()
    assert cascade.plot(ax, cost="price") is ax
    drawn = np.vstack([dots.get_offsets() for dots in ax.collections])
    recorded = cascade.table[["loss", "price"]].to_numpy()
    np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(recorded, axis=0))
    [marked] = [line for line in ax.get_lines() if line.get_label().startswith("chosen")]
    assert [marked.get_xdata()[0], marked.get_ydata()[0]] == list(cascade.chosen[["loss", "price"]])
    assert f"full model: {cascade.full_costs['price']:.4g}" in words(ax)
    assert "price" in ax.get_ylabel()
    assert "threshold" not in ax.get_xlabel()


def test_where_a_prompt_is_one_decision_its_depth_is_no_mean_over_tokens(cascade):
    for shown in (repr(cascade), cascade._repr_html_()):
        assert "layers/prompt" in shown
        assert "layers/token" not in shown
        assert "tokens/prompt" not in shown
    ax = axes()
    cascade.plot(ax, cost="layers")
    assert ax.get_ylabel().replace("\n", " ") == "mean layers per prompt"


@pytest.mark.parametrize("width", [3.3, 7.0])
def test_a_picture_fits_a_column_of_a_paper(calibration, width):
    figure = Figure(figsize=(width, 3), layout="constrained")
    ax = figure.subplots()
    calibration.plot(ax)
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    assert box.x0 >= -0.01
    assert box.x1 <= width + 0.01
    assert ax.get_window_extent().height > 0.3 * figure.bbox.height  # the curve keeps its room
    legend, inner = ax.get_legend().get_window_extent(), ax.get_window_extent()
    assert legend.y0 >= inner.y1 - 1  # and nothing lies on it


@pytest.mark.parametrize("width", [3.3, 5.0, 7.0])
@pytest.mark.parametrize("size", [8, 10])
def test_labels_of_any_picture_stay_on_its_paper(calibration, heads, cascade, width, size):
    with matplotlib.rc_context({"font.size": size}):
        for draw in (
            calibration.plot,
            heads.plot,
            riskcal.RiskMonitor(0.1).update([0.0, 0.3] * 20).plot,
            partial(cascade.plot, cost="price"),
        ):
            figure = Figure(figsize=(width, 2.6), layout="constrained")
            draw(figure.subplots())
            figure.draw_without_rendering()
            box = figure.get_tightbbox()
            assert box.min.min() >= -0.02
            assert box.x1 <= width + 0.02
            assert box.y1 <= 2.62


@pytest.mark.parametrize(("unit", "said"), [(1.0, "full model: 8"), (1e6, "8 M"), (1e-5, "80 µ")])
def test_costs_of_any_size_are_read_at_a_glance(unit, said):
    table = pd.DataFrame({"threshold": [0.5, 0.9], "flops": [2 * unit, 6 * unit]})
    figure = Figure(figsize=(3.3, 2.6), layout="constrained")
    ax = plots.cost_curve(table, full=8 * unit, cost="flops", ax=figure.subplots())
    figure.draw_without_rendering()
    assert said in words(ax)
    assert ax.yaxis.get_offset_text().get_text() == ""  # which would lie on the legend


def test_steps_of_heads_are_filled_where_certified_and_one_head_is_seen_upon_all(heads):
    ax = axes()
    heads.plot(ax)
    lines = {line.get_label(): line for line in ax.lines}
    everything = lines["all heads"]
    assert all(
        everything.zorder <= line.zorder and everything.get_linewidth() > line.get_linewidth()
        for label, line in lines.items()
        if label.startswith("head after")
    )
    hollow = lines["not certified"]
    assert hollow.get_fillstyle() == "none"
    assert len(hollow.get_xdata()) == (~heads.table["certified"]).sum() > 0
    filled = [line for line in ax.lines if line.get_marker() == "o" and line is not hollow]
    assert filled[0].get_fillstyle() == "full"
    assert len(filled[0].get_xdata()) == heads.table["certified"].sum() > 0


def test_every_result_has_a_picture_on_the_axes_given(calibration):
    traces = riskcal.load_example("g2p-traces")
    heads = riskcal.heads.certified(
        traces.confidence[:, :-1],
        traces.agrees[:, :-1],
        prompts=traces.prompt,
        max_tokens=30,
        layers=range(1, 8),
    )
    monitor = riskcal.RiskMonitor(0.1).update([0.0, 0.3] * 20)
    decaying = ExitPolicy(threshold=0.9, schedule=riskcal.Decaying(temperature=4.0, max_length=20))
    for result in (
        calibration,
        riskcal.load_example("g2p"),
        traces,
        heads,
        monitor,
        decaying,
        ExitPolicy(thresholds={2: 0.9, 4: math.inf}),
        ExitPolicy.full_model(),
    ):
        ax = axes()
        assert result.plot(ax=ax) is ax
        assert ax.get_xlabel()
        assert ax.get_ylabel()
    with pytest.raises(RiskcalError, match="no row"):
        riskcal.AdaptiveCalibration(range(20), [0.5, 0.9], delta=0.1).plot(axes())


def test_needed_confidence_is_that_of_the_schedule():
    schedule = riskcal.Decaying(temperature=4.0, max_length=20)
    ax = axes()
    ExitPolicy(threshold=0.9, schedule=schedule).plot(ax)
    drawn = ax.get_lines()[0].get_ydata()
    np.testing.assert_allclose(drawn, schedule.local_threshold(0.9, np.arange(20)))


def test_a_style_holds_within_its_with_and_names_what_it_does_not_know(calibration):
    ax = axes()
    with plots.style(delta="black"), plots.style(marker=9):
        calibration.plot(ax)
    [line] = [line for line in ax.get_lines() if line.get_label().startswith("tolerance")]
    assert same_color(line.get_color(), "black")
    after = axes()
    calibration.plot(after)
    [line] = [line for line in after.get_lines() if line.get_label().startswith("tolerance")]
    assert same_color(line.get_color(), plots.Style().delta)
    with (
        pytest.raises(RiskcalError, match="colour: is nothing of a style; there is loss, delta"),
        plots.style(colour="black"),
    ):
        pass


def test_dollars_in_names_are_no_formulae():
    """Two of them would be, one that cannot be read."""
    table = pd.DataFrame({"threshold": [0.2, 0.8], "$in \\x$": [1.0, 2.0], "variant": "$\\y$ a"})
    for by in (None, "variant"):
        axes = plots.cost_curve(table, cost="$in \\x$", by=by)
        axes.figure.canvas.draw()
        assert "$in" in axes.get_ylabel().replace("\\$", "$")


def test_candidates_without_a_setting_are_a_curve_too():
    """A schedule that does not decay has no temperature: its curve was left out, and with it the chosen candidate."""
    rows = [
        {
            "prompt": i,
            "threshold": t,
            "temperature": temperature,
            "dissimilarity": loss,
            "layers": 4 * t + (temperature == 4),
        }
        for i in range(300)
        for t, temperature, loss in (
            (0.9, None, 0.01),
            (0.9, 4, 0),
            (0.5, None, 0.02),
            (0.5, 4, 0.3),
        )
    ]
    found = riskcal.calibrate(riskcal.Runs.from_frame(pd.DataFrame(rows)), delta=0.1)
    assert math.isnan(found.chosen["temperature"])
    ax = axes()
    found.plot(ax)
    assert "temperature 4.0 temperature none chosen: 0.02" in words(ax)
    marked = [line.get_xydata().tolist() for line in ax.lines if len(line.get_xdata()) == 1]
    assert marked == [[[0.5, pytest.approx(0.02)]]]


def band_of(calibration):
    ax = axes()
    calibration.plot(ax)
    return [c for c in ax.collections if c.get_label() == "upper confidence bound"]


def test_a_band_is_of_plain_losses_and_that_of_a_list_of_deltas_is_the_tables():
    early = np.random.default_rng(0).random((80, 1)) < 0.5
    runs = riskcal.Runs.from_arrays(
        thresholds=[math.inf, 0.9, 0.5],
        dissimilarity=np.c_[np.zeros(80), 0.1 * early, 0.2 * early],
        layers=np.c_[np.full(80, 8.0), np.where(early, [2.0, 1.0], 8.0)],
        prompts=[f"p{i}" for i in range(80)],
    )
    assert len(band_of(riskcal.calibrate(runs, delta=0.4))) == 1
    assert not band_of(riskcal.calibrate(runs, delta=0.4, objective="selective"))
    first = riskcal.calibrate(runs, delta=[0.3, 0.4])[0]
    [band] = band_of(first)
    bound = first.table["bound"].max()
    assert bound > riskcal.calibrate(runs, delta=0.4)._bounds(first._problem.risks[0]).max()
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(bound)


def test_curves_of_which_nothing_was_certified_have_no_chosen_candidate():
    rows = [
        {"prompt": i, "threshold": t, "temperature": tau, "dissimilarity": 1.0, "layers": 2.0}
        for i in range(30)
        for t in (0.5, 0.9)
        for tau in (1.0, 4.0)
    ]
    ax = axes()
    riskcal.calibrate(riskcal.Runs.from_frame(pd.DataFrame(rows)), delta=0.2).plot(ax)
    assert "chosen" not in words(ax)
