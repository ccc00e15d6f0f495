"""What a refusal advises, done: each remedy leads to what it promises, and none to more than was recorded."""

import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers import ladder
from riskcal import RiskcalError, Runs, calibrate


def table(n: int = 40) -> pd.DataFrame:
    return ladder(n, lowest=0.1, risk=0.2)


def refusal(frame: pd.DataFrame) -> str:
    with pytest.raises(RiskcalError) as caught:
        Runs.from_frame(frame)
    return str(caught.value)


@pytest.mark.parametrize("name", ["dissimilarity", "risk"])
def test_a_full_model_row_without_a_loss_is_marked_and_not_given_the_worst(name: str) -> None:
    """The worst distance of the full model to itself would be refused, and its worst risk would credit all candidates."""
    frame = table()
    lost = (frame["prompt"] == "p3") & np.isinf(frame["threshold"])
    frame.loc[lost, name] = math.nan
    message = refusal(frame)
    assert "say so in a column failed" in message
    assert "worst loss" not in message
    runs = Runs.from_frame(frame.assign(failed=lost))
    at = int(np.flatnonzero(runs.prompts == "p3")[0])
    assert runs.losses("textual")[at].min() == 1.0
    assert runs.losses("risk")[at].min() == 0.2


def test_a_full_risk_that_is_missing_is_0_and_credits_nobody() -> None:
    frame = table()
    frame = frame[np.isfinite(frame["threshold"])].assign(full_risk=0.2)
    frame.loc[frame["prompt"] == "p3", "full_risk"] = math.nan
    assert "write 0, so that no candidate is credited" in refusal(frame)
    runs = Runs.from_frame(frame.fillna({"full_risk": 0.0}))
    assert runs.losses("risk").max() == 0.2


@pytest.mark.parametrize("stated", [0.2, math.nan, 1.0])
def test_a_stated_full_risk_does_not_contradict_a_full_model_that_failed(stated: float) -> None:
    frame = table().assign(full_risk=0.2)
    frame.loc[frame["prompt"] == "p3", "full_risk"] = stated
    frame["failed"] = (frame["prompt"] == "p3") & np.isinf(frame["threshold"])
    runs = Runs.from_frame(frame)
    assert runs.losses("risk")[runs.prompts == "p3"].tolist() == [[0.2, 0.2]]
    assert Runs.from_frame(runs.to_frame()).digest() == runs.digest()


def samples(**more: object) -> pd.DataFrame:
    return pd.concat([table().assign(sample=s, **more) for s in range(3)], ignore_index=True)


def as_clusters(frame: pd.DataFrame) -> Runs:
    return Runs.from_frame(
        frame.assign(
            cluster=frame["prompt"], prompt=frame["prompt"] + "#" + frame["sample"].astype(str)
        ).drop(columns="sample")
    )


def test_samples_of_which_some_failed_are_clusters_and_no_average_is_advised() -> None:
    frame = samples(failed=False)
    frame.loc[4, "failed"] = True
    message = refusal(frame)
    assert "column cluster" in message
    assert "average" not in message
    runs = as_clusters(frame)
    assert (runs.n, runs.values["failed"].sum()) == (40, 1)


def test_an_average_that_keeps_all_other_columns_is_refused_where_its_samples_would_be() -> None:
    """Numbers alone would make replayed samples look generated."""
    frame = samples(source="replayed")
    assert "average them (their numbers; keep all other columns)" in refusal(frame)
    numbers = dict.fromkeys(("dissimilarity", "risk", "layers"), "mean")
    averaged = frame.groupby(["prompt", "threshold"], as_index=False).agg(
        numbers | {"source": "first"}
    )
    for runs in (Runs.from_frame(averaged), as_clusters(frame)):
        assert runs.source == "replayed"
        with pytest.raises(RiskcalError, match="replayed"):
            calibrate(runs, delta=0.3)


def test_full_models_that_differ_between_settings_lead_to_a_table_for_each() -> None:
    frame = pd.concat([table().assign(measure=m) for m in ("max", "softmax")], ignore_index=True)
    frame.loc[np.isinf(frame["threshold"]) & (frame["measure"] == "max"), "risk"] = 0.1
    message = refusal(frame)
    assert "calibrate each by itself, from a table of its own" in message
    # a sample of one setting alone would lack the candidates of the other
    assert "cluster" not in message
    for _, part in frame.groupby("measure"):
        assert calibrate(Runs.from_frame(part), delta=0.3).certified


@pytest.mark.parametrize("name", ["group", "cluster", "layers"])
@pytest.mark.parametrize("container", ["frame", "parquet", "jsonl"])
def test_an_optional_column_of_nulls_is_left_out_as_the_refusal_says(
    name: str, container: str, tmp_path: Path
) -> None:
    """In a CSV an empty group is a text, and that of all prompts."""
    frame = table().drop(columns="layers").assign(**{name: None})
    path = tmp_path / f"runs.{container}"
    if container == "parquet":
        frame.to_parquet(path)
    elif container == "jsonl":
        frame.replace({math.inf: "full"}).to_json(path, orient="records", lines=True)
    with pytest.raises(RiskcalError, match=f"{name}: .*leave {name} out"):
        Runs.from_frame(frame) if container == "frame" else Runs.read(path)
    assert Runs.from_frame(frame.drop(columns=name)).n == 40


def test_links_of_a_folder_are_followed_once_and_those_that_lead_nowhere_are_named(
    tmp_path: Path,
) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "runs"
    elsewhere.mkdir()
    folder.mkdir()
    frame = table(6)
    frame.iloc[:9].to_parquet(folder / "a.parquet")
    frame.iloc[9:].to_parquet(elsewhere / "b.parquet")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)
    (folder / "round").symlink_to(folder)
    assert Runs.read(folder).n == 6
    (folder / "gone.parquet").symlink_to(tmp_path / "nothing.parquet")
    with pytest.raises(RiskcalError, match=r"gone\.parquet: cannot be read \(No such file"):
        Runs.read(folder)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="who administers a machine may read all"
)
def test_a_folder_that_may_not_be_entered_is_named(tmp_path: Path) -> None:
    table().to_parquet(tmp_path / "a.parquet")
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(RiskcalError, match=r"closed: cannot be read \(Permission denied\)"):
        Runs.read(tmp_path)


class NeedsGradients:
    """A tensor that is trained, as torch's: numpy cannot read it before `detach`."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.dtype = values, "float32"

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

    def detach(self) -> np.ndarray:
        return self.values


def test_tensors_that_need_gradients_are_columns_of_a_dictionary() -> None:
    frame = table()
    columns = {name: frame[name].to_list() for name in frame.columns}
    columns["dissimilarity"] = NeedsGradients(frame["dissimilarity"].to_numpy())
    assert Runs.from_frame(columns).digest() == Runs.from_frame(frame).digest()


def test_tasks_that_number_their_prompts_alike_are_told_to_join_both() -> None:
    log = pd.concat([table().assign(group=task) for task in "ab"], ignore_index=True)
    told = "table.assign(prompt=table['group'].astype(str) + '/' + table['prompt'].astype(str))"
    assert told in refusal(log)
    assert Runs.from_frame(eval(told, {"table": log})).n == 80
    assert told.replace("group", "task") in refusal(log.rename(columns={"group": "task"}))


def test_losses_against_labels_are_told_to_be_a_risk() -> None:
    log = table().drop(columns="risk").assign(dissimilarity=lambda f: f["dissimilarity"] + 0.25)
    assert "columns={'risk': 'dissimilarity'}" in refusal(log)
    assert Runs.from_frame(log, columns={"risk": "dissimilarity"}).losses("risk").min() == 0
    with_risk = table().assign(dissimilarity=0.25)
    assert "'risk': 'dissimilarity'" not in refusal(with_risk)


@pytest.mark.parametrize("flags", [[True], [True, False], ["length", "eos"]], ids=str)
def test_a_flag_called_stopped_is_put_aside_as_told(flags: list[object]) -> None:
    log = table()
    log = log.assign(stopped=[flags[row % len(flags)] for row in range(len(log))])
    assert "columns={'stopped_logged': 'stopped'}" in refusal(log)
    assert Runs.from_frame(log, columns={"stopped_logged": "stopped"}).n == 40
