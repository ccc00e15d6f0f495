"""Sharded logs of tokens become runs file by file, the same as if all had been read at once."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from riskcal import RiskcalError, Runs, Traces, calibrate, replay_traces
from riskcal.records import reduce

GRID = (0.85, 0.45, 0.05)
REPLAY = partial(replay_traces, thresholds=GRID, exact=True)


def tokens(prompts: Any, seed: int = 0, **more: Any) -> pd.DataFrame:
    """Three to six tokens of each prompt, at three exits, in any order."""
    rng = np.random.default_rng(seed)
    rows = [(p, t) for p in prompts for t in range(rng.integers(3, 7))]
    frame = pd.DataFrame(rows, columns=["prompt", "position"])
    frame["confidence"] = list(rng.random((len(rows), 3)))
    agrees = rng.random((len(rows), 3)) < 0.9
    agrees[:, -1] = True
    frame["agrees"] = list(agrees)
    return frame.assign(**more).sample(frac=1, random_state=seed)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Two files, one of them below a folder whose name says the tokens' class."""
    folder = tmp_path / "tokens"
    (folder / "group=b").mkdir(parents=True)
    tokens([f"p{i}" for i in range(20)], group="a").to_parquet(folder / "0.parquet")
    rest = tokens([f"p{i}" for i in range(20, 33)], seed=1)
    rest.to_json(folder / "group=b" / "1.jsonl", orient="records", lines=True)
    return folder


class Sending:
    """What a pool of processes asks for: that work, items and results can be sent."""

    def map(self, function: Any, items: Any) -> list[Any]:
        sent = [pickle.loads(pickle.dumps((function, item))) for item in items]
        return [pickle.loads(pickle.dumps(work(item))) for work, item in sent]


def test_the_runs_are_those_of_all_tokens_at_once_with_any_pool(log: Path, tmp_path: Path) -> None:
    whole = REPLAY(Traces.read(log))
    with ThreadPoolExecutor(2) as threads:
        for name, pool in (("none", None), ("threads", threads), ("processes", Sending())):
            out = reduce(log, tmp_path / "new" / name, REPLAY, pool=pool)
            assert Runs.read(out).digest() == whole.digest()
            assert len(list(out.iterdir())) == 2
    assert calibrate(Runs.read(out), delta=0.5).certified


def test_a_log_has_names_of_its_own(log: Path, tmp_path: Path) -> None:
    frame = tokens(range(9)).rename(columns={"prompt": "request"})
    frame["entropy"] = [1 - row for row in frame.pop("confidence")]
    frame.to_parquet(tmp_path / "log.parquet")
    names = {"prompt": "request", "confidence": ("entropy", "1 - x")}
    out = reduce(tmp_path / "log.parquet", tmp_path / "runs", REPLAY, columns=names)
    right = REPLAY(Traces.read(tmp_path / "log.parquet", columns=names))
    assert Runs.read(out).digest() == right.digest()


def test_a_prompt_in_two_files_is_refused_by_name(log: Path, tmp_path: Path) -> None:
    tokens(["q1", "p7", "p3"]).to_parquet(log / "2.parquet")
    with pytest.raises(RiskcalError) as refused:
        reduce(log, tmp_path / "runs", REPLAY)
    for part in ("prompt: 'p3'", "0.parquet", "2.parquet", "2 prompts", "into one file"):
        assert part in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]  # nothing half done


def test_what_is_wrong_in_a_file_is_said_with_its_name(log: Path, tmp_path: Path) -> None:
    tokens(["q1", "q2"]).assign(position=0).to_parquet(log / "2.parquet")
    with pytest.raises(RiskcalError, match=r"2\.parquet: position: 0 of prompt 'q1' stands twice"):
        reduce(log, tmp_path / "runs", REPLAY)
    tokens(["q1"]).to_parquet(log / "2.parquet")
    with pytest.raises(RiskcalError, match=r"2\.parquet: traces: only 1 prompt"):
        reduce(log, tmp_path / "runs", REPLAY)
    with pytest.raises(RiskcalError, match="replay: gives a int"):
        reduce(log / "0.parquet", tmp_path / "runs", lambda traces: 7)  # type: ignore[arg-type, return-value]
    with pytest.raises(RiskcalError, match=r"out: .* exists already"):
        reduce(log, log, REPLAY)
    other = tokens(["q1", "q2"])
    other.assign(cost=[[1, 2, 3]] * len(other)).to_parquet(log / "2.parquet")
    with pytest.raises(RiskcalError, match=r"cost: the runs of .*2\.parquet have it, those of .*0"):
        reduce(log, tmp_path / "runs", REPLAY)


def test_distances_stand_in_the_runs_where_every_file_has_them(tmp_path: Path) -> None:
    """Losses of the full model that are 0 in one file and not in the other: risks alone are left."""
    parts = []
    for place, last in enumerate((0.0, 0.25)):
        part = tokens([f"{place}{i}" for i in range(4)], seed=place).drop(columns="agrees")
        parts.append(part.assign(loss=[[1.0, 0.5, last]] * len(part)))
        parts[-1].to_parquet(tmp_path / f"{place}.parquet")
    out = reduce(f"{tmp_path}/*.parquet", tmp_path / "runs", REPLAY)
    whole = REPLAY(Traces.from_frame(pd.concat(parts, ignore_index=True)))
    assert Runs.read(out).digest() == whole.digest()
