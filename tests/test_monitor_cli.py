"""`riskcal monitor`: it says where the losses rose, exits 3, and leaves a state to go on from."""

import json
import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import riskcal
import riskcal.records.formats.otel
from riskcal import ExitPolicy, RiskcalError, Runs, calibrate, cli, heads
from riskcal.cli.monitor_events import begun
from riskcal.monitor import RiskMonitor
from riskcal.serving import EventLog

rng = np.random.default_rng(0)
GOOD, BAD = rng.binomial(1, 0.03, 2000), rng.binomial(1, 0.4, 300)


def monitor(*arguments, stdin=None):
    return CliRunner().invoke(cli.app, ["monitor", *map(str, arguments)], input=stdin)


def write_log(path, losses, **columns):
    table = pd.DataFrame({"loss": losses, **columns})
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines=True)
    return path


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_monitor_says_where(tmp_path, ending):
    log = write_log(tmp_path / f"log.{ending}", np.r_[GOOD, BAD])
    expected = RiskMonitor(0.1, average_run_length=5000).update(np.r_[GOOD, BAD]).alarm_at
    result = monitor(log, "--delta", 0.1, "--average-run-length", 5000)
    assert result.exit_code == 3
    assert 2000 < expected < 2100
    assert f"row {expected - 1} of {log}" in result.output
    assert monitor(write_log(tmp_path / f"good.{ending}", GOOD), "--delta", 0.1).exit_code == 0


def test_monitor_takes_delta_and_bounds_from_the_certificate(tmp_path):
    losses = np.clip(rng.normal(0, 0.2, (500, 1)), -1, 1)
    path = tmp_path / "policy.json"
    calibrate(losses, thresholds=[0.5], delta=0.1, lower=-1.0).policy().save(path)
    log = write_log(tmp_path / "log.csv", rng.uniform(-0.3, 0.9, 1000))
    assert monitor(log, "--policy", path).exit_code == 3
    assert "tolerated 0.1" in monitor(log, "--policy", path).output
    assert monitor(log, "--policy", path, "--delta", 0.5).exit_code == 0
    ExitPolicy(threshold=0.5).save(path)
    assert "delta: neither" in str(monitor(log, "--policy", path).exception)


def test_monitor_goes_on_from_its_state(tmp_path):
    state, options = tmp_path / "state.json", ["--delta", 0.1, "--average-run-length", 5000]
    first, second = write_log(tmp_path / "1.csv", GOOD), write_log(tmp_path / "2.csv", BAD)
    assert monitor(first, *options, "--state", state).exit_code == 0
    assert RiskMonitor.from_json(state.read_text()).n == len(GOOD)
    assert "epsilon is 0.05 there but 0.2" in str(
        monitor(first, *options, "--epsilon", 0.2, "--state", state).exception
    )
    result = monitor(second, *options, "--state", state)
    expected = RiskMonitor(0.1, average_run_length=5000).update(GOOD).update(BAD).alarm_at
    assert result.exit_code == 3
    assert f"row {expected - 1 - len(GOOD)} of {second}" in result.output
    saved = state.read_text()
    again = monitor(first, *options, "--state", state)  # the alarm stays, and nothing more is read
    assert again.exit_code == 3
    assert "an earlier log" in again.output
    assert state.read_text() == saved


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss\n0.1\nnan\n", "row 1: losses: nan"),
        ("loss\n0.1\n1.5\n", "row 1: losses: 1.5 is outside [0, 1]"),
        ("loss,id\n0.1,1\n\n\nabc,2\n", "row 1 cannot be read"),
        ("risk\n0.1\n", "no column loss; its columns are 'risk'"),
        ('{"loss": 0.1}\n{"loss": 0.1\n', "row 1 cannot be read"),
        ('{"loss": 0.1}\n[1]\n', "row 1 cannot be read"),
        ('{"loss": null}\n', "row 0 cannot be read"),
        ("", "holds no loss"),
        ("\n \r\n\n", "holds no loss"),
        ("\ufeff", "holds no loss"),
        ("loss\n", "holds no loss"),
        ("loss,rate\n\n\n", "holds no loss"),
        ("[]", "holds no loss"),
        ("[", "begins like a JSON array but is none"),
        ("[0.1]\n[0.2]\n", "begins like a JSON array but is none"),
        ("[[0.1], [0.2]]", "row 0 cannot be read"),
        ("[0.1, null]", "row 1 cannot be read"),
        ('[{"loss": 0.1}, {"risk": 0.1}]', "row 1 has no loss; it has 'risk'"),
        ('{"losses": [0.1]}\n', "row 0 has no loss; it has 'losses'"),
        ("{}\n", "row 0 has no loss; it has nothing"),
        ("0.1\n0.2\n", "no column loss; its columns are '0.1'"),
        ("id;loss\n", "no column loss; its columns are 'id;loss'"),
        ("id;loss\n1;0.5\n", "no column loss; its columns are 'id;loss'"),
        ("Loss\n0.1\n", "no column loss; its columns are 'Loss'"),
        ("loss,loss\n0.1,1\n", "has the column loss 2 times"),
        (
            "loss,rate\n0.1,1\n0.1,0.2\n",
            "row 1: rates: 0.2 is outside [1, 1]; give the smallest rate with --sampling-rate.",
        ),
        ("loss\n2\n", "[0, 1]. Rescale it, or give the --policy whose certificate has the true"),
        (
            "id,loss\n1,0,9\n2,0,8\n",
            "row 0 cannot be read (it has 3 cells, and the header 2; decimals",
        ),
        ("loss\n0,9\n", "row 0 cannot be read (it has 2 cells, and the header 1; decimals"),
        ("loss,said\n0,a\n0,b, c\n", "row 1 cannot be read (it has 3 cells, and the header 2"),
        (
            'loss,said\n0,a\n0,"b\n1,c\n1,d\n',
            "row 1 cannot be read (unexpected end of data). Close",
        ),
        ('loss,said\n0,"b\n1,"c"\n', "row 0 cannot be read (',' expected after '\"')"),
        ('loss,said\n0,"' + 12_000 * "b, they said\n", "row 0 cannot be read (field larger than"),
        ("x" * 131_073 + "\n0\n", "its first line is no header of a table (field larger than"),
        ('loss,said\n0,a\n"0,b\n', "row 1 cannot be read (unexpected end of data)"),
        (
            "loss,failed\n0,maybe\n",
            "row 0 cannot be read (its failed is 'maybe', which says neither",
        ),
        (
            "loss,failed\n0,no\n",
            "true nor false; write true where the output failed, and false or nothing",
        ),
        ('{"loss": null, "failed": null}\n', "row 0 cannot be read (its loss is missing"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_monitor_refuses_and_leaves_the_state(tmp_path, text, message, stream):
    log, state = tmp_path / "log", tmp_path / "state.json"
    log.write_text(text)
    state.write_text(RiskMonitor(0.1).to_json())
    before = state.read_text()
    result = monitor(
        "-" if stream else log, "--delta", 0.1, "--state", state, stdin=text if stream else None
    )
    assert isinstance(result.exception, RiskcalError)
    assert message in str(result.exception)
    assert state.read_text() == before


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "log",
    [
        "".join(json.dumps({"loss": 0.0, "failed": i % 2 == 0}) + "\n" for i in range(300)),
        "".join(json.dumps({"loss": None, "failed": True}) + "\n" for i in range(300)),
        "loss,failed\n" + "0.0,True\n0.0,False\n" * 150,
        "failed,loss\n" + "1,\n0,0\n" * 150,
    ],
)
def test_an_output_that_failed_has_the_worst_loss_as_it_has_in_runs(tmp_path, log, stream):
    path = tmp_path / "log"
    path.write_text(log)
    result = monitor("-" if stream else path, "--delta", 0.1, stdin=log if stream else None)
    assert result.exit_code == 3, result.output
    assert "ALARM" in result.output


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "log",
    [
        "loss,failed\n0,\n0.1,\n",
        '{"loss": 0, "failed": null}\n{"loss": 0.1}\n',
        "loss\n0,\n0.1,\n",
        "id,loss\n1,0, \n2,0.1,,\n",
    ],
)
def test_what_is_not_written_is_no_failure_and_no_cell(tmp_path, log, stream):
    path, state = tmp_path / "log", tmp_path / "state.json"
    path.write_text(log)
    source, stdin = ("-", log) if stream else (path, None)
    result = monitor(source, "--delta", 0.1, "--state", state, stdin=stdin)
    assert result.exit_code == 0, result.exception
    assert state.read_text().strip() == RiskMonitor(0.1).update([0, 0.1]).to_json()


def test_the_worst_loss_is_that_of_the_certificate(tmp_path):
    path, log = tmp_path / "policy.json", tmp_path / "log.jsonl"
    losses = np.clip(rng.normal(0, 0.2, (500, 1)), -1, 3)
    calibrate(losses, thresholds=[0.5], delta=1.2, lower=-1.0, upper=3.0).policy().save(path)
    log.write_text('{"loss": 0, "failed": true}\n{"loss": 0, "failed": false}\n')
    assert "mean 1.5" in monitor(log, "--policy", path).output


def test_what_is_read_in_python_is_told_so(tmp_path, monkeypatch):
    """Parquet, and evaluations of OpenTelemetry: the call that the refusal names makes a log that is read."""
    monkeypatch.chdir(tmp_path)
    pd.DataFrame({"loss": [0.25, 0.25]}).to_parquet("e.parquet")
    name, judged = (
        "gen_ai.evaluation.result",
        {"gen_ai.evaluation.name": "c", "gen_ai.evaluation.score.value": 0.75},
    )
    record = {"eventName": name, "attributes": [{"key": k, "value": v} for k, v in judged.items()]}
    exported = {"resourceLogs": [{"scopeLogs": [{"logRecords": [record, record]}]}]}
    (tmp_path / "batch.jsonl").write_text(json.dumps(exported))
    line = json.dumps({"name": name, "attributes": judged}) + "\n"
    (tmp_path / "lines.jsonl").write_text(line + line)
    for log in ("e.parquet", "batch.jsonl", "lines.jsonl"):
        said = str(monitor(log, "--delta", 0.5).exception)
        call = re.search(r"in Python[,:] (.*\)\.to_csv\('losses\.csv', index=False\))", said)
        assert call is not None, said
        eval(call[1], {"pandas": pd, "riskcal": riskcal})
        assert "2 losses seen, mean 0.25" in monitor("losses.csv", "--delta", 0.5).output


DAMAGED = [
    'a": {"riskcal.loss": 0.5}}',  # its beginning went by before anybody listened
    '{"name": "riskcal.shadow.eval',
    "\udcff\x00",
    "[1]",
    "17",
    '{"loss": 0.5',
    '{"name": "riskcal.shadow.evaluated"}',  # an event that says nothing, as elsewhere
]


@pytest.mark.parametrize("damaged", [[one] for one in DAMAGED] + [DAMAGED, DAMAGED[:1] * 50])
def test_a_stream_of_events_is_watched_though_its_first_lines_are_damaged(tmp_path, damaged):
    told = [
        {
            "name": "riskcal.shadow.evaluated",
            "attributes": {"riskcal.loss": loss, "riskcal.task": "t"},
        }
        for loss in (0.0, 1.0, 0.5)
    ]
    text = "\n".join([*damaged, *map(json.dumps, told), ""]).encode("utf-8", "surrogateescape")
    result = monitor("-", "--delta", 0.1, "--state", tmp_path / "s", stdin=text)
    assert result.exit_code == 0
    log = tmp_path / "log"
    log.write_bytes(text)
    of_file = monitor(log, "--delta", 0.1, "--state", tmp_path / "f")
    assert result.output == of_file.output.replace(str(log), "-")
    counts = [Counter(json.loads((tmp_path / name).read_text())["counts"]) for name in "sf"]
    assert counts[0] == counts[1]
    assert counts[0]["damaged"] == sum(not line.endswith('evaluated"}') for line in damaged)


@pytest.mark.parametrize("first", ["loss\n", '{"loss": 0.5}\n', "id,loss\n", "exits,errors\n"])
def test_no_more_of_a_stream_of_losses_is_waited_for_than_its_first_line(first):
    def rest():
        raise AssertionError
        yield

    assert begun(first, rest()) == (first, False)


def test_monitor_reads_a_stream(tmp_path):
    lines = "".join(json.dumps({"loss": int(loss), "rate": 0.5}) + "\n" for loss in BAD)
    result = monitor("-", "--delta", 0.1, "--sampling-rate", 0.5, stdin=lines)
    expected = RiskMonitor(0.1, sampling_rate=0.5).update(BAD).alarm_at
    assert result.exit_code == 3
    assert f"row {expected - 1} of -" in result.output
    assert (
        monitor(tmp_path / "none.csv", "--delta", 0.1)
        .exception.args[0]
        .endswith("cannot be read (No such file or directory).")
    )


@pytest.mark.parametrize("end", ["", "abc\n", "nan\n", "1.5\n"])
def test_a_file_is_read_to_the_alarm_as_a_stream_is(tmp_path, end):
    """What stands behind the alarm, even what is no loss, changes neither the exit status nor the state."""
    text, log = "loss\n" + "0.9\n" * 50 + end, tmp_path / "log.csv"
    log.write_text(text)
    found = []
    for name, stdin in ((str(log), None), ("-", text)):
        state = tmp_path / f"state-{stdin is None}.json"
        result = monitor(name, "--delta", 0.1, "--state", state, stdin=stdin)
        assert result.exit_code == 3
        found.append((state.read_text(), result.output.replace(name, "LOG")))
    assert found[0] == found[1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mark", ["", "\ufeff", "\ufeff\n\r\n", "\n  \n"])
@pytest.mark.parametrize(
    "log",
    [
        "loss\n{0}\n{0}\n{0}\n",  # the remedies that the refusals name
        '{{"loss": {0}}}\n{{"loss": {0}}}\r\n\n{{"loss": {0}}}',
        "[{0}, {0},\n {0}]",
        '[{{"loss": {0}}}, {{"loss": {0}, "rate": 1}}, {{"loss": {0}}}]\n',
        '[\n  {{\n    "loss": {0}\n  }},\n{0},\n{0}\n]',
    ],
)
def test_monitor_reads_every_form(tmp_path, log, mark, stream):
    path = tmp_path / "log"
    for loss, status in ((0.25, 0), (1, 3)):
        text = mark + log.format(loss)
        path.write_bytes(text.encode())
        result = monitor(
            "-" if stream else path,
            "--delta",
            0.3,
            "--epsilon",
            0.5,
            stdin=text.encode() if stream else None,
        )
        assert (result.exit_code, "ALARM" in result.output) == (status, status == 3)
        assert "losses seen, mean" in result.output


def test_monitor_refuses_an_empty_log_after_an_earlier_one(tmp_path):
    state, log = tmp_path / "state.json", write_log(tmp_path / "log.csv", GOOD)
    assert monitor(log, "--delta", 0.1, "--state", state).exit_code == 0
    before = state.read_text()
    log.write_text("loss\n")
    assert "holds no loss" in str(monitor(log, "--delta", 0.1, "--state", state).exception)
    assert state.read_text() == before


def test_monitor_refuses_a_stream_that_is_left_before_its_first_loss(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.monitor.loss_log, "entries", interrupted)
    assert "left before its first loss" in str(monitor("-", "--delta", 0.1, stdin="").exception)


@pytest.fixture(scope="module")
def heads_policy(tmp_path_factory):
    confidence = rng.random((4000, 2))
    agrees = rng.random((4000, 2)) < 0.6 + 0.5 * confidence
    prompts = np.repeat(np.arange(400), 10)
    found = heads.certified(
        confidence, agrees, prompts=prompts, max_tokens=10, agreement=0.8, layers=[2, 4]
    )
    path = tmp_path_factory.mktemp("heads") / "policy.json"
    found.policy().save(path)
    return path


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_monitor_takes_the_policy_of_certified_heads(tmp_path, heads_policy, ending):
    exits = rng.integers(0, 11, 600)
    for share, status in ((0.1, 0), (0.5, 3)):
        errors = rng.binomial(exits, share)
        log = tmp_path / f"log.{ending}"
        table = pd.DataFrame({"exits": exits, "errors": errors})
        table.to_csv(log, index=False) if ending == "csv" else table.to_json(
            log, orient="records", lines=True
        )
        losses = heads.request_loss(exits, errors, agreement=0.8, max_tokens=10)
        result = monitor(log, "--policy", heads_policy)
        assert result.exit_code == status
        assert "Loss of a request: 0.2 + (errors - 0.2 exits) / 10." in result.output
        as_losses = monitor(
            write_log(tmp_path / f"losses.{ending}", losses), "--policy", heads_policy
        )
        assert as_losses.output.replace(f"losses.{ending}", f"log.{ending}") == result.output
        assert RiskMonitor(0.2).update(losses).alarm == (status == 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("errors\n1\n", "no column loss or exits"),
        ("exits\n1\n", "row 0 has no loss, and not both of exits and errors; it has 'exits'"),
        ("exits,errors\n1,0\n11,0\n", "row 1: exits: 11"),
        ("exits,errors\n1,2\n", "row 0: errors: 2"),
    ],
)
def test_monitor_refuses_counts_that_cannot_be(tmp_path, heads_policy, text, message):
    log = tmp_path / "log.csv"
    log.write_text(text)
    assert message in str(monitor(log, "--policy", heads_policy).exception)


@pytest.mark.parametrize("events", [False, True])
@pytest.mark.parametrize("asked", ["selective", "clusters", "plain"])
def test_a_certificate_of_other_losses_than_all_requests_says_which_to_give(
    tmp_path, asked, events
):
    """Over losses of all requests "no alarm" says little of those that stopped early, and less of clusters."""
    runs = Runs.from_arrays(
        thresholds=[0.5, np.inf],
        dissimilarity=np.zeros((120, 2)),
        layers=np.tile([2.0, 8.0], (120, 1)),
        prompts=[f"p{i}" for i in range(120)],
        cluster=[f"c{i // 2}" for i in range(120)] if asked == "clusters" else None,
    )
    options = {"objective": "selective"} if asked == "selective" else {}
    path, log = tmp_path / "policy.json", tmp_path / "log.jsonl"
    calibrate(runs, delta=0.1, **options).policy().save(path)
    if events:
        shadow = "riskcal.shadow.evaluated"
        EventLog(log).write(shadow, {"gen_ai.response.id": "a", "riskcal.loss": 0.0})
    else:
        write_log(log, GOOD)
    result = monitor(log, "--policy", path)
    assert result.exit_code == 0
    assert ("stopped early: give their losses alone" in result.output) == (asked == "selective")
    assert ("give one loss for each cluster" in result.output) == (asked == "clusters")
