"""The report: its numbers are those of `calibrate`, nothing leaves the page, and no text of a record becomes markup."""

import base64
import functools
import hashlib
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

import riskcal
from riskcal import ExitPolicy, RiskcalError, RiskMonitor, Runs, Traces, cli, report
from riskcal.calibration.posing import pose
from riskcal.forbidden import Pattern, Tokens
from riskcal.report import charts, choices, curves, exits, generations
from riskcal.report.html import shown, tag
from riskcal.serving import EventLog, EventWatch

GRID = np.round(np.linspace(0.9, 0.1, 5), 2)


class Page(HTMLParser):
    """What a page holds: rows of its tables by id or caption, attributes of its tags, and its scripts."""

    def __init__(self, text):
        super().__init__()
        self.text, self.tags, self.tables, self.scripts = text, [], {}, []
        self._rows, self._cell, self._inside = [], None, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self._inside.append(tag)
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append((attrs, []))
        elif tag in ("td", "th", "caption", "script"):
            self._cell = ""

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._rows[-1][1].append(self._cell)
        elif tag == "caption":
            self._caption = self._cell
        elif tag == "script":
            self.scripts.append(self._cell)
        elif tag == "table":
            self.tables[self._caption] = self._rows
        if tag in ("td", "th", "caption", "script"):
            self._cell = None

    def frame(self, caption):
        (_, head), *rows = self.tables[caption]
        return pd.DataFrame([cells for _, cells in rows], columns=head)

    @property
    def anchors(self):
        return [attrs["id"] for name, attrs in self.tags if name == "section"]


def written(tmp_path, *arguments, **options):
    path = tmp_path / "report.html"
    report.write(path, *arguments, **options)
    return Page(path.read_text(encoding="utf-8"))


@functools.cache
def runs(n=400):
    rng = np.random.default_rng(0)
    losses = (rng.random((n, 5)) < [0.0, 0.02, 0.05, 0.15, 0.5]) * rng.random((n, 5))
    layers = np.array([7.0, 5.0, 3.0, 2.0, 1.0]) + 0.1 * rng.random((n, 5))
    return Runs.from_arrays(
        thresholds=np.r_[np.inf, GRID],
        prompts=[f"p{i}" for i in range(n)],
        group=np.where(np.arange(n) % 3, "easy", "hard"),
        dissimilarity=np.c_[np.zeros(n), losses],
        layers=np.c_[np.full(n, 8.0), layers],
        seconds=np.c_[np.full(n, 0.8), layers / 10],
    )


@functools.cache
def traces(n=60):
    rng = np.random.default_rng(1)
    confidence = np.sort(rng.random((2 * n, 4)), axis=1)
    agrees = rng.random((2 * n, 4)) < confidence
    agrees[:, -1] = True
    return Traces.from_arrays(
        prompt=np.repeat([f"p{i}" for i in range(n)], 2),
        position=np.tile([0, 1], n),
        confidence=confidence,
        agrees=agrees,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A page with everything, at a delta that is none of the slider's own."""
    return written(
        tmp_path_factory.mktemp("whole"),
        runs(),
        delta=0.0737,
        traces=traces(),
        generations=tokens(),
    )


def tokens(**changes):
    rows = {
        "prompt": ["a", "a", "b"],
        "threshold": ["full", 0.5, 0.5],
        "tokens": [["x", " y"], ["x", " z"], ["q"]],
        "exit_layers": [[4, 4], [1, 2], [3]],
    }
    return pd.DataFrame(rows | changes)


EVERY = "What is certified at every delta, all of it at once"


def test_every_step_of_the_slider_is_what_calibrate_certifies_for_the_list_of_deltas(whole):
    found = whole.frame(EVERY)
    deltas = sorted({*choices.SHARES.tolist(), 0.0737})
    expected = riskcal.calibrate(runs(), delta=deltas)
    assert found["delta"].tolist() == [shown(delta) for delta in deltas]
    for (_, row), one in zip(found.iterrows(), expected, strict=True):
        assert row["threshold"] == shown(float(one.threshold))
        layers = 8.0 if one.chosen is None else float(one.chosen["layers"])
        assert row["layers per token"] == shown(layers)
        assert row["layers saved"] == f"{1 - layers / 8:.0%}"
        assert row["speed"] == f"{8 / layers:.2f}x"
        assert row["upper bound"] == shown(
            0.0 if one.chosen is None else float(one.chosen["bound"])
        )
    assert 2 < found["threshold"].nunique() <= 6  # the slider does move something
    (start,) = [attrs for name, attrs in whole.tags if name == "input"]
    assert float(found["delta"][int(start["value"])]) == 0.0737
    assert int(start["max"]) == len(found) - 1


def test_the_page_begins_with_what_calibrate_says_and_marks_its_choice(tmp_path, whole):
    calibration = riskcal.calibrate(runs(), delta=0.0737)
    assert str(tag("p", calibration.message, class_="verdict certified")) in whole.text
    rows = whole.tables["Candidates, in tested order"][1:]
    assert [cells[0] for attrs, cells in rows if attrs.get("class") == "chosen"] == [
        shown(calibration.threshold)
    ]
    assert whole.frame("Candidates, in tested order")["certified"].tolist() == [
        "yes" if one else "no" for one in calibration.table["certified"]
    ]
    calibration.report(tmp_path / "one.html", title="Mine")
    page = Page((tmp_path / "one.html").read_text(encoding="utf-8"))
    assert page.frame(EVERY).equals(whole.frame(EVERY))
    assert page.anchors == ["guarantee", "delta", "risk", "splits"]
    assert "<h1>Mine</h1>" in page.text


def test_marks_stand_where_the_charts_axes_put_them(whole):
    marks = [attrs["data-at"].split(" ") for _, attrs in whole.tags if "data-at" in attrs]
    steps = whole.tables[EVERY][1:]
    assert len(marks) == 4  # a level and a dot on the risk curve, a dot on each of two costs
    for places in marks:
        assert len(places) == len(steps)
    for attrs, place in zip([attrs for attrs, _ in steps], marks[1], strict=True):
        assert (place == "-") == (attrs["data-key"] == "full")
    ups = [float(place.split(",")[1]) for place in marks[0] if place != "-"]
    assert np.allclose(np.diff(ups[:14], 2), 0, atol=0.2)  # deltas that are evenly spaced
    assert (np.diff(ups) < 0).all()  # larger ones higher up


def test_splits_are_those_of_run_trials(whole):
    found = whole.frame("Repeated splits, by delta")
    trials = riskcal.run_trials(runs(), [0.02, 0.05, 0.0737, 0.1, 0.2], n_trials=20)
    by_delta = trials.groupby("delta")
    assert found["certified in"].astype(int).tolist() == by_delta["certified"].sum().tolist()
    over = (trials["heldout_loss"] > trials["delta"]).groupby(trials["delta"]).sum()
    assert found["held-out mean above delta in"].astype(int).tolist() == over.tolist()
    assert found["held-out loss"].tolist() == [shown(m) for m in by_delta["heldout_loss"].mean()]


def test_nothing_leaves_the_page_and_no_script_but_its_own_runs(whole):
    page = whole
    assert "http" not in page.text.replace("http-equiv", "")
    assert not re.search(r"(?:src|action|srcset)=|url\((?!#)|@import", page.text)
    links = [attrs["href"] for name, attrs in page.tags if name in ("a", "link")]
    assert all(link.startswith(("#", "data:,")) for link in links)
    (content,) = [attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs]
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert content.startswith(f"default-src 'none'; script-src 'sha256-{digest}'; ")
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\0\u2028"


def test_no_text_of_a_record_becomes_markup(tmp_path, whole):
    wild = Runs.from_arrays(
        thresholds=[np.inf, 0.9, 0.5],
        prompts=[f"{HOSTILE}{i}" for i in range(50)],
        group=[HOSTILE] * 50,
        dissimilarity=np.zeros((50, 3)),
        layers=np.full((50, 3), [8.0, 4.0, 2.0]),
    )
    wilder = Traces.from_arrays(
        prompt=["a", "b"], position=[0, 0], confidence=[[0.5, 1]] * 2, agrees=[[1, 1]] * 2,
        group=[HOSTILE] * 2,
    )  # fmt: skip
    texts = tokens(
        prompt=[HOSTILE, HOSTILE, "b"], text=[HOSTILE] * 3, tokens=[[HOSTILE, ""]] * 2 + [["q"]]
    )
    page = written(
        tmp_path, wild, delta=0.1, traces=wilder, generations=texts, title=HOSTILE + "\ud800"
    )
    assert {name for name, _ in page.tags} <= {name for name, _ in whole.tags}
    assert page.scripts == whole.scripts
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in page.text
    assert "\0" not in page.text


def test_exits_on_the_full_models_path_are_those_of_the_policy():
    shown_exits = exits.layers_of(traces(), ExitPolicy(threshold=0.6, min_layer=2))
    for row, confidence in zip(shown_exits, traces().confidence, strict=True):
        early = [layer for layer in (2, 3) if confidence[layer - 1] >= 0.6]
        assert row == (early[0] if early else 4)


def test_exits_are_counted_by_the_prompts_groups(whole):
    threshold = riskcal.calibrate(runs(), delta=0.0737).threshold
    found = whole.frame("Counts by layer, 1 to 4").set_index("group")
    where = exits.layers_of(traces(), ExitPolicy(threshold=threshold))
    group = dict(zip(runs().prompts, runs().labels["group"], strict=True))
    for name in ("easy", "hard"):
        inside = np.array([group[prompt] == name for prompt in traces().prompt])
        counts = np.bincount(where[inside], minlength=5)[1:]
        assert found.loc[name].astype(int).tolist() == counts.tolist()
    heads = whole.frame("Every exit but the last, by layer")
    assert heads["agrees with the full model"].tolist() == [
        shown(float(column.mean())) for column in traces().agrees.T[:-1]
    ]


def test_where_no_exits_were_recorded_prompts_are_counted_by_their_mean_depth():
    (section,) = exits.of_runs(runs(), 2)
    counts = Page(section.body).frame("Counts by layer, 1 to 8").set_index("group").astype(int)
    assert counts["layer 3"].to_dict() == {"easy": 266, "hard": 134}
    assert counts["layer 3"].sum() == counts.to_numpy().sum()


def test_confidences_that_are_no_shares_have_no_diagonal_and_missing_heads_no_picture(tmp_path):
    confidence = np.where(traces().confidence > 0.9, np.inf, -3 * traces().confidence)
    confidence[:, 1] = np.nan
    entropies = Traces.from_arrays(
        prompt=traces().prompt, position=traces().position, confidence=confidence, loss=confidence > 0
    )  # fmt: skip
    page = written(tmp_path, entropies)
    heads = page.frame("Every exit but the last, by layer")
    assert heads.columns.tolist() == ["layer", "confidences", "1 - mean loss"]
    assert heads["confidences"][1] == "0"
    assert [attrs["aria-label"] for name, attrs in page.tags if name == "svg"][-2:] == [
        f"Chart: layer {layer}, outcome by confidence; table below." for layer in (1, 3)
    ]


@pytest.mark.parametrize(("lower", "upper"), [(-2.0, 5.0), (2.0, 3.0), (-3.0, -2.0)])
def test_sliders_of_losses_in_other_bounds_stand_within_them(lower, upper):
    losses = lower + (upper - lower) * 0.1 * np.random.default_rng(2).random((50, 2))
    problem = pose(losses, lower + 0.5, thresholds=[0.9, 0.1], lower=lower, upper=upper)
    told = {"epsilon": 0.05, "epsilon_spent": 0.05, "attempt": None}
    found = choices.choices(problem, "betting", None, told, None)
    deltas = [one.delta for one in found.calibrations]
    assert (0.0 if lower < 0 < upper else lower) < min(deltas) <= max(deltas) < upper
    assert len(deltas) == len(choices.SHARES)
    assert found.calibrations[-1].certified


def test_generations_are_shown_at_the_sliders_threshold_and_marked_where_they_differ(tmp_path):
    text = written(tmp_path, traces(), generations=tokens(), threshold=0.5).text
    first, second = re.findall(r"<article.*?</article>", text)
    assert re.findall(r'<ruby(?: class="other")?>', first) == [
        "<ruby>", "<ruby>", "<ruby>", '<ruby class="other">',
    ]  # fmt: skip
    assert [*re.findall(r"<rt>(\d)</rt>", first)] == ["4", "4", "1", "2"]
    assert 'data-key="full" hidden' in first
    assert 'data-key="0.5">' in first
    assert "not recorded" in second


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [["x"], "y", ["q"]]}, "tokens: row 1 holds no list of pieces of text .1 such"),
        ({"exit_layers": [[4, 4], [1, 0], [3]]}, "exit_layers: row 1 holds no list of layers"),
        ({"exit_layers": [[4, 4], [1], [3]]}, "exit_layers: row 1 holds 1 for 2 tokens"),
        (
            {"threshold": [0.5, 0.5, 0.5]},
            "threshold: 0.5 of prompt 'a' stands twice, again at row 1",
        ),
    ],
)
def test_wrong_generations_are_refused_by_row(changes, message):
    with pytest.raises(RiskcalError, match=message):
        generations.checked(tokens(**changes))


def test_a_slider_that_cannot_be_says_why_and_the_rest_stands(tmp_path):
    calibration = riskcal.calibrate(runs(), delta={"textual": 0.2}, budget={"layers": 6})
    calibration.report(tmp_path / "budget.html")
    page = Page((tmp_path / "budget.html").read_text(encoding="utf-8"))
    assert "selective risks and budgets are for one delta at a time" in page.text
    assert not any(name == "input" for name, _ in page.tags)
    assert page.anchors == ["guarantee", "delta", "risk"]


def test_where_nothing_is_certified_the_page_says_what_would_help(tmp_path):
    few = runs().take(np.arange(20))
    calibration = riskcal.calibrate(few, delta=0.01)
    assert not calibration.certified
    page = written(tmp_path, few, delta=0.01)
    assert str(tag("p", calibration.message, class_="verdict")) in page.text
    assert "run the full model" in page.text


def test_letters_of_charts_have_11_pixels_on_a_phone(whole):
    """At 390 pixels a wide chart has 358 of them; a small one has never less than 160."""
    widths = {72 * charts.WIDE[0]: 358, 72 * charts.SMALL[0]: 160}
    seen = set()
    for box, drawn in re.findall(r'<svg viewBox="0 0 ([\d.]+) .*?>(.*?)</svg>', whole.text):
        sizes = [float(one) for one in re.findall(r"font-size: ([\d.]+)px", drawn)]
        assert min(sizes) * widths[float(box)] / float(box) >= 11, (box, min(sizes))
        seen.add(float(box))
    assert seen == set(widths)


def test_settings_of_a_policy_are_words_and_numbers(tmp_path):
    settings = "What changes tokens; a decoder that differs refuses the policy"
    policy = ExitPolicy(
        thresholds={1: 0.8, 3: 0.7}, schedule=riskcal.Decaying(temperature=4.0, max_length=128)
    )
    told = dict(written(tmp_path, policy).frame(settings).to_numpy())
    assert told["thresholds"] == "1: 0.8, 3: 0.7"
    assert told["schedule"].startswith("decaying, temperature: 4, ")
    assert "threshold" not in told
    policy = ExitPolicy(threshold=0.5, forbidden=[Tokens([3, 4]), Pattern(r"\d")])
    told |= dict(written(tmp_path, policy).frame(settings).to_numpy())
    assert told["threshold"] == "0.5"
    assert "; pattern, " in told["forbidden"]
    assert told["lower is stricter"] == "no"
    assert not re.search(r"[\[{]|False|None", " ".join(told.values())), told
    assert "A policy without a certificate" in written(tmp_path, ExitPolicy()).text


def test_policies_and_event_logs_have_pages(tmp_path):
    policy = riskcal.calibrate(runs(), delta=0.1).policy()
    page = written(tmp_path, policy)
    assert "the expected dissimilarity to the full model&#x27;s output is at most 0.1" in page.text
    assert page.anchors == ["guarantee", "policy"]
    assert "nothing is guaranteed" in written(tmp_path, ExitPolicy(threshold=0.5)).text
    log = EventLog(tmp_path / "events.jsonl")
    for i in range(5):
        served = {"gen_ai.response.id": str(i), "riskcal.task": HOSTILE[:20]}
        log.write("riskcal.request.served", served | {"riskcal.exit.layers": {"1": 3, "4": 1}})
        log.write("riskcal.shadow.evaluated", served | {"riskcal.loss": 0.25})
    watch = EventWatch(RiskMonitor(0.3)).read(log.path)
    page = written(tmp_path, watch)
    assert page.anchors == ["monitor", "exits"]
    assert page.frame("Losses of shadowed requests, by task").iloc[0, 1:3].tolist() == ["5", "0.25"]
    assert page.frame("Counts by layer, 1 to 4").iloc[0, 1:].tolist() == ["15", "0", "0", "5"]


def test_options_that_a_source_does_not_use_are_refused(tmp_path):
    for source, options in (
        (traces(), {"delta": 0.1}),
        (ExitPolicy(), {"traces": traces()}),
        (riskcal.calibrate(runs(), delta=0.1), {"delta": 0.2}),
        (runs(), {"colour": "red"}),
    ):
        with pytest.raises(RiskcalError, match=f"{next(iter(options))}: is not used"):
            report.write(tmp_path / "x.html", source, **options)
    with pytest.raises(RiskcalError, match="source: DataFrame is none of"):
        report.write(tmp_path / "x.html", tokens())
    assert not (tmp_path / "x.html").exists()


def test_long_generations_are_cut_and_say_so():
    long = pd.DataFrame({"prompt": range(20), "threshold": 0.5, "tokens": [["y"] * 2000] * 20})
    body = generations.section(long.assign(exit_layers=[[1] * 2000] * 20), None).body
    assert body.count("<article") == 12
    assert body.count("<ruby") == 12 * generations.TOKENS
    assert body.count("and 1600 more") == 12
    many = long.assign(threshold=np.linspace(0.1, 0.9, 20), prompt=1, exit_layers=[[1] * 2000] * 20)
    body = generations.section(pd.concat([many, many.assign(prompt=2)]), None).body
    assert body.count("<article") == 1
    assert generations.ALL_TOKENS / 2 < body.count("<ruby") <= generations.ALL_TOKENS
    assert "Prompts: the first 1 of 2." in body


def test_a_page_that_would_be_too_large_is_refused_and_not_written(tmp_path):
    with pytest.raises(RiskcalError, match="report: the page would have"):
        report.write(tmp_path / "x.html", ExitPolicy(), title="y" * 2**22)
    assert not (tmp_path / "x.html").exists()


def test_a_log_with_names_of_its_own_has_the_page_of_the_same_runs(tmp_path):
    own = runs().to_frame()
    own.to_parquet(tmp_path / "plain.parquet")
    foreign = own.rename(columns={"prompt": "request_id", "threshold": "lambda"})
    foreign = foreign.assign(rouge=1 - foreign.pop("dissimilarity"))
    foreign.to_parquet(tmp_path / "foreign.parquet")
    names = ["prompt=request_id", "threshold=lambda", "dissimilarity=1-rouge"]
    pages = []
    for file, options in (("plain", []), ("foreign", [f"--columns={name}" for name in names])):
        out = str(tmp_path / "out.html")
        path = str(tmp_path / f"{file}.parquet")
        result = CliRunner().invoke(cli.app, ["report", path, "--out", out, *options])
        assert result.exit_code == 0, result.exception
        pages.append(Page((tmp_path / "out.html").read_text(encoding="utf-8")))
    assert pages[0].anchors == pages[1].anchors
    assert pages[0].tables.keys() == pages[1].tables.keys()


def test_null_thresholds_of_json_are_read_and_options_of_runs_refused_elsewhere(tmp_path):
    def run(*arguments):
        out = ["--out", str(tmp_path / "out.html")]
        return CliRunner().invoke(cli.app, ["report", *map(str, arguments), *out])

    runs().to_frame().to_json(tmp_path / "runs.jsonl", orient="records", lines=True)
    assert run(tmp_path / "runs.jsonl").exit_code == 0
    traces().write(tmp_path / "traces.parquet")
    ExitPolicy(threshold=0.5).save(tmp_path / "policy.json")
    for option in (["--lower-is-stricter"], ["--keep", "last:attempt"]):
        for file in ("traces.parquet", "policy.json"):
            said = run(tmp_path / file, *option)
            assert f"{option[0]}: is of runs" in str(said.exception)


def test_the_command_sees_what_a_file_is(tmp_path, whole):
    def said(*arguments):
        out = tmp_path / "out.html"
        result = CliRunner().invoke(cli.app, ["report", *map(str, arguments), "--out", str(out)])
        assert result.exit_code == 0, result.exception
        assert result.output == f"Report written to {out}\n"
        return Page(out.read_text(encoding="utf-8"))

    runs().write(tmp_path / "runs.parquet")
    traces().write(tmp_path / "traces.jsonl")
    tokens().to_json(tmp_path / "tokens.jsonl", orient="records", lines=True)
    riskcal.calibrate(runs(), delta=0.1).policy().save(tmp_path / "policy.json")
    EventLog(tmp_path / "events.jsonl").write("riskcal.request.served")
    page = said(
        tmp_path / "runs.parquet", "--delta", 0.0737, "--traces", tmp_path / "traces.jsonl",
        "--generations", tmp_path / "tokens.jsonl",
    )  # fmt: skip
    assert page.text == whole.text
    assert page.anchors == [
        "guarantee",
        "delta",
        "risk",
        "splits",
        "generations",
        "exits",
        "heads",
    ]
    assert said(tmp_path / "traces.jsonl").anchors == ["exits", "heads"]
    assert said(tmp_path / "policy.json").anchors == ["guarantee", "policy"]
    events = said(tmp_path / "events.jsonl", "--policy", tmp_path / "policy.json")
    assert events.anchors == ["monitor"]


def test_no_label_of_a_chart_leaves_its_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the room that labels take moves the axes, these would choose other ticks, with longer labels."""
    left = []
    save = Figure.savefig

    def saved(figure: Figure, *given: Any, **options: Any) -> None:
        save(figure, *given, **options)
        left.append(figure.axes[0].yaxis.label.get_window_extent().x0)

    monkeypatch.setattr(Figure, "savefig", saved)
    for high in np.linspace(0.1, 0.3, 21):

        def draw(ax: Any, high: float = high) -> None:
            ax.plot([0.4, 0.9], [0.6 * high, 0.2 * high])
            ax.set_ylim(0, high)
            ax.set_xlabel("exit threshold")
            ax.set_ylabel("loss")

        charts.chart(draw, "Chart.")
    assert len(left) == 21
    assert min(left) > -1.0


# -- candidates without an order, and requests of one decision -------------------------------------------------------------


@functools.cache
def cascade():
    grid = (0.9, 0.7, 0.5)
    return riskcal.replay_traces(
        riskcal.load_example("cascade"), [[a, b] for a in grid for b in grid], exact=True
    )


def test_a_cascade_is_told_by_the_price_that_chooses_and_by_one_number_for_each_candidate(tmp_path):
    calibration = riskcal.calibrate(cascade(), delta=0.1, cost="price")
    report.write(tmp_path / "page.html", calibration, traces=riskcal.load_example("cascade"))
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    number = int(calibration.chosen.name) + 1
    every = page.frame(EVERY).set_index("delta")
    assert "threshold" not in every  # which only numbers the vectors, from the other end
    chosen = every["candidate"] != "full"
    candidates = page.frame("Candidates, in tested order").set_index("candidate")
    assert candidates.loc[str(number), "thresholds"] == calibration.chosen["thresholds"]
    for _, row in every[chosen].iterrows():
        assert candidates.loc[row["candidate"], "thresholds"] == row["thresholds"]
        assert candidates.loc[row["candidate"], "price per prompt"] == row["price per prompt"]
        saved = 1 - float(row["price per prompt"]) / calibration.full_costs["price"]
        assert row["price saved"] == f"{saved:.0%}"
    assert "Mean price per prompt" in page.text
    assert "Price saved by each split" in page.text
    assert "Layers saved by each split" not in page.text
    for untrue in ("per token", "tokens per prompt", "all tokens", "Where tokens leave"):
        assert untrue not in page.text
    assert "all requests" in page.text


def test_no_line_joins_candidates_that_have_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    save = Figure.savefig

    def saved(figure: Figure, *given: Any, **options: Any) -> None:
        drawn.append(figure.axes[0])
        save(figure, *given, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    one = riskcal.calibrate(np.repeat([0.0, 1.0], [95, 5])[:, None], thresholds=[0.5], delta=0.2)
    several = riskcal.calibrate(cascade(), delta=0.1, cost="price")
    for calibration, k in ((one, 1), (several, 9)):
        drawn.clear()
        charts_of = curves.section(calibration._problem, calibration, None)
        assert charts_of
        for ax in drawn:
            observed = ax.get_lines()[0]
            assert len(observed.get_xdata()) == k
            assert observed.get_linestyle() == "None"
    drawn.clear()
    curves.section(riskcal.calibrate(runs(), delta=0.1)._problem, None, chosen_at_every_delta())
    assert drawn[0].get_lines()[1].get_linestyle() == "-"


def chosen_at_every_delta():
    problem = riskcal.calibrate(runs(), delta=0.1)._problem
    told = {"epsilon": 0.05, "epsilon_spent": 0.05, "attempt": None}
    return choices.choices(problem, "betting", None, told, None)


def test_legends_cover_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    save = Figure.savefig

    def saved(figure: Figure, *given: Any, **options: Any) -> None:
        save(figure, *given, **options)
        ax = figure.axes[0]
        kept.append((ax.get_legend().get_window_extent(), ax.get_window_extent(), figure.bbox))

    monkeypatch.setattr(Figure, "savefig", saved)
    calibration = riskcal.calibrate(runs(), delta=0.1)
    curves.section(calibration._problem, calibration, chosen_at_every_delta())
    assert len(kept) == 3
    for legend, inner, paper in kept:
        assert legend.y0 >= inner.y1 - 1
        assert legend.x1 <= paper.x1 + 1
        assert legend.y1 <= paper.y1 + 1


def test_the_mean_depth_of_prompts_is_the_tables_and_its_chart_goes_down_to_the_full_model():
    (section,) = exits.of_runs(runs(), 2)
    page = Page(section.body)
    for name in ("easy", "hard"):
        own = runs().values["layers"][runs().labels["group"] == name, 2]
        assert f"mean layer {own.mean():.2f}" in page.text
    assert section.title == "How deep prompts go"
    assert page.frame("Counts by layer, 1 to 8").shape == (2, 9)


def test_several_risks_have_a_chart_each_and_no_slider_that_would_hold_for_one_alone(tmp_path):
    rng = np.random.default_rng(3)
    whole = runs().to_frame()
    whole["risk"] = np.where(np.isinf(whole["threshold"]), 0.3, rng.uniform(0.2, 0.5, len(whole)))
    both = riskcal.calibrate(
        Runs.from_frame(whole), delta={"textual": 0.2, "risk": 0.3}, epsilon=0.1
    )
    both.report(tmp_path / "two.html")
    page = Page((tmp_path / "two.html").read_text(encoding="utf-8"))
    assert not any(name == "input" for name, _ in page.tags)
    assert (
        "There is no slider here: bounds that hold for every delta at once are of one risk"
        in page.text
    )
    assert (
        "Mean dissimilarity to the full model&#x27;s output" in page.text
        or "Mean dissimilarity to the full model's output" in page.text
    )
    assert "Mean increase in risk over the full model" in page.text
    labels = [attrs["aria-label"] for name, attrs in page.tags if name == "svg"]
    for name in ("textual", "risk"):
        low, high = both.table[f"loss_{name}"].min(), both.table[f"loss_{name}"].max()
        assert any(f"from {low:.3g} to {high:.3g}" in label for label in labels)


def test_a_calibration_with_a_proxy_is_reported_as_any_other(tmp_path):
    """The slider's bounds know of no proxy, and are those of the losses alone."""
    losses, rng = runs().losses(), np.random.default_rng(4)
    fresh = rng.choice(losses, 900) + 0.1 * rng.random((900, losses.shape[1]))
    known = {"proxy": losses + 0.1 * rng.random(losses.shape), "unlabelled": fresh}
    found = riskcal.calibrate(runs(), delta=0.2, **known)
    assert "variance_left" in found.table.columns
    page = written(tmp_path, found)
    assert page.anchors == written(tmp_path, riskcal.calibrate(runs(), delta=0.2)).anchors
