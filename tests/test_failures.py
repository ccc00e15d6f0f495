"""Outputs that failed are the worst loss; what the messages advise does not select on the outcome."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers import ladder
from riskcal import RiskcalError, Runs, Traces, calibrate, replay_traces

DRAWS = 300


def table(n: int = 40) -> pd.DataFrame:
    return ladder(n, lowest=0.1, risk=0.2, failed=False)


def test_following_the_refusal_keeps_the_promise_and_dropping_prompts_does_not() -> None:
    """True mean .12 + .88 x .0614 = .174, or exactly .1 with failures of 4.4%; delta .1, epsilon .05.

    300 draws of 400 prompts: three standard errors of a rate of .05 are .038.
    """
    false = {"as told": 0, "dropped": 0}
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        failed, loss = rng.random(400) < 0.044, rng.random(400) * 2 * (0.1 - 0.044) / 0.956
        frame = pd.DataFrame(
            {
                "prompt": [f"p{i}" for i in range(400)],
                "threshold": 0.5,
                "dissimilarity": loss,
                "failed": failed,
            }
        )
        frame.loc[failed, "dissimilarity"] = math.nan
        false["as told"] += calibrate(Runs.from_frame(frame), delta=0.1).certified
        false["dropped"] += calibrate(
            Runs.from_frame(frame[~failed].drop(columns="failed")), delta=0.1
        ).certified
    assert false["as told"] / DRAWS <= 0.05 + 0.038
    assert false["dropped"] / DRAWS > 0.9


def test_the_refusal_of_a_missing_loss_names_counts_and_leads_to_both_remedies() -> None:
    frame = table().drop(columns="failed")
    lost = frame["prompt"].isin(["p3", "p7"]) & (frame["threshold"] == 0.5)
    frame.loc[lost, "dissimilarity"] = math.nan
    with pytest.raises(
        RiskcalError, match=r"nan at row 11 \(2 such rows\).*worst loss, 1.*column failed"
    ):
        Runs.from_frame(frame)
    written = Runs.from_frame(frame.assign(dissimilarity=frame["dissimilarity"].fillna(1.0)))
    said = Runs.from_frame(frame.assign(failed=lost))
    np.testing.assert_array_equal(said.losses(), written.losses())


def test_a_prompt_that_lacks_a_candidate_is_mended_as_the_refusal_says() -> None:
    frame = table()
    missing = (frame["prompt"] == "p3") & (frame["threshold"] == 0.5)
    with pytest.raises(
        RiskcalError, match=r"lacks the candidate threshold 0.5 \(1 prompts lack one\).*failed true"
    ):
        Runs.from_frame(frame[~missing])
    mended = frame.copy()
    mended.loc[missing, ["dissimilarity", "failed"]] = [math.nan, True]
    assert Runs.from_frame(mended).losses()[:, 1].max() == 1.0


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_failed_is_the_worst_loss_whatever_stands_there_and_comes_back_from_every_format(
    ending: str, tmp_path: Path
) -> None:
    frame = table()
    frame.loc[[1, 5], "failed"] = True
    frame.loc[1, ["dissimilarity", "risk"]] = math.nan
    runs = Runs.from_frame(frame)
    assert runs.values["dissimilarity"].max() == runs.values["risk"].max() == 1.0
    assert runs.values["failed"].sum() == 2
    runs.write(tmp_path / f"runs.{ending}")
    again = Runs.read(tmp_path / f"runs.{ending}")
    assert again.digest() == runs.digest()
    assert again.to_frame()["failed"].dtype == bool


def test_where_the_full_model_failed_nothing_is_near_it_and_no_candidate_is_credited() -> None:
    frame = table()
    full = (frame["prompt"] == "p3") & np.isinf(frame["threshold"])
    frame.loc[full, ["failed", "risk", "dissimilarity"]] = [True, 1.0, math.nan]
    runs = Runs.from_frame(frame)
    at = int(np.flatnonzero(runs.prompts == "p3")[0])
    assert runs.losses("textual")[at].tolist() == [1.0, 1.0]
    assert runs.losses("risk")[at].tolist() == [0.2, 0.2]
    assert np.delete(runs.losses("textual"), at, 0).max() == 0.1


@pytest.mark.parametrize("value", [None, math.nan, "yes", 1, 0.5])
def test_failed_is_true_or_false_in_every_row(value: object) -> None:
    frame = table()
    frame["failed"] = [value if row in (4, 6) else False for row in range(len(frame))]
    with pytest.raises(
        RiskcalError, match=r"failed: .* at row 4 \(2 such rows\); it is true or false"
    ):
        Runs.from_frame(frame)


def test_arrays_may_say_what_failed() -> None:
    loss = np.zeros((30, 2))
    loss[4, 1] = math.nan
    failed = np.isnan(loss)
    runs = Runs.from_arrays(thresholds=[0.9, 0.5], dissimilarity=loss, failed=failed)
    assert runs.losses().sum() == 1.0
    with pytest.raises(RiskcalError, match="dissimilarity: nan"):
        Runs.from_arrays(thresholds=[0.9, 0.5], dissimilarity=loss, failed=np.zeros((30, 2)))
    with pytest.raises(RiskcalError, match=r"failed: index \[2, 0\] is neither true nor false"):
        Runs.from_arrays(
            thresholds=[0.9, 0.5],
            dissimilarity=loss * 0,
            failed=np.where(np.arange(60).reshape(30, 2) == 4, 2, 0),
        )


def samples() -> pd.DataFrame:
    frame = table().drop(columns="failed")
    frame = frame[np.isfinite(frame["threshold"])]
    return pd.concat([frame.assign(sample=s) for s in range(3)], ignore_index=True)


def test_repeated_samples_are_mended_as_the_refusal_says() -> None:
    frame = samples()
    with pytest.raises(
        RiskcalError,
        match=r"stands twice, again at row 80 \(160 such rows\).*column cluster, or average them",
    ):
        Runs.from_frame(frame)
    clustered = frame.assign(
        cluster=frame["prompt"], prompt=frame["prompt"] + "#" + frame["sample"].astype(str)
    ).drop(columns="sample")
    averaged = frame.drop(columns="sample").groupby(["prompt", "threshold"]).mean(numeric_only=True)
    by_cluster, by_mean = Runs.from_frame(clustered), Runs.from_frame(averaged)
    assert by_cluster.n == by_mean.n == 40
    np.testing.assert_allclose(np.sort(by_cluster.losses(), 0), np.sort(by_mean.losses(), 0))


def test_a_sweep_may_have_its_reference_in_every_cell() -> None:
    """Measure x threshold, the full model's row in each cell: one reference, its costs averaged."""
    cells = [
        table().drop(columns="failed").assign(measure=measure) for measure in ("max", "softmax")
    ]
    cells[1]["layers"] += 1.0
    runs = Runs.from_frame(pd.concat(cells, ignore_index=True))
    assert runs.k == 4
    assert set(runs.full["layers"]) == {8.5}
    cells[1].loc[np.isinf(cells[1]["threshold"]), "risk"] = 0.4
    with pytest.raises(
        RiskcalError,
        match=r"risk: the full model's rows of prompt 'p\d+' differ .*it has one output",
    ):
        Runs.from_frame(pd.concat(cells, ignore_index=True))


def test_every_file_of_a_folder_is_read_or_named(tmp_path: Path) -> None:
    frame = table(6).drop(columns="failed")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    frame.iloc[:6].to_parquet(tmp_path / "a.PARQUET")
    frame.iloc[6:9].to_parquet(tmp_path / "deep" / "b.pq")
    frame.iloc[9:12].replace({math.inf: "full"}).to_json(
        tmp_path / "deep" / "er" / "c.jsonl", orient="records", lines=True
    )
    frame.iloc[12:15].to_csv(tmp_path / "d.csv.gz", index=False)
    frame.iloc[15:].to_csv(tmp_path / "e.csv", index=False)
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / ".hidden").write_text("x")
    assert Runs.read(tmp_path).digest() == Runs.from_frame(frame).digest()
    assert Runs.read(str(tmp_path / "**" / "*.*")).n == 6
    assert (
        Runs.read(
            [tmp_path / "a.PARQUET", tmp_path / "deep", tmp_path / "d.csv.gz", tmp_path / "e.csv"]
        ).n
        == 6
    )
    (tmp_path / "deep" / "notes.txt").write_text("x")
    with pytest.raises(
        RiskcalError,
        match=r"holds files that are no tables \(1: deep.notes.txt\).*a list of files, or a pattern",
    ):
        Runs.read(tmp_path)
    (tmp_path / "rotated").mkdir()
    (tmp_path / "rotated" / "router-0.jsonl.gz").touch()
    (tmp_path / "rotated" / "NOTES.txt").touch()
    with pytest.raises(RiskcalError, match=r"pattern such as '.*rotated/\*\*/\*\.jsonl\.gz'"):
        Runs.read(tmp_path / "rotated")
    (tmp_path / "rotated" / "router-0.jsonl.gz").unlink()
    tables = [
        file for file in tmp_path.rglob("*.*") if file.suffix != ".txt" and file.name != ".hidden"
    ]
    assert Runs.read(tables).n == 6
    with pytest.raises(RiskcalError, match="path: the list is empty"):
        Runs.read([])


def test_hive_partitions_become_columns_or_are_refused(tmp_path: Path) -> None:
    frame = table(6).drop(columns="failed")
    for threshold, part in frame.groupby("threshold"):
        folder = tmp_path / f"threshold={threshold}" / "min_layer=2"
        folder.mkdir(parents=True)
        part.drop(columns="threshold").to_parquet(folder / "part.parquet")
    runs = Runs.read(tmp_path)
    assert runs.digest() == Runs.from_frame(frame.assign(min_layer=2)).digest()
    frame.to_parquet(folder / "again.parquet")
    with pytest.raises(
        RiskcalError, match="threshold is a column of the file and the name of its folder"
    ):
        Runs.read(tmp_path)


# Traces


def decisions(n=240, **columns):
    return pd.DataFrame(
        {
            "prompt": [f"q{i}" for i in range(n)],
            "position": 0,
            "confidence": [[0.95, 0.99]] * n,
            "loss": [[0.0, 0.0]] * n,
            **columns,
        }
    )


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_clusters_texts_and_failures_of_traces_are_those_of_the_replay(tmp_path, ending):
    """240 prompts of 6 documents were certified as 240, and outputs that failed as good ones."""
    n, failed = 240, np.arange(240) % 4 == 0
    cluster, text = [f"doc{i // 40}" for i in range(n)], [f"say {i}" for i in range(n)]
    frame = decisions(cluster=cluster, text=text, failed=failed)
    path = tmp_path / f"traces.{ending}"
    Traces.from_frame(frame).write(path)
    runs = replay_traces(Traces.read(path), [0.9, 0.5], exact=True)
    assert (runs.n, calibrate(runs, delta=0.2).certified) == (6, False)
    known = pd.concat(
        [
            frame.assign(threshold=t, dissimilarity=0.0, risk=0.0, layers=layers, tokens=1)
            for t, layers in ((np.inf, 2.0), (0.9, 1.0), (0.5, 1.0))
        ]
    ).drop(columns=["position", "confidence", "loss"])
    known = known.assign(min_layer=1, source="replayed", exact=True)
    expected = Runs.from_frame(known)
    for objective in ("textual", "risk"):
        assert runs.losses(objective).tolist() == expected.losses(objective).tolist()
    for name in ("values", "full", "labels"):
        one, other = getattr(runs, name), getattr(expected, name)
        assert sorted(one) == sorted(other)
        assert all(np.array_equal(one[key], other[key]) for key in one)
    again = Runs.from_frame(runs.to_frame())
    assert again.digest() == runs.digest()


def test_one_token_that_failed_is_a_prompt_that_failed():
    frame = pd.concat([decisions(4), decisions(4, position=1)], ignore_index=True)
    frame["agrees"] = frame.pop("loss").map(lambda _: [False, True])
    runs = replay_traces(
        Traces.from_frame(frame.assign(failed=[True, *[False] * 7])), [0.99, 0.9], exact=True
    )
    failed = (runs.prompts == "q0").tolist()
    assert runs.losses().tolist() == [[1.0, 1.0] if f else [0.0, 1.0] for f in failed]
    assert runs.values["failed"].tolist() == [[1.0, 1.0] if f else [0.0, 0.0] for f in failed]


def test_labels_of_traces_are_those_of_a_prompt():
    twice = pd.concat([decisions(4), decisions(4, position=1)], ignore_index=True)
    with pytest.raises(RiskcalError, match=r"^cluster: 'b' at row 5, but 'a' earlier for the same"):
        Traces.from_frame(twice.assign(cluster=[*"aaaa", *"abaa"]))
    with pytest.raises(RiskcalError, match=r"^failed: 'no' at row 0"):
        Traces.from_frame(twice.assign(failed="no"))
    with pytest.raises(RiskcalError, match=r"^text: has shape \(3,\); expected \(8,\)"):
        Traces.from_arrays(**twice.to_dict("list"), text=["a"] * 3)
    with pytest.warns(UserWarning, match="repeats an earlier prompt's text"):
        Traces.from_frame(twice.assign(text="same"))


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_columns_of_tokens_stop_no_traces(tmp_path, ending):
    """A token's own text, a failure as a number, and columns that say nothing."""
    twice = pd.concat([decisions(4), decisions(4, position=1)], ignore_index=True)
    path = tmp_path / f"traces.{ending}"
    Traces.from_frame(twice).write(path)
    read = {"parquet": pd.read_parquet, "csv": pd.read_csv}.get(
        ending, partial(pd.read_json, lines=True)
    )
    write = {"parquet": "to_parquet", "csv": "to_csv"}.get(ending, "to_json")
    options = {"orient": "records", "lines": True} if write == "to_json" else {"index": False}

    def of(**columns):
        frame = read(path).assign(**columns)
        getattr(frame, write)(own := tmp_path / f"own.{ending}", **options)
        return Traces.read(own)

    with pytest.warns(UserWarning, match=r"^text: 'b' at row 1, but .*'text_logged'.* left out"):
        assert of(text=[*"abcdefgh"]).labels == {}
    with pytest.warns(UserWarning, match=r"text: .* left out"):
        assert of(text=["a", None] * 4).labels == {}
    assert of(cluster=None, text=None, failed=None).labels == {}
    failed = of(failed=[0, 0, 1, 0, 0, 0, 0, 0])
    assert failed.labels["failed"].tolist() == [False, False, True, *[False] * 5]
    assert of(failed=0.0).labels["failed"].tolist() == [False] * 8
    with pytest.raises(RiskcalError, match=r"failed: 2.*at row 0"):
        of(failed=2)


def test_another_cluster_within_a_prompt_is_put_aside_as_told():
    twice = pd.concat([decisions(4), decisions(4, position=1)], ignore_index=True)
    frame = twice.assign(cluster=range(8))
    with pytest.raises(RiskcalError, match=r"columns=\{'cluster_logged': 'cluster'\}"):
        Traces.from_frame(frame)
    assert Traces.from_frame(frame, columns={"cluster_logged": "cluster"}).labels == {}
