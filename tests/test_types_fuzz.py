"""Odd types, columns and containers: a result, or a RiskcalError; no exception of pandas, pyarrow, numpy or torch.

Each round takes every type to every column, in every third container, and to every argument, in every second shape; the next
round takes the others.
``FUZZ_ROUNDS`` (default 1) is their number, each with a seed of its own.
"""

import datetime
import decimal
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import riskcal
from riskcal import RiskcalError, RiskMonitor, Runs, Traces, calibrate, heads, pvalues

ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "1"))
N = 12


class Tensor:
    """A tensor that needs gradients, as torch's: numpy cannot read it before `detach`."""

    def __init__(self, values: Any) -> None:
        self.values, self.dtype = np.asarray(values), "float32"
        self.shape, self.ndim = self.values.shape, self.values.ndim

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

    def detach(self) -> Any:
        return self.values


class Unreadable(Tensor):
    """One that numpy cannot read at all, as of a type that numpy lacks."""

    def detach(self) -> Any:
        return self

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Got unsupported ScalarType BFloat16")


def kinds(rng: np.random.Generator, n: int) -> Iterator[tuple[str, Any]]:
    """Columns of n entries of every type that a table may have."""
    share, whole = rng.random(n), rng.integers(0, 4, n)
    for kind in ("<f8", ">f8", "<f4", ">f4", "<f2", ">i8", "<i4", "u1", "u8", ">u8", "bool", "c16"):
        yield kind, (share if kind[-2] in "fc" else whole).astype(kind)
    yield "longdouble", share.astype(np.longdouble)
    for unit in ("s", "ms", "us", "ns"):
        yield f"timedelta {unit}", whole.astype(f"m8[{unit}]")
        yield f"datetime {unit}", whole.astype(f"M8[{unit}]")
    yield "text", np.array([f"t{i}" for i in whole])
    yield "text of numbers", np.array([f"{v:.3f}" for v in share])
    yield "bytes", np.array([b"a"] * n)
    yield (
        "objects",
        np.array(
            [0.1, None, "a", 3, [1], {}, np.nan, decimal.Decimal("0.1"), 2j, (), b"x", True][:n],
            dtype=object,
        ),
    )
    yield "decimals", np.array([decimal.Decimal(f"{v:.3f}") for v in share], dtype=object)
    yield "dates", np.array([datetime.date(2026, 1, 1)] * n, dtype=object)
    yield "durations", np.array([datetime.timedelta(seconds=2)] * n, dtype=object)
    yield (
        "signed beside unsigned",
        np.array([np.uint64(2**63 + 5), np.int64(-1)] * (n // 2), dtype=object),
    )
    yield "huge whole numbers", np.array([10**400] * n, dtype=object)
    yield "all null", np.array([None] * n, dtype=object)
    yield "NaN", np.full(n, np.nan)
    yield "infinite", np.full(n, np.inf)
    yield "lists", np.array([[0.1, 0.2] for _ in range(n)] + [None], dtype=object)[:n]
    yield "pandas Int64", pd.array([*whole[:-1].tolist(), None], dtype="Int64")
    yield "pandas Float64", pd.array(share, dtype="Float64")
    yield "pandas boolean", pd.array([True, None] * (n // 2), dtype="boolean")
    yield "pandas string", pd.array([f"s{i}" for i in range(n)], dtype="string")
    yield "categories of text", pd.Categorical([f"c{i % 3}" for i in range(n)])
    yield "categories of numbers", pd.Categorical(whole)
    yield "periods", pd.period_range("2026-01", periods=n, freq="M")
    yield "intervals", pd.arrays.IntervalArray.from_breaks(np.arange(n + 1.0))
    yield "zoned dates", pd.date_range("2026-01-01", periods=n, tz="UTC")
    yield "sparse", pd.arrays.SparseArray(whole.astype(float))
    for kind in (
        pa.float64(),
        pa.float16(),
        pa.int8(),
        pa.uint64(),
        pa.bool_(),
        pa.string(),
        pa.large_string(),
        pa.binary(),
    ):
        plain = {
            "s": [f"a{i}" for i in range(n)],
            "l": [f"a{i}" for i in range(n)],
            "b": [b"a"] * n,
        }
        values = (
            plain.get(str(kind)[0], whole.tolist()) if not pa.types.is_boolean(kind) else [True] * n
        )
        values = np.asarray(values, dtype=np.float16) if kind == pa.float16() else values
        yield f"arrow {kind}", pd.array(pa.array(values, kind), dtype=pd.ArrowDtype(kind))
    for kind in (
        pa.duration("ms"),
        pa.timestamp("us"),
        pa.date32(),
        pa.time64("us"),
        pa.decimal128(10, 3),
        pa.list_(pa.float64()),
    ):
        values = [[0.1]] * n if pa.types.is_list(kind) else [1] * n
        if pa.types.is_decimal(kind):
            values = [decimal.Decimal("0.125")] * n
        yield f"arrow {kind}", pd.array(pa.array(values, kind), dtype=pd.ArrowDtype(kind))


def containers(frame: pd.DataFrame, turn: int) -> Iterator[tuple[str, Any]]:
    """Every third container of a table, which ones being the turn's to say."""
    makers: dict[str, Callable[[pd.DataFrame], Any]] = {
        "pandas": lambda f: f,
        "dict": lambda f: {name: f[name].to_numpy() for name in f.columns},
        "lists": lambda f: {name: f[name].tolist() for name in f.columns},
        "indexed": lambda f: f.set_index("prompt"),
        "pyarrow": pa.Table.from_pandas,
        "polars": pl.from_pandas,
    }
    for name, make in list(makers.items())[turn % 3 :: 3]:
        try:
            yield name, make(frame)
        except Exception:  # there is no such table to give
            continue


def fine(call: Callable[[], Any]) -> bool:
    """Whether there was a result; False for a refusal. Anything else is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except RiskcalError:
            return False
    return True


def runs_table(n: int = N) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "prompt": np.repeat([f"p{i}" for i in range(n // 2)], 2),
            "threshold": np.tile([0.9, 0.5], n // 2),
            "dissimilarity": 0.1,
            "layers": 3.0,
            "seconds": 1.0,
        }
    )


COLUMNS = (
    *(
        "prompt",
        "threshold",
        "dissimilarity",
        "risk",
        "full_risk",
        "layers",
        "seconds",
        "cluster",
        "group",
        "text",
        "failed",
    ),
    *(
        "measure",
        "min_layer",
        "temperature",
        "max_length",
        "policy",
        "source",
        "exact",
        "stopped",
        "variant",
    ),
)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_tables_give_runs_or_a_refusal(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    rng, cases, read = np.random.default_rng(seed), 0, 0
    for number, (kind, values) in enumerate(kinds(rng, N)):
        for place, column in enumerate(COLUMNS):
            frame = runs_table()
            frame[column] = values
            for container, table in containers(frame, seed + number + place):
                extra = ["variant"] if column == "variant" else []
                cases += 1
                try:
                    read += fine(lambda t=table, e=extra: Runs.from_frame(t, candidate_columns=e))
                except Exception as error:
                    pytest.fail(
                        f"{kind} as {column} in {container}: {type(error).__name__}: {error}"
                    )
    assert cases > 2000
    assert 0.05 < read / cases < 0.9
    with capsys.disabled():
        print(f"\n{cases} tables, {read} read")


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_tables_give_traces_or_a_refusal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for number, (kind, values) in enumerate(kinds(rng, N)):
        for place, column in enumerate(
            (
                "prompt",
                "position",
                "confidence",
                "confidence_1",
                "agrees",
                "agrees_2",
                "loss",
                "group",
            )
        ):
            frame = pd.DataFrame({"prompt": [f"p{i}" for i in range(N)], "position": 0})
            for exit_ in (1, 2):
                frame[f"confidence_{exit_}"], frame[f"agrees_{exit_}"] = 0.5, True
            frame[column] = values
            for container, table in containers(frame, seed + number + place):
                try:
                    fine(lambda t=table: Traces.from_frame(t))
                except Exception as error:
                    pytest.fail(
                        f"{kind} as {column} in {container}: {type(error).__name__}: {error}"
                    )


def shapes(values: Any) -> Iterator[tuple[str, Any]]:
    """What may be given for an array of N, or of (N, 2)."""
    yield "as it is", values
    array = np.asarray(values)
    yield "0-d", array[0] if array.ndim else array
    yield "list", list(values)
    yield "tensor", Tensor(array)
    yield "unreadable", Unreadable(array)
    if array.ndim == 1:
        yield "matrix", np.stack([array, array], axis=1)
        yield "strided", np.stack([array, array], axis=1)[:, 0]
    yield "empty", array[:0]


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_arrays_give_a_result_or_a_refusal(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(seed)
    good, ids = rng.random((N, 2)), [f"p{i}" for i in range(N)]
    grid, agrees, where = [0.9, 0.5], np.ones((N, 2), dtype=bool), np.zeros(N, dtype=int)
    calls: dict[str, Callable[[Any], Any]] = {
        "Runs dissimilarity": lambda v: Runs.from_arrays(thresholds=grid, dissimilarity=v),
        "Runs failed": lambda v: Runs.from_arrays(thresholds=grid, dissimilarity=good, failed=v),
        "Runs thresholds": lambda v: Runs.from_arrays(thresholds=v, dissimilarity=good),
        "Runs prompts": lambda v: Runs.from_arrays(thresholds=grid, dissimilarity=good, prompts=v),
        "Runs cluster": lambda v: Runs.from_arrays(thresholds=grid, dissimilarity=good, cluster=v),
        "Runs group": lambda v: Runs.from_arrays(thresholds=grid, dissimilarity=good, group=v),
        "Runs text": lambda v: Runs.from_arrays(thresholds=grid, dissimilarity=good, text=v),
        "Runs full_risk": lambda v: Runs.from_arrays(thresholds=grid, risk=good, full_risk=v),
        "calibrate losses": lambda v: calibrate(v, thresholds=grid, delta=0.5),
        "calibrate prompts": lambda v: calibrate(good, thresholds=grid, delta=0.5, prompts=v),
        "calibrate delta": lambda v: calibrate(good, thresholds=grid, delta=v),
        "Traces prompt": lambda v: Traces.from_arrays(
            prompt=v, position=where, confidence=good, agrees=agrees
        ),
        "Traces position": lambda v: Traces.from_arrays(
            prompt=ids, position=v, confidence=good, agrees=agrees
        ),
        "Traces confidence": lambda v: Traces.from_arrays(
            prompt=ids, position=where, confidence=v, agrees=agrees
        ),
        "Traces agrees": lambda v: Traces.from_arrays(
            prompt=ids, position=where, confidence=good, agrees=v
        ),
        "Traces loss": lambda v: Traces.from_arrays(
            prompt=ids, position=where, confidence=good, loss=v
        ),
        "Traces group": lambda v: Traces.from_arrays(
            prompt=ids, position=where, confidence=good, agrees=agrees, group=v
        ),
        "replay confidence": lambda v: riskcal.replay_arrays(v, good, grid),
        "replay loss": lambda v: riskcal.replay_arrays(good, v, grid),
        "replay thresholds": lambda v: riskcal.replay_arrays(good, good, v),
        "replay position": lambda v: riskcal.replay_arrays(good, good, grid, position=v),
        "heads confidence": lambda v: heads.self_supervised(v, agrees),
        "heads agrees": lambda v: heads.self_supervised(good, v),
        "heads prompts": lambda v: heads.certified(good, agrees, prompts=v, max_tokens=3),
        "monitor": lambda v: RiskMonitor(0.1).update(v),
        "monitor rates": lambda v: RiskMonitor(0.1, sampling_rate=0.01).update(good[:, 0], rates=v),
        "pvalues": lambda v: pvalues.betting(v, 0.5, level=0.05),
        "sums": lambda v: pvalues.convex_order(v, 0.5),
        "binomial": lambda v: pvalues.binomial(v, 0.5),
        "bounds": lambda v: riskcal.bounds.hoeffding(v),
        "fwer": lambda v: riskcal.fwer.holm(v, 0.05),
        "trials": lambda v: riskcal.run_trials(
            Runs.from_arrays(thresholds=grid, dissimilarity=good), v, n_trials=1
        ),
    }
    cases = read = 0
    for kind, values in kinds(rng, N):
        for number, (shape, given) in enumerate(shapes(values)):
            for call, function in list(calls.items())[(seed + number) % 2 :: 2]:
                cases += 1
                try:
                    read += fine(lambda f=function, g=given: f(g))
                except Exception as error:
                    pytest.fail(f"{kind}, {shape}, for {call}: {type(error).__name__}: {error}")
    assert cases > 5000
    assert 0.02 < read / cases < 0.9
    with capsys.disabled():
        print(f"\n{cases} arrays, {read} accepted")
