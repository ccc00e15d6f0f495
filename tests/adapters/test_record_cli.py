import json
import sys

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from riskcal._validate import RiskcalError
from riskcal.policy import ExitPolicy
from riskcal.records import Runs, Traces
from riskcal_adapters import cli, texts

app = typer.Typer()
app.command("record")(cli.record)
app.command("other")(lambda: None)  # with a single command typer would drop its name


def run(*arguments):
    return CliRunner().invoke(
        app,
        ["record", *map(str, arguments), "--decoder", "toy_decoder:load", "--max-new-tokens", "6"],
    )


def refusal(*arguments):
    result = run(*arguments)
    assert isinstance(result.exception, RiskcalError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("first\nsecond word\nthird\n", encoding="utf-8")
    return path


def test_text_file_to_records(tmp_path, words):
    out = tmp_path / "runs"
    result = run(
        words,
        "--out",
        out,
        "--thresholds",
        "0:1:.25",
        "--traces",
        "--shard-prompts",
        2,
        "--batch-size",
        2,
    )
    assert result.exit_code == 0, result.exception
    runs = Runs.read(out)
    assert runs.thresholds.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert runs.n == 3
    assert Traces.read(out / "traces").n_layers == 4
    assert f"3 prompts with the full model and 5 thresholds; files in {out}: 2" in result.output
    assert f"riskcal calibrate {out} --delta" in result.output


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_tables_with_references_and_words_that_look_like_something_else(tmp_path, ending):
    path = tmp_path / f"prompts.{ending}"
    table = pd.DataFrame(
        {
            "text": ["null", "007", "NA", "true"],
            "prompt": [10, 11, 12, 13],
            "references": [["w2 w3", "w4"], ["w5"], ["w2"], ["w3"]],
            "group": ["x", "y", "x", "y"],
        }
    )
    if ending == "csv":
        table.assign(references=table["references"].map("|".join)).to_csv(path, index=False)
    elif ending == "jsonl":
        path.write_text(
            "".join(json.dumps(row) + "\n" for row in table.to_dict("records")), encoding="utf-8"
        )
    else:
        table.to_parquet(path)
    out = tmp_path / "runs"
    settings = [
        "--risk",
        "--temperature",
        4,
        "--decay-length",
        6,
        "--min-layer",
        2,
        "--measure",
        "margin",
    ]
    result = run(path, "--out", out, "--thresholds", ".9,.5", *settings)
    assert result.exit_code == 0, result.exception
    runs = Runs.read(out)
    assert sorted(runs.prompts.tolist()) == [10, 11, 12, 13]
    assert runs.losses("risk").shape == (4, 2)
    assert set(runs.candidates["temperature"]) == {4.0}
    assert set(runs.candidates["min_layer"]) == {2}
    assert set(runs.candidates["measure"]) == {"margin"}
    assert "--objective risk" in result.output


def test_losses_are_chosen_by_name(tmp_path):
    path = tmp_path / "prompts.csv"
    pd.DataFrame({"text": ["one", "two", "three"], "references": ["w2 w3", "w4|w5", "w6"]}).to_csv(
        path, index=False
    )
    frames = {}
    for loss in ("rouge-l", "exact-match"):
        result = run(
            path, "--out", tmp_path / loss, "--thresholds", ".3,.6", "--loss", loss, "--risk"
        )
        assert result.exit_code == 0, result.exception
        frames[loss] = Runs.read(tmp_path / loss).to_frame()
    assert set(frames["exact-match"]["dissimilarity"]) == {0.0, 1.0}
    assert set(frames["exact-match"]["risk"]) <= {0.0, 1.0}
    fractions = frames["rouge-l"]["dissimilarity"]
    assert ((fractions > 0) & (fractions < 1)).any()
    assert (fractions <= frames["exact-match"]["dissimilarity"]).all()
    assert "'Distance(score=<function rouge_l>)'" in str(
        refusal(path, "--out", tmp_path / "rouge-l", "--thresholds", ".3,.6", "--risk")
    ).replace('"', "'")


def test_a_loss_that_cannot_be_had_is_refused(tmp_path, words, monkeypatch):
    assert "--loss: 'bertscore' is unknown" in refusal(
        words, "--out", tmp_path / "a", "--loss", "bertscore"
    )
    texts._sacrebleu_metric.cache_clear()
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    assert "--loss: this text loss needs sacrebleu: pip install" in refusal(
        words, "--out", tmp_path / "b", "--loss", "chrf"
    )


def test_workers_give_what_one_process_gives(tmp_path, words):
    for workers in (1, 2):
        result = run(
            words,
            "--out",
            tmp_path / str(workers),
            "--shard-prompts",
            1,
            "--workers",
            workers,
            "--thresholds",
            ".5,.9",
        )
        assert result.exit_code == 0, result.exception
    one, two = (Runs.read(tmp_path / name).to_frame().drop(columns="seconds") for name in "12")
    pd.testing.assert_frame_equal(one, two)


def test_again_it_says_the_same_and_generates_nothing(tmp_path, words, monkeypatch):
    first = run(words, "--out", tmp_path / "runs")
    assert first.exit_code == 0, first.exception
    monkeypatch.setattr(cli.NamedDecoder, "__call__", lambda self: pytest.fail("loaded"))
    again = run(words, "--out", tmp_path / "runs")
    assert again.exit_code == 0, again.exception
    assert again.stdout == first.stdout


def test_stopped_where_testing_fails(tmp_path):
    prompts = tmp_path / "many.txt"
    prompts.write_text("".join(f"text {i}\n" for i in range(24)), encoding="utf-8")
    out = tmp_path / "runs"
    result = run(
        prompts, "--out", out, "--thresholds", "0:1:.1", "--stop-delta", 0.45, "--stop-epsilon", 0.2
    )
    assert result.exit_code == 0, result.exception
    runs = Runs.read(out)
    assert runs.stopped.model_dump() == {
        "delta": 0.45,
        "epsilon": 0.2,
        "objective": "textual",
        "test": "betting",
    }
    assert f"Testing failed at threshold {runs.k} of 11" in result.output
    assert f"riskcal calibrate {out} --delta 0.45" in result.output
    assert "epsilon" in refusal(
        prompts, "--out", tmp_path / "other", "--stop-delta", 0.45, "--stop-epsilon", 2
    )


def test_a_template_says_what_no_option_does(tmp_path, words):
    template = tmp_path / "template.json"
    ExitPolicy(threshold=0.3, cache="deferred", max_pending=2, min_layer=2).save(template)
    result = run(words, "--out", tmp_path / "runs", "--template", template, "--thresholds", ".5,.9")
    assert result.exit_code == 0, result.exception
    candidates = Runs.read(tmp_path / "runs").candidates
    assert candidates["threshold"].tolist() == [0.9, 0.5]
    assert set(candidates["min_layer"]) == {2}
    assert {json.loads(fields)["cache"] for fields in candidates["policy"]} == {"deferred"}
    arguments = ["--out", tmp_path / "other", "--template", template, "--min-layer", 2]
    assert "--template" in refusal(words, *arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:1:.05", [i / 20 for i in range(21)]),
        ("0.1:0.45:0.1", [0.1, 0.2, 0.3, 0.4]),
        ("0.5:0.5:0.1", [0.5]),
        (".9, .5,1", [0.9, 0.5, 1.0]),
        ("-1:1:1", [-1.0, 0.0, 1.0]),
    ],
)
def test_thresholds(text, expected):
    assert cli.parse_thresholds(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "0:1",
        "0:1:0",
        "1:0:.1",
        "0:1:-.1",
        "0:1:x",
        "0:1:1e-9",
        "0:inf:1",
        "nan",
        ".5,inf",
        "0:1:.1:2",
    ],
)
def test_bad_thresholds(tmp_path, words, text):
    assert refusal(words, "--out", tmp_path / "runs", f"--thresholds={text}").startswith(
        "--thresholds: "
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: text: the table is empty"),
        ("a.txt", b"one\n\nthree\n", r"a\.txt: text: row 1 is empty"),
        ("a.txt", b"caf\xe9\n", r"a\.txt: is not UTF-8"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', r"a\.jsonl: is not UTF-8"),
        ("a.csv", b"word\nx\n", r"a\.csv: text: the column is missing; the table has: word"),
        ("a.csv", b"text,prompt\nx,1\ny,1\n", r"a\.csv: prompt: id 1 stands twice, again at row 1"),
        ("a.jsonl", b'{"text": "x"}\nnonsense\n', r"a\.jsonl: row 1 is not JSON"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl: text: row 0 is 5, not a string"),
        ("a.parquet", b"PAR1 cut short", r"a\.parquet: not a readable parquet"),
        ("a.docx", b"x", r"a\.docx: unknown ending"),
        ("absent.txt", None, r"absent\.txt: cannot be read"),
        ("absent.csv", None, r"absent\.csv: no such file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    error = refusal(path, "--out", tmp_path / "runs")
    assert pytest.raises(RiskcalError, match=message).matches(RiskcalError(error)), error
    assert not (tmp_path / "runs").exists()


def test_risk_needs_references(tmp_path, words):
    assert "words.txt: references: the column is missing" in refusal(
        words, "--out", tmp_path / "runs", "--risk"
    )
    table = tmp_path / "a.csv"
    table.write_text("text,references\nx,w1|w2\ny,\n")
    assert "a.csv: references: row 1 holds ''" in refusal(
        table, "--out", tmp_path / "runs", "--risk"
    )


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ("no_such_module_here:load", "--decoder: module no_such_module_here cannot be imported"),
        ("toy_decoder:absent", "--decoder: module toy_decoder has no function 'absent'"),
        ("toy_decoder:LAYERS", "--decoder: module toy_decoder has no function 'LAYERS'"),
        ("toy_decoder:", "is neither MODULE:FUNCTION nor"),
        (":load", "is neither MODULE:FUNCTION nor"),
    ],
)
def test_bad_decoders(tmp_path, words, decoder, message):
    result = CliRunner().invoke(
        app, ["record", str(words), "--out", str(tmp_path / "runs"), "--decoder", decoder]
    )
    assert isinstance(result.exception, RiskcalError)
    assert message in str(result.exception)
    assert not (tmp_path / "runs").exists()


def test_short_names_are_shipped_checkpoints():
    assert cli.parse_decoder("g2p") == cli.NamedDecoder(
        "riskcal_adapters.torch", "load_example", ("g2p",)
    )
    assert cli.parse_decoder("a.b:c") == cli.NamedDecoder("a.b", "c")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers"),
        (["--batch-size", "0"], "batch_size"),
        (["--min-layer", "0"], "min_layer"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_bad_options(tmp_path, words, arguments, message):
    assert message in refusal(words, "--out", tmp_path / "runs", *arguments)
    assert not (tmp_path / "runs").exists()
